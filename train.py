"""The driver: warm-up -> stage 1 (list-wise GRPO, "rta") -> stage 2 (Progressive Preference Refinement, "ppr").

    python train.py --dataset office                      # bundled tiny agent, both stages, test table; minutes on a CPU
    python train.py --dataset office --preset paper       # Qwen3-4B-Instruct-2507 with the paper's settings (GPU)
    python train.py --stage warmup --out runs/agent       # builds a tiny agent like assets/tiny-agent
    python train.py --resume runs/NAME                    # continues exactly where it stopped
    torchrun --nproc_per_node 4 train.py ... [--shard]    # data parallel, also with --resume and another number

`grpo_step` is the method. All randomness is seeded from integers (seed, stage, step, sample), so resuming needs weights,
optimizer and a counter. A run folder holds config.json, metrics.jsonl, trajectories.jsonl, hard_pairs.jsonl, rta/, ppr/,
last/, eval.json, report.html.
"""

import argparse
import contextlib
import copy
import datetime
import gc
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from data import (
    N_CANDIDATES,
    Dataset,
    DatasetError,
    Sample,
    first_line,
    load_dataset,
    reading,
    run_main,
)
from grpo import (
    BONUS,
    MICRO_TOKENS,
    Objective,
    accumulate,
    gather_list,
    group_advantages,
    my_share,
    over_ranks,
    policy_gradient,
    ranks,
    rollout_metrics,
)
from model import (
    QWEN3,
    ModelError,
    Policy,
    TrainRow,
    add_lora,
    build_tiny_agent,
    check_device,
    checkpoint_layers,
    complete,
    find_model,
    load_policy,
    memory_need,
    memory_table,
    muon_and_adamw,
    qwen3_config,
    read_config,
    save_policy,
    tiny_shape,
    token_logprobs,
)
from ppr import (
    DIRECTIONS,
    HardPair,
    bound_gradient,
    mine,
    ordered,
    pair_tasks,
    read_pairs,
    reward,
)
from rollout import (
    ALL_TOOLS,
    Task,
    Trajectory,
    demonstrate,
    demonstration_texts,
    exercises,
    profile_prompt,
    rollout,
    trained_tools,
)
from sasrec import train_sasrec
from tools import PROFILES, Context, load_context

try:
    import fcntl
except ImportError:  # Windows: a run folder is not locked there
    fcntl = None

HERE = pathlib.Path(__file__).parent
LOCK = ".lock"  # of a run folder, held while a run writes there
LOGS = ("metrics.jsonl", "trajectories.jsonl")
STAGE_METRICS = ("zero_variance_groups", "dropped_groups", "kl_sampler_trainer", "entropy")  # fmt: skip
STAGES = {"warmup": "warm-up", "rta": "stage 1 rta", "ppr": "stage 2 ppr"}
STAGE_SEED = {"warmup": 1, "rta": 2, "ppr": 3, "mine": 4}
# of an answer's tokens in the warm-up; the others are easy or random
ENDING_WEIGHT = 2.0


@dataclass
class Run:
    """Live state of one run: what is trained, where it is written and how far it is."""

    args: argparse.Namespace
    out: pathlib.Path
    ds: Dataset
    ctx: Context
    policy: Policy
    stage: str = ""
    step: int = 0  # steps done in this stage
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    whole: Policy | None = None  # --shard: what rollouts run on
    pairs: list[HardPair] = field(default_factory=list)
    skipped: int = 0  # updates in a row that were not finite
    stepping: bool = False  # in the loop over steps, where a signal lets one finish
    stop: int = 0  # signal that asked to stop


# ---------------------------------------------------------------------------------------------- one step of stage 1 or 2


def grpo_step(run: Run, stage: str, step: int) -> tuple[dict, list]:
    """Prompts, rollout, rewards and one update; returns the step's metrics and the groups."""
    args, began = run.args, time.perf_counter()
    tasks = stage_tasks(run, stage, step)  # P prompts
    seed = (args.seed, STAGE_SEED[stage], step)
    G = args.group_size
    groups = sample_groups(run, tasks, seed, args.slots, G)  # P lists of G
    rolled = time.perf_counter()
    metrics = {"stage": stage, "step": step + 1} | rollout_metrics(groups)
    metrics |= backward(run, groups)  # advantages and gradient, Eq. 6
    lr = args.ppr_lr if stage == "ppr" else args.lr
    decay = 1 - step / stage_steps(run, stage)
    metrics |= update(run, lr * min(1.0, (step + 1) / 5, decay))
    metrics["seconds_rollout"] = rolled - began
    metrics["seconds_update"] = time.perf_counter() - rolled
    return metrics, groups


def stage_tasks(run: Run, stage: str, step: int) -> list[Task]:
    """The prompts of one step, reshuffled every epoch: samples (rta), or hard pairs in both directions (ppr).

    A share of stage 2's prompts (--list-share) are rankings, of other pairs' samples or, where pairs are few, of any
    training samples: without them the tiny agent forgets within a dozen steps how to rank. An epoch then does not ask
    about every pair.
    """
    args, train = run.args, run.ds.splits["train"]
    directions = DIRECTIONS[args.ppr_directions]
    pool, n_pairs, n_lists = train, 0, args.batch
    if stage == "ppr":
        pool = run.pairs
        n_pairs = max(1, round(args.batch * (1 - args.list_share) / len(directions)))
        n_lists = (
            max(0, args.batch - len(directions) * n_pairs) if args.list_share else 0
        )
    size = min(len(pool), n_pairs + n_lists)
    epoch, at = divmod(step, len(pool) // size)
    seed = [args.seed, STAGE_SEED[stage], epoch]
    order = np.random.default_rng(seed).permutation(len(pool))
    chosen = [pool[i] for i in order[at * size : (at + 1) * size]]
    if stage == "rta":
        return [Task(sample) for sample in chosen]
    samples = {pair.sample: train.of(pair.sample) for pair in chosen}
    # + 1, since a seed's trailing zeros do not count: step 0 would draw from the order's stream
    rng = np.random.default_rng([*seed, step + 1])
    lists = [Task(samples[pair.sample]) for pair in chosen[n_pairs:]]
    asked = pair_tasks(chosen[:n_pairs], samples, rng, directions)
    known = {task.sample.id for task in lists}
    others = (train[i] for i in rng.permutation(len(train)))
    others = (Task(sample) for sample in others if sample.id not in known)
    return asked + lists + list(islice(others, n_lists - len(lists)))


def sample_groups(
    run: Run, tasks: list[Task], seed: tuple, slots: int, group_size: int, progress=None
) -> list[list[Trajectory]]:
    """`group_size` trajectories of each task with their rewards; each rank samples its share, all get all."""
    args, (rank, n) = run.args, ranks()
    with gathered(run) as policy:
        groups = rollout(
            policy, run.ctx, tasks[rank::n], group_size=group_size, k=args.k, slots=slots,
            temperature=args.temperature, greedy_answer=args.greedy_answer,
            max_new_tokens=args.max_new_tokens, seed=seed, tools=trained_tools(vars(args)),
            progress=progress,
        )  # fmt: skip
    for t in (t for group in groups for t in group):
        t.reward = float(reward(run.ctx, t, args.k, args.bonus))  # Eq. 1, or of a pair
    groups = gather_list(groups)
    return [groups[i % n][i // n] for i in range(len(tasks))]


def backward(run: Run, groups: list[list[Trajectory]]) -> dict:
    """Accumulate the step's gradient; --ppr-objective logistic takes the pair questions out of the policy gradient."""
    args, policy = run.args, run.policy
    metrics = dict.fromkeys(STAGE_METRICS)  # None where only the bound is optimised
    if args.ppr_objective == "logistic":
        pairs = [group for group in groups if group[0].task.pair]
        groups = [group for group in groups if not group[0].task.pair]
        metrics |= bound_gradient(policy, pairs, args.micro_tokens) if pairs else {}
    if groups:
        objective = Objective(
            args.baseline, args.divide_by_std, args.token_mean,
            not args.keep_negative_groups, args.teach_form,
        )  # fmt: skip
        metrics |= policy_gradient(
            policy, groups, objective, args.temperature, args.micro_tokens
        )
    return metrics


def update(run: Run, lr: float) -> dict:
    """Clip the accumulated gradient and step; a gradient that is not finite skips the update and is counted."""
    parameters = [p for p in run.policy.model.parameters() if p.grad is not None]
    if ranks()[1] > 1 and not run.policy.score:  # fully_shard has added up its own
        for p in parameters:
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.args.max_grad_norm)
    norm = float(whole(norm))
    finite = math.isfinite(norm)
    run.skipped = 0 if finite else run.skipped + 1
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if finite and norm > 0:
            optimizer.step()
    run.policy.model.zero_grad()
    return {"grad_norm": norm if finite else None, "lr": lr, "skipped": run.skipped}


# ------------------------------------------------------------------------------------------------- stage 2: what it asks


def mined_samples(run: Run) -> list[Sample]:
    """The training samples that stage 2's pairs are mined from."""
    pool = run.ds.splits["train"]
    rng = np.random.default_rng([run.args.seed, STAGE_SEED["mine"]])
    return [pool[i] for i in rng.permutation(len(pool))[: run.args.mine_samples]]


def mine_pairs(run: Run) -> None:
    """Stage 2's data: roll the stage-1 policy out once over training samples and keep its violations (Eq. 3)."""
    args, n = run.args, ranks()[1]
    seed, slots = (args.seed, STAGE_SEED["mine"]), args.slots * args.group_size
    tasks = [Task(sample) for sample in mined_samples(run)]
    with progress_bar("mining hard pairs", len(tasks) // n, "sample") as bar:
        groups = sample_groups(run, tasks, seed, slots, 1, lambda group: bar.update())
    run.pairs = mine([g[0] for g in groups], (*seed, 1), args.random_negatives)
    if args.ppr_pairs != "all":
        how = partial(ordered, run.ctx, trained_tools(vars(args)))
        of = run.ds.splits["train"].of
        run.pairs = [p for p in run.pairs if how(of(p.sample), p) == args.ppr_pairs]
    put_json(run.out / "hard_pairs.jsonl", map(vars, run.pairs))
    tqdm.write(f"mined {len(run.pairs)} hard pairs from {len(tasks)} training samples")
    if not run.pairs:
        why = f"none is {args.ppr_pairs} by the tools"
        if args.ppr_pairs == "all":
            why = "the policy ranked every positive first, or no answer was valid"
        tqdm.write(f"stage 2 is left out: {why}")


# ------------------------------------------------------------------------------------------- before stage 1: the warm-up


def warmup_demonstrations(run: Run, step: int) -> tuple[list, list, list[Trajectory]]:
    """The prompts and rows of one step of the warm-up, and what was demonstrated, a trajectory a row.

    Curriculum: exercises, if any; then demonstrations with up to one, two and five pieces of evidence, half of the rows
    still exercises. In the last tenth there are none, and half of the rankings are given at once, so that the agent can
    use many tools and has to find out that it pays, and which.
    """
    args = run.args
    rng = np.random.default_rng([args.seed, STAGE_SEED["warmup"], step])
    pool = run.ds.splits["fit"] + run.ds.splits["train"]
    first = args.exercise_steps
    progress = (step - first) / (args.warmup_steps - first)
    max_steps = 1 if progress < 0.05 else 2 if progress < 0.2 else 5
    tools = trained_tools(vars(args))
    script = (args.k, rng, max_steps, progress > 0.9, tools, args.ask_again)
    practise = args.batch if step < first else args.batch // 2 if first else 0
    prompts, rows, shown = [], [], []
    for i in range(args.batch):
        if i < practise and progress < 0.9:
            lists = 1 + int(7 * min(1, step / first))
            found = exercises(
                run.policy, run.ctx, pool, rng, args.group_size, lists, args.k
            )
        else:
            sample, pair = pool[rng.integers(len(pool))], None
            if rng.random() < 0.25:
                two = rng.permutation(len(sample.candidates))[:2] + 1
                pair = tuple(two.tolist())
            task, n = Task(sample, pair, bool(rng.random() < 0.5)), args.group_size
            found = [demonstrate(run.policy, run.ctx, task, *script) for _ in range(n)]
        for t in found:
            if not prompts or t.prompt != prompts[-1]:
                prompts.append(t.prompt)
            rows.append(TrainRow(len(prompts) - 1, t.ids, t.action_mask))
            shown.append(t)
    return prompts, rows, shown


def warmup_step(run: Run, step: int) -> tuple[dict, list]:
    """One step of imitation of scripted demonstrations: cross-entropy over their action tokens, weighted."""
    args, began = run.args, time.perf_counter()
    prompts, rows, shown = warmup_demonstrations(run, step)
    n_actions = sum(sum(r.action_mask) for r in rows)
    own = my_share([len(r.ids) for r in rows])
    counts = [sum(rows[i].action_mask) for i in own]
    weights = []
    for i, n in zip(own, counts):
        heavy = shown[i].ending
        weights += [1.0] * (n - heavy) + [ENDING_WEIGHT] * heavy
    share = [rows[i] for i in own]
    how = {"micro_tokens": args.micro_tokens}
    logprobs, _ = accumulate(run.policy, prompts, share, weights, n_actions, **how)
    paired = [t.task.pair is not None for t in shown]
    sums = [-float(logprobs.sum()), 0.0, 0.0]  # of all, of rankings, of pairs
    for i, n, x in zip(own, counts, logprobs.split(counts)):
        sums[1 + paired[i]] -= float(x[n - shown[i].ending :].sum())
    total, lists, pairs = over_ranks(sums)
    n_answers, n_pairs = sum(t.ending > 0 for t in shown), sum(paired)
    left, ramp = 1 - step / args.warmup_steps, min(50, 1 + args.warmup_steps // 10)
    lr = args.warmup_lr * min(1.0, (step + 1) / ramp, max(0.02, 1.5 * left))
    metrics = {"stage": "warmup", "step": step + 1, "loss": total / n_actions}
    if step >= args.exercise_steps:
        metrics["answer_loss"] = lists / max(1, n_answers - n_pairs)
        metrics["pair_loss"] = pairs / max(1, n_pairs)
    metrics |= update(run, lr)
    metrics["tokens"] = sum(len(r.ids) for r in rows)
    return metrics | {"seconds_update": time.perf_counter() - began}, []


def make_optimizers(run: Run, stage: str) -> list[torch.optim.Optimizer]:
    """Fresh ones for each stage."""
    model, args = run.policy.model, run.args
    if stage == "warmup" and not args.shard:  # Muon needs whole matrices
        emulates = args.device.startswith("cpu") and args.dtype == "float32"
        return muon_and_adamw(model, args.warmup_lr, emulates)
    # fused: no temporary as large as all weights
    how = {"weight_decay": 0.0, "fused": args.device.startswith("cuda")}
    return [torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), **how)]


# --------------------------------------------------------------------------------------------- before training: profiles


def profile_samples(run: Run) -> list[Sample]:
    """The samples that --profiles llm covers: stage 1's, the mined ones, and those that eval.py draws by default.

    Not those of demonstrations, nor the rankings that fill up stage 2 where pairs are few: they keep the template's.
    """
    args, test = run.args, run.ds.splits["test"]
    found = mined_samples(run) if args.stage in ("all", "ppr") else []
    if args.stage in ("all", "rta"):
        steps = range(stage_steps(run, "rta"))
        found += [t.sample for step in steps for t in stage_tasks(run, "rta", step)]
    drawn = np.random.default_rng(0).permutation(len(test))[: args.test_samples]
    return list({s.id: s for s in [*found, *(test[i] for i in drawn)]}.values())


def write_profiles(run: Run) -> None:
    """--profiles llm: before training the policy describes every user, as the paper's frozen backbone does.

    Kept in profiles.jsonl, so that it happens once; a resumed run writes what is missing.
    """
    path, (rank, n), profiles = run.out / PROFILES, ranks(), run.ctx.profiles
    todo = [s for s in profile_samples(run) if s.id not in profiles]
    starts = range(0, len(todo), 8 * run.args.slots * n)
    bar = progress_bar("writing profiles", len(starts), "batch")
    with bar, gathered(run) as policy:
        for at in starts:
            own = todo[at : at + starts.step][rank::n]
            texts = complete(policy, [profile_prompt(policy, run.ctx, s) for s in own])
            for part in gather_list([(s.id, text) for s, text in zip(own, texts)]):
                profiles.update(part)
            put_json(path, ({"sample": i, "text": t} for i, t in profiles.items()))
            bar.update()


# ------------------------------------------------------------------------------------------------ the loop over the steps


def stage_steps(run: Run, stage: str) -> int:
    """How many steps a stage takes: --steps, or the preset's steps or epochs."""
    args = run.args
    if stage == "warmup":
        return args.warmup_steps
    steps, epochs = args.steps, args.epochs
    epoch = len(run.ds.splits["train"]) // args.batch
    if stage == "ppr":
        steps, epochs = args.ppr_steps, args.ppr_epochs
        questions = len(run.pairs) * len(DIRECTIONS[args.ppr_directions])
        epoch = round(questions / (args.batch * (1 - args.list_share)))
    return steps if steps is not None else math.ceil(epochs * max(1, epoch))


def train_stage(run: Run, stage: str) -> None:
    """Run one stage from where it stands to its end, logging, checkpointing and stopping on request."""
    if stage == "ppr":
        path = run.out / "hard_pairs.jsonl"
        if over_ranks([path.exists()], "min")[0]:
            run.pairs = read_pairs(path)
        elif run.step:
            raise ModelError(f"{path}: is missing, and stage 2 has begun; restore it")
        else:
            mine_pairs(run)
        if not run.pairs:
            return
    steps = stage_steps(run, stage)
    run.optimizers = run.optimizers or make_optimizers(run, stage)
    with progress_bar(STAGES[stage], steps, "step", run.step) as bar:
        run.stepping = True
        while run.step < steps:
            if stage == "warmup":
                metrics, groups = warmup_step(run, run.step)
            else:
                metrics, groups = grpo_step(run, stage, run.step)
            run.step += 1
            log_step(run, metrics, groups)
            bar.set_postfix_str(postfix(metrics))
            bar.update()
            end_of_step(run, last=run.step == steps)
    run.stepping = False
    if run.stop:
        leave(run, run.stop)
    with gathered(run, exact=True) as policy:
        if ranks()[0] == 0:
            put(run.out / stage, partial(save_policy, policy))


def end_of_step(run: Run, last: bool) -> None:
    """Save when it is time to, and leave when asked to or when updates keep failing; all ranks alike."""
    # a signal from here on waits for the next step
    stop = int(over_ranks([run.stop], "max")[0])
    failing = run.skipped >= 3
    if failing or stop or last or run.step % run.args.save_every == 0:
        save_state(run)
        over_ranks([0])  # wait until it is written: a rank that leaves ends the others
    if failing:
        hint = f"state saved in {run.out}: start anew with a lower --lr"
        raise ModelError(f"3 updates in a row were not finite; {hint}")
    if stop:
        leave(run, stop)


def on_signal(run: Run, received: int, frame) -> None:
    """Ctrl-C or SIGTERM: finish and save the step; outside of a step, or when asked twice, leave at once."""
    if run.stepping and not run.stop:
        run.stop = received
    else:
        leave(run, received)


def leave(run: Run, received: int) -> None:
    """Exit as a signal asked for, saying how to go on."""
    done = f"after step {run.step} of {run.stage}" if run.stage else "before training"
    print(f"\nstopped {done}; continue with: python train.py --resume {run.out}")
    end_rank(128 + received)


def progress_bar(text: str, total: int, unit: str, done: int = 0) -> tqdm:
    """A progress bar that only rank 0 shows."""
    return tqdm(desc=text, total=total, unit=unit, initial=done, disable=ranks()[0] > 0)


def postfix(m: dict) -> str:
    """The progress bar's figures."""
    if "valid" not in m:
        return f"loss {m['loss']:.3f}"
    return f"reward {m['reward_mean']:.3f} valid {m['valid']:.0%} calls {m['tool_calls']:.1f}"


def log_step(run: Run, metrics: dict, groups: list) -> None:
    """Append the step's metrics and its first group's best and worst trajectory; warn of what looks wrong."""
    args, cut = run.args, metrics.get("cut", 0)
    if cut > 0.3:
        flag = f"--max-new-tokens {args.max_new_tokens}"
        tqdm.write(f"warning: {cut:.0%} of answers were cut by {flag}")
    if metrics.get("valid") == 0:
        what = "rankings of this --k" if args.k != 10 else "such titles and tools"
        hint = f"does the agent know {what}? if not: --stage warmup"
        tqdm.write(f"warning: no answer was valid; {hint}")
    kl = metrics.get("kl_sampler_trainer") or 0
    if kl > (1e-4 if run.policy.dtype == torch.float32 else 1e-2):  # bf16 is coarse
        tqdm.write(f"warning: sampler and trainer disagree, KL {kl:.1e}")
    still = metrics.get("zero_variance_groups") == len(groups)
    if groups and (still or metrics.get("grad_norm") == 0):
        why = "all groups have equal rewards" if still else "no group gave a signal"
        tqdm.write(f"{why}: no update in this step")
    logs = {"metrics.jsonl": [{k: rounded(v) for k, v in metrics.items()}]}
    for group in groups[:1]:
        rewards = np.array([[t.reward for t in group]])
        advantages = group_advantages(rewards, args.baseline, args.divide_by_std)[0]
        ends = {int(advantages.argmax()), int(advantages.argmin())}
        rows = [trajectory_json(run, group[g], metrics, advantages[g]) for g in ends]
        logs["trajectories.jsonl"] = rows
    for name, rows in logs.items() if ranks()[0] == 0 else ():
        with open(run.out / name, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def rounded(x):
    """A float with six digits, None if it is not finite, which JSON lacks; anything else as it is."""
    if not isinstance(x, float):
        return x
    return float(f"{x:.6g}") if math.isfinite(x) else None


def trajectory_json(run: Run, t, metrics: dict, advantage: float) -> dict:
    """One trajectory to read: prompt and text, what was right, reward and advantage."""
    return {
        "stage": metrics["stage"], "step": metrics["step"], "sample": t.task.sample.id, "pair": t.task.pair,
        "more": t.task.more, "positive": t.task.sample.target + 1, "answer": t.answer, "valid": t.valid, "end": t.end,
        "reward": round(t.reward, 4), "advantage": round(float(advantage), 4),
        "prompt": run.policy.decode(t.prompt), "text": run.policy.decode(t.ids),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ checkpoint and resume


def put(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Have `write` make a file or folder beside `path`, then give it that name; ModelError if it cannot be written.

    A kill at any moment leaves the old or the new one complete; a folder's old one is `path`.old for an instant.
    """
    new, old = (path.with_name(path.name + end) for end in (".new", ".old"))
    remove(new)
    try:
        write(new)
    except Exception as e:  # torch, safetensors and tokenizers have kinds of their own
        remove(new)
        raise ModelError(
            f"{path}: cannot be written ({first_line(e)}); what was saved before is intact: "
            f"mend that (a full disk?), then: python train.py --resume {path.parent}"
        ) from e
    if path.is_dir():
        remove(old)
        path.rename(old)
    new.replace(path)
    remove(old)


def put_json(path: pathlib.Path, rows, indent: int | None = None) -> None:
    """Write a whole file of JSON objects; only rank 0 does."""
    lines = "".join(json.dumps(row, indent=indent) + "\n" for row in rows)
    if ranks()[0] == 0:
        put(path, lambda new: new.write_text(lines))


def remove(path: pathlib.Path) -> None:
    """Delete a file or a folder if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def save_state(run: Run) -> None:
    """Write last/: weights, optimizer, counters and how long the logs are."""
    model = run.policy.model.state_dict()
    if run.policy.model.config.tie_word_embeddings:
        del model["lm_head.weight"]
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    model, optimizers = tree_map(for_rank_0, (model, optimizers))
    if ranks()[0]:
        return
    state = {"stage": run.stage, "step": run.step, "skipped": run.skipped}
    for path in (run.out / name for name in LOGS):
        state[path.name] = path.read_bytes().count(b"\n") if path.exists() else 0
    put(run.out / "last", partial(write_state, model, optimizers, state))


def write_state(model: dict, optimizers: list, state: dict, folder: pathlib.Path):
    folder.mkdir()
    save_file(model, folder / "model.safetensors")
    torch.save(optimizers, folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(state))


def restore_state(run: Run) -> None:
    """Put weights, optimizer and counters back and cut the logs to the saved step."""
    folders = (run.out / "last", run.out / "last.old")
    folder = next((f for f in folders if (f / "state.json").exists()), None)
    state = json.loads((folder / "state.json").read_text()) if folder else {}
    for path in (run.out / name for name in LOGS):
        if path.exists() and ranks()[0] == 0:
            lines = path.read_bytes().splitlines(keepends=True)
            # in place, since a rewrite could be killed half-way
            os.truncate(path, sum(map(len, lines[: state.get(path.name, 0)])))
    if not folder:
        return
    run.stage, run.step, run.skipped = state["stage"], state["step"], state["skipped"]
    run.optimizers = make_optimizers(run, run.stage)
    model = load_file(folder / "model.safetensors")
    # mapped: a rank needs its share only
    how = {"weights_only": True, "mmap": bool(run.policy.score)}
    optimizers = torch.load(folder / "optimizer.pt", "cpu", **how)
    if run.policy.score:
        named = dict(run.policy.model.named_parameters())
        model = {name: split_like(x, named[name]) for name, x in model.items()}
        owners = run.optimizers[0].param_groups[0]["params"]
        for i, values in optimizers[0]["state"].items():
            for name, x in values.items():
                values[name] = split_like(x, owners[i])
    run.policy.model.load_state_dict(model, strict=False)
    for optimizer, saved in zip(run.optimizers, optimizers):
        optimizer.load_state_dict(saved)


# --------------------------------------------------------------------------------------------------- several processes


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks(device: str) -> None:
    """Under torchrun meet the other processes; only rank 0 prints and writes."""
    if launched() == 1:
        return
    if device.startswith("cuda:"):
        hint = "give --device cuda, and each process takes a GPU of its own"
        raise ModelError(f"--device {device} with several processes: {hint}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" now means
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    # as long as the slowest rank may keep the others waiting; torchrun ends all at once when one dies
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    if dist.get_rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def end_rank(status: int) -> None:
    """Exit; one of several processes at once, since gloo's threads sometimes abort it in the interpreter's teardown."""
    if launched() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shard(run: Run) -> None:
    """--shard: parameters, gradients and optimizer state are split over the ranks (FSDP2), gathered layer by layer.

    The last layer stays gathered through an update with the embeddings: a prompt's last output is never used, only its
    keys and values are, so no gradient would arrive there and call for the layer's weights in time.
    """
    model, device = run.policy.model, run.args.device
    empty = {id(p): torch.nn.Parameter(p.data.new_empty(0)) for p in model.parameters()}
    run.whole = replace(run.policy, model=copy.deepcopy(model, empty))
    run.whole.model.to(device)
    run.whole.device = run.policy.device = torch.device(device)
    mesh = dist.init_device_mesh(device, (ranks()[1],))
    for part in [*model.model.layers[:-1], model]:
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot average
        part.set_gradient_divide_factor(1.0)
    model.score = token_logprobs
    register_fsdp_forward_method(model, "score")
    run.policy.score = model.score


@contextlib.contextmanager
def gathered(run: Run, exact: bool = False) -> Iterator[Policy]:
    """The policy to sample from or to save: under --shard a whole copy that exists as long as it is in use.

    Matrices are held in the dtype that autocast would multiply them in, unless `exact`.
    """
    if not run.whole:
        yield run.policy
        return
    for name, p in run.policy.model.named_parameters():
        keep = exact or p.ndim != 2 or "embed" in name
        x = whole(p.detach()).to(p.dtype if keep else run.policy.dtype)
        run.whole.model.get_parameter(name).data = x
    yield run.whole
    for p in run.whole.model.parameters():
        p.data = p.data.new_empty(0)


def whole(x):
    """A sharded tensor put together (all ranks must call it); anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def for_rank_0(x):
    """A leaf of a state to save: whole and on the CPU for rank 0, dropped by the others as they come to it."""
    x = whole(x)
    if ranks()[0]:
        return None
    return x.cpu() if isinstance(x, torch.Tensor) else x


def split_like(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor sharded as parameter `p` is; scalars and what belongs to whole parameters stay as they are."""
    if not isinstance(p, DTensor) or x.shape != p.shape:
        return x
    where = (p.device_mesh, p.placements)
    return distribute_tensor(x.to(p.device), *where, src_data_rank=None)


def memory(args: argparse.Namespace, name: str, n: int, sharded: bool) -> dict:
    """GB that a known model needs on each of `n` GPUs with these flags, by part, and in eval.py on one GPU.

    Mining and eval.py sample one answer a prompt, as many at once as a rollout has rows.
    """
    config, new = qwen3_config(name), args.max_new_tokens
    prompts, rows = min(args.slots, -(-args.batch // n)), args.slots * args.group_size
    sampled = (prompts * args.group_size, prompts)
    if args.stage in ("all", "ppr"):
        sampled = (rows, rows)
    updated = (args.micro_tokens, args.lora_rank, args.grad_checkpoint)
    need = memory_need(config, n, sharded, *sampled, new, *updated)
    alone = memory_need(config, 1, True, rows, rows, new, 0)  # a whole copy
    larger = max(alone["weights"], alone["keys, values"])  # these once copied
    return need | {"evaluation": alone["bf16 copy"] + larger}


def say_memory(args: argparse.Namespace) -> None:
    """What a known model needs, and whether this GPU has it; before any download."""
    need = memory(args, args.model, launched(), args.shard)
    parts = ", ".join(f"{part} {x:.0f}" for part, x in need.items())
    print(f"memory per GPU at most, in GB: {parts}", flush=True)
    if args.device.startswith("cuda"):
        device = torch.device(args.device)
        has = torch.cuda.get_device_properties(device).total_memory / 1e9
        if has < max(need["peak"], need["evaluation"]):
            flags = "--grad-checkpoint, --lora-rank, --shard, fewer --slots"
            print(f"warning: this GPU has {has:.0f}; what takes less: {flags}")


# --------------------------------------------------------------------------------------------------------------- flags

PRESETS = ("tiny", "paper")
WIDTH, LAYERS = 256, 4
FLAGS = (  # name, type or choices, default (a pair: of the presets tiny and paper), help
    "what to run",
    ("dataset", str, "office", "office (bundled or prepared), office-sim, or a name"),
    ("data-dir", str, None, "folder with items.jsonl and interactions.csv"),
    ("stage", ("all", *STAGES), "all", "which stages to run"),
    ("preset", PRESETS, "tiny", "tiny: bundled agent; paper: Qwen3-4B"),
    ("model", str, ("assets/tiny-agent", "Qwen/Qwen3-4B-Instruct-2507"), "Hugging Face folder or hub id"),
    ("out", str, None, "run folder (default runs/DATASET-SEED)"),
    ("overwrite", bool, False, "replace an existing run folder"),
    ("resume", str, None, "continue this run folder; only --slots, --micro-tokens and --grad-checkpoint can change"),
    "training",
    ("steps", int, (24, None), "steps of stage 1"),
    ("epochs", float, (None, 3), "epochs of stage 1, if --steps is not given"),
    ("ppr-steps", int, (6, None), "steps of stage 2"),
    ("ppr-epochs", float, (None, 1), "epochs of stage 2, if --ppr-steps is not given"),
    ("warmup-steps", int, (0, 0), "steps of imitation before stage 1 (a new agent: 4500)"),
    ("exercise-steps", int, (0, 0), "how many of --warmup-steps are exercises only (a new agent: a sixth)"),
    ("ask-again", float, 0.0, "share of demonstrations that ask each of their tools again with a chance of 1/2"),
    ("warmup-lr", float, (3e-3, 1e-6), "learning rate of the warm-up"),
    ("width", int, WIDTH, "hidden size of a new agent, a multiple of 64"),
    ("layers", int, LAYERS, "layers of a new agent"),
    ("lr", float, (2e-4, 1e-6), "learning rate of stage 1; with --lora-rank paper: 1e-4"),
    ("ppr-lr", float, (5e-5, 1e-6), "learning rate of stage 2"),
    ("list-share", float, (0.5, 0.0), "share of rankings among stage 2's prompts"),
    ("batch", int, (12, 64), "prompts a step (warm-up of a new agent: 8)"),
    ("group-size", int, (8, 8), "trajectories a prompt, G (warm-up of a new agent: 5)"),
    ("temperature", float, (0.6, 0.6), "sampling temperature in training"),
    ("greedy-answer", bool, (True, False), "sample thoughts and calls, write the likeliest answer"),
    ("teach-form", bool, True, "greedy answers learn their form where some of a group are malformed"),
    ("max-new-tokens", int, (800, 6144), "longest trajectory in tokens, observations included"),
    ("mine-samples", int, (320, None), "training samples to mine hard pairs from"),
    ("title-chars", int, (30, 60), "titles are cut to this many characters"),
    ("k", int, 10, "length of the ranking, K, 10 in the paper; the bundled agent needs a warm-up for another"),
    ("bonus", float, BONUS, "extra reward for rank 1 after a tool call, 0.1 in the paper"),
    ("max-grad-norm", float, 1.0, "gradient clipping"),
    "variants (defaults: the paper's estimator)",
    ("baseline", ("mean", "loo"), "mean", "group baseline b of Eq. 6"),
    ("divide-by-std", bool, False, "common GRPO variant; breaks Proposition 1"),
    ("token-mean", bool, False, "mean over tokens instead of the sum"),
    ("keep-negative-groups", bool, False, "no dynamic sampling"),
    ("random-negatives", bool, False, "stage 2 on random instead of hard pairs"),
    ("ppr-pairs", ("all", "right", "wrong"), "all", "stage 2's hard pairs: all, or those that the tools' summed scores order rightly, or wrongly"),
    ("ppr-directions", tuple(DIRECTIONS), "both", "which questions stage 2 asks"),
    ("ppr-objective", ("grpo", "logistic"), "grpo", "stage 2 optimises the reward (grpo) or the bound of Prop. 2 (logistic)"),
    ("no-tools", bool, False, "train to reason without tools (row R)"),
    ("without-tool", ALL_TOOLS, [], "remove this tool; can be repeated"),
    ("profiles", ("template", "llm"), "template", "who writes the user profiles (llm: a chat model)"),
    "machine",
    ("seed", int, 0, "of training; samples and SASRec stay the same"),
    ("device", str, "auto", "cpu, cuda, ..."),
    ("dtype", ("auto", "float32", "bfloat16"), ("auto", "bfloat16"), "of computation; weights stay float32"),
    ("micro-tokens", int, (MICRO_TOKENS, 8192), "tokens held at once in an update"),
    ("lora-rank", int, 0, "train adapters of this rank only, not all weights"),
    ("grad-checkpoint", bool, False, "less memory in an update, a third more work"),
    ("slots", int, (16, 4), "prompts in flight during a rollout"),
    ("cuda-graphs", bool, False, "sample with CUDA graphs (not run on a GPU yet)"),
    ("shard", bool, False, "split the model over torchrun's ranks (FSDP2)"),
    ("memory", bool, False, "print the memory need per GPU and stop"),
    ("save-every", int, 10, "steps between resumable states"),
    ("test-samples", int, 500, "test samples of the final table"),
    ("no-eval", bool, False, "train only; eval.py RUN makes the table later"),
)  # fmt: skip
# of --preset paper with --lora-rank: its 1e-6 would change hardly any bf16 weight
ADAPTER_LR = 1e-4
MEMORY = ("slots", "micro_tokens", "grad_checkpoint")  # a resumed run may change these
POSITIVE = """title_chars lr ppr_lr warmup_lr max_grad_norm mine_samples batch temperature
    max_new_tokens micro_tokens slots save_every test_samples width layers"""
NOT_NEGATIVE = """steps epochs ppr_steps ppr_epochs warmup_steps exercise_steps seed bonus
    lora_rank"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; defaults come from the preset, `--resume` takes all but MEMORY from the run's config.json."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage="python train.py [--flag value ...]; all flags: python train.py --help",
        description=__doc__, formatter_class=form, allow_abbrev=False,
    )  # fmt: skip
    for flag in FLAGS:
        if isinstance(flag, str):
            group = parser.add_argument_group(flag)
        else:
            add_flag(group, *flag)
    args = parser.parse_args(argv)
    if args.resume:
        words = sys.argv[1:] if argv is None else argv
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        kept = {f"--{name.replace('_', '-')}" for name in ("resume", *MEMORY)}
        if given - kept:
            drop = f"drop {' '.join(sorted(given - kept))}"
            parser.error(f"--resume continues with the run's own flags; {drop}")
    else:
        fill_in(args)
    check_flags(parser, args)
    return args


def add_flag(group, name: str, kind, default, text: str) -> None:
    """One row of FLAGS as an argument; a default that depends on the preset is filled in later."""
    how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if default == []:
        how["action"] = "append"
    if isinstance(default, tuple):
        pairs = [f"{p}: {d}" for p, d in zip(PRESETS, default) if d is not None]
        default, text = None, f"{text} ({', '.join(pairs)})"
    elif default not in (None, []) and default is not False:
        text = f"{text} (default: {default})"
    group.add_argument(f"--{name}", default=default, help=text, **how)


def fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on the preset or on the machine."""
    if args.model is None and args.stage == "warmup" and args.preset == "tiny":
        args.model = "new"
    if args.model == "new" and args.stage == "warmup":
        unless_given(args, batch=8, group_size=5)
    if args.model == "new" and args.stage in ("warmup", "all"):
        unless_given(args, warmup_steps=4500)
        unless_given(args, exercise_steps=args.warmup_steps // 6)
    if args.lora_rank and args.preset == "paper":
        unless_given(args, lr=ADAPTER_LR, ppr_lr=ADAPTER_LR, warmup_lr=ADAPTER_LR)
    if not trained_tools(vars(args)):
        # else a group's trajectories would all be the same
        unless_given(args, greedy_answer=False)
    epochs = {"steps": args.epochs, "ppr_steps": args.ppr_epochs}  # if given, decide
    for name, _, default, _ in (flag for flag in FLAGS if not isinstance(flag, str)):
        name = name.replace("-", "_")
        if isinstance(default, tuple) and epochs.get(name) is None:
            unless_given(args, **{name: default[PRESETS.index(args.preset)]})
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if multiplies_bfloat16(args.device) else "float32"
    args.out = args.out or f"runs/{args.dataset}-{args.seed}"


def unless_given(args: argparse.Namespace, **defaults) -> None:
    """Set the flags that nobody has set yet."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware: newer CPUs, and GPUs from Ampere on, do."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.startswith("cpu") else {}
    return not able or bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse impossible values."""
    one = args.stage == "warmup"  # a group of one will do
    several = launched() > 1
    for names, possible, reason in (
        (POSITIVE, lambda x: 0 < x < math.inf, "must be positive"),
        (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "must not be negative"),
        ("group_size", lambda x: x > 1 or one and x == 1, "a group's mean needs at least 2 trajectories"),
        ("warmup_steps", lambda x: x or not one, "--stage warmup of this agent needs a number of steps"),
        ("exercise_steps", lambda x: x < max(1, args.warmup_steps), "must be below --warmup-steps"),
        ("warmup_steps", lambda x: not x or args.stage in ("all", "warmup"), f"--stage {args.stage} has no warm-up"),
        ("width", lambda x: x % 64 == 0, "must be a multiple of 64"),
        ("width", lambda x: x == WIDTH or args.model == "new", "is of new agents; this one has its own"),
        ("layers", lambda x: x == LAYERS or args.model == "new", "is of new agents; this one has its own"),
        ("k", lambda x: 1 <= x <= N_CANDIDATES, f"must be between 1 and the {N_CANDIDATES} candidates"),
        ("list_share", lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
        ("ask_again", lambda x: 0 <= x <= 1, "must be between 0 and 1"),
        ("shard", lambda x: several or not x, "needs several processes: start with torchrun"),
        ("cuda_graphs", lambda x: not x or args.device.startswith("cuda"), "needs a GPU"),
    ):  # fmt: skip
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not possible(value):
                parser.error(f"--{name.replace('_', '-')} {value}: {reason}")


# ---------------------------------------------------------------------------------------------------------- run folder


def open_run(args: argparse.Namespace) -> Run:
    """Load or build everything a run needs: folder, dataset, SASRec, policy."""
    out, (rank, n) = pathlib.Path(args.out), ranks()
    if rank == 0 and not args.resumed:
        check_folder(args, out)
    check_device(args.device)
    ds = load_dataset(args.dataset, args.data_dir)
    args.dataset = ds.name  # "office" may mean another one later
    print(ds.describe(), *ds.notes, sep="\n", flush=True)
    if args.preset == "paper" and args.model in QWEN3:
        say_memory(args)
    sharded = args.shard and n > 1
    where = "cpu" if sharded else args.device
    load = partial(load_policy, find_model(args.model, out), where, args.dtype)
    # a model that cannot be loaded must not cost what --overwrite deletes
    policy = None if args.model == "new" else load()
    if rank == 0:
        prepare(args, out, ds)
    over_ranks([0])  # the others wait for what rank 0 prepares
    ctx = load_context(out, ds, args.title_chars)
    policy = policy or load()
    policy.graphs = args.cuda_graphs
    if args.lora_rank:
        torch.manual_seed(args.seed)  # every rank makes the same adapters
        add_lora(policy, args.lora_rank)
    if args.grad_checkpoint:
        checkpoint_layers(policy)
    what = f"{policy.describe()}, {args.dtype} on {args.device}"
    print(f"agent {args.model}: {what}", flush=True)
    run = Run(args, out, ds, ctx, policy)
    if sharded:
        shard(run)
    return run


def check_folder(args: argparse.Namespace, out: pathlib.Path) -> None:
    """ModelError if a new run would replace files unasked, or delete anything but a run folder, or what it is about to read."""
    if not out.exists() or all(path.name == LOCK for path in out.iterdir()):
        return
    hint = "choose another --out"
    if not args.overwrite:
        hint = f"{hint}, continue it with --resume {out}, or --overwrite"
        raise ModelError(f"{out} exists; {hint}")
    try:
        read_config(out)
    except ModelError as e:
        why = "is no run folder: it is not overwritten"
        raise ModelError(f"{out} {why}; {hint}") from e
    for name in filter(None, (args.model, args.data_dir)):
        for path in (pathlib.Path(name), HERE / name):
            if path.resolve().is_relative_to(out.resolve()):
                raise ModelError(f"--overwrite would delete {name}; {hint}")


def prepare(args: argparse.Namespace, out: pathlib.Path, ds: Dataset) -> None:
    """The run folder: made or checked, with its tools' SASRec and, for `--model new`, the agent to start from."""
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    if not args.resumed:
        for path in out.iterdir():
            if path.name != LOCK:
                remove(path)
        write_config(args, out, ds)
    else:
        update_config(args, out, ds)
    path = out / "sasrec.safetensors"
    if not path.exists():
        model = train_sasrec(ds, ds.fit_end, progress="training sasrec")
        put(path, partial(save_file, model.state_dict()))
    start = out / "start"  # kept: its tokenizer must not change on resuming
    if args.model == "new" and not start.exists():
        ctx = load_context(out, ds, args.title_chars)
        texts = demonstration_texts(ctx, ds.splits["train"][:1500], args.k)
        agent = build_tiny_agent(texts, tiny_shape(args.width, args.layers))
        put(start, partial(save_policy, agent))


def update_config(args: argparse.Namespace, out: pathlib.Path, ds: Dataset) -> None:
    """A resumed run's config.json gets flags of MEMORY, or newer than the run; says what else is not as it was."""
    config, now = read_config(out), vars(args) | {"resumed": False}
    if config["fingerprint"] != ds.fingerprint():
        what = "the dataset has changed since this run started"
        raise DatasetError(f"{out}: {what}; restore it or start a new run")
    for name in sorted(now.keys() - config["args"].keys()):
        flag = f"--{name.replace('_', '-')}"
        print(f"note: the run was started without {flag}; now it is {now[name]}")
    for name, value in surroundings().items():
        if (was := config.get(name)) != value:
            print(f"note: {name} was {was} and is {value}: digits may differ")
    if now != config["args"]:
        put_json(out / "config.json", [config | {"args": now}], indent=1)


def lock(out: pathlib.Path) -> None:
    """Keep other processes out of the run folder until this one ends, however it ends; ModelError if one is in."""
    if fcntl is None:
        return
    held = os.open(out / LOCK, os.O_RDWR | os.O_CREAT)  # stays open
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        hint = "wait for it or choose another --out"
        raise ModelError(f"{out}: another run is writing there; {hint}") from e


def write_config(args: argparse.Namespace, out: pathlib.Path, ds: Dataset) -> None:
    """config.json: every flag, versions, commit and the dataset's fingerprint."""
    config = {"args": vars(args), "tools": trained_tools(vars(args))}
    seen = {"dataset": ds.describe(), "fingerprint": ds.fingerprint()}
    put_json(out / "config.json", [config | seen | surroundings()], indent=1)


def surroundings() -> dict:
    """What besides flags and data decides a run's digits."""
    git, commit = ["git", "-C", str(HERE)], ""
    git += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(git, check=False, capture_output=True, text=True).stdout
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    return {
        "versions": {"python": sys.version.split()[0]} | versions,
        "commit": commit.strip() or None,
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------------------------------------------------------- main


def evaluate(args: argparse.Namespace, *flags: str) -> None:
    """Run eval.py on the run folder (a process of its own: it only needs what is on disk)."""
    samples = str(args.test_samples)
    command = [sys.executable, str(HERE / "eval.py"), args.out, "--samples", samples]
    if not args.no_eval and subprocess.run([*command, *flags], check=False).returncode:
        hint = f"what was saved is intact, try: python eval.py {args.out}"
        raise ModelError(f"eval.py failed; {hint}")


def main() -> None:
    args = parse_args()
    args.resumed = bool(args.resume)
    if args.resumed:
        saved = read_config(pathlib.Path(args.resume))["args"]
        changed = {name: getattr(args, name) for name in MEMORY if getattr(args, name)}
        saved |= {"out": args.resume, "resumed": True} | changed
        defaults = parse_args(["--preset", saved.get("preset", "tiny")])
        args = argparse.Namespace(**vars(defaults) | saved)
    if args.memory:
        return print(memory_table(partial(memory, args)))
    join_ranks(args.device)
    run = open_run(args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(on_signal, run))
    if args.profiles == "llm" and args.stage != "warmup":
        write_profiles(run)
    rank, n = ranks()
    if args.resumed:
        with reading(run.out / "last"):
            restore_state(run)
    elif not (args.stage == "warmup" or args.warmup_steps or args.no_eval or n > 1):
        run.policy.model.to("cpu")  # a GPU's memory is eval.py's for now
        torch.cuda.empty_cache()
        evaluate(args, "--rows", "frozen")
        run.policy.model.to(run.policy.device)
    stages = [s for s in STAGES if args.stage in ("all", s)]
    idle = {"warmup": args.warmup_steps == 0, "ppr": args.ppr_steps == 0}
    stages = [s for s in stages if not idle.get(s)]
    for stage in stages[stages.index(run.stage) if run.stage else 0 :]:
        if run.stage != stage:
            run.stage, run.step, run.optimizers = stage, 0, []
        train_stage(run, stage)
    if n > 1:
        dist.destroy_process_group()
    if rank > 0:
        end_rank(0)
    if args.stage != "warmup":
        # the model's memory is eval.py's now
        run.policy = run.whole = run.optimizers = None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        evaluate(args)
    print(f"done: {run.out}; read trajectories with: python eval.py {run.out} --show 3")
    if n > 1:
        end_rank(0)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    again = "run the same command again (a new run: with --overwrite)"
    run_main(main, f"stopped while preparing; {again}", ModelError)
