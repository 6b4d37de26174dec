"""The driver: warm-up -> stage 1 (list-wise GRPO, "rta") -> stage 2 (Progressive Preference Refinement, "ppr").

    python train.py --dataset office                      # bundled tiny agent, both stages, test table; minutes on a CPU
    python train.py --dataset office --preset paper       # Qwen3-4B-Instruct-2507 with the paper's settings (GPU)
    python train.py --stage warmup --out runs/agent       # builds a tiny agent like assets/tiny-agent
    python train.py --resume runs/NAME                    # continues exactly where it stopped

All randomness is seeded from integers (seed, stage, step, sample), so resuming needs weights, optimizer and a counter.
A run folder holds config.json, metrics.jsonl, trajectories.jsonl, hard_pairs.jsonl, rta/, ppr/, last/, eval.json, report.html.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import Dataset, DatasetError, Sample, load_dataset
from grpo import (
    Objective,
    group_advantages,
    list_reward,
    policy_gradient,
    rollout_metrics,
)
from model import (
    ModelError,
    Policy,
    TrainRow,
    build_tiny_agent,
    config_line,
    load_policy,
    micro_batches,
    save_policy,
    token_logprobs,
)
from ppr import HardPair, mine, pair_reward, pair_tasks
from rollout import Task, demonstrate, rollout
from sasrec import load_sasrec, save_sasrec, train_sasrec
from tools import Context

HERE = pathlib.Path(__file__).parent
STAGES = {
    "all": ("warmup", "rta", "ppr"),
    "warmup": ("warmup",),
    "rta": ("rta",),
    "ppr": ("ppr",),
}
STAGE_SEED = {"warmup": 1, "rta": 2, "ppr": 3, "mine": 4}
PRESETS = {  # the one source of each setting; `paper` holds what PAPER.md reports
    "tiny": {
        "model": "assets/tiny-agent",
        "lr": 1.5e-4,
        "ppr_lr": 5e-5,
        "list_share": 0.5,
        "batch": 12,
        "group_size": 8,
        "steps": 40,
        "ppr_steps": 12,
        "mine_samples": 320,
        "temperature": 0.6,
        "max_new_tokens": 640,
        "warmup_steps": 0,
        "warmup_lr": 2e-3,
        "dtype": "auto",
        "micro_tokens": 16_384,
    },
    "paper": {
        "model": "Qwen/Qwen3-4B-Instruct-2507",
        "lr": 1e-6,
        "ppr_lr": 1e-6,
        "list_share": 0.0,
        "batch": 64,
        "group_size": 8,
        "epochs": 3,
        "ppr_epochs": 1,
        "temperature": 0.6,
        "max_new_tokens": 6144,
        "warmup_steps": 0,
        "warmup_lr": 1e-6,
        "dtype": "bfloat16",
        "micro_tokens": 32_768,
    },
}


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
    optimizer: torch.optim.Optimizer | None = None
    pairs: list[HardPair] = field(default_factory=list)
    skipped: int = 0  # updates in a row that were not finite
    stop: int = 0  # signal that asked to stop


# --------------------------------------------------------------------------------------------------------------- steps


def stage_tasks(run: Run, stage: str, step: int) -> list[Task]:
    """The prompts of one step, reshuffled every epoch: samples (rta), or hard pairs in both directions (ppr).

    A share of stage 2's prompts (--list-share) asks for the ranking of the pairs' samples again; without them the
    tiny agent forgets within a dozen steps how to answer a ranking.
    """
    args = run.args
    pool = run.pairs if stage == "ppr" else run.ds.splits["train"]
    n_pairs = max(1, round(args.batch * (1 - args.list_share) / 2))
    n_lists = args.batch if stage == "rta" else max(0, args.batch - 2 * n_pairs)
    size = min(len(pool), n_lists if stage == "rta" else n_pairs + n_lists)
    epoch, at = divmod(step, max(1, len(pool) // size))
    seed = [args.seed, STAGE_SEED[stage], epoch]
    order = np.random.default_rng(seed).permutation(len(pool))
    chosen = [pool[i] for i in order[at * size : (at + 1) * size]]
    if stage == "rta":
        return [Task(sample) for sample in chosen]
    samples = {s.id: s for s in run.ds.splits["train"]}
    rng = np.random.default_rng([*seed, step])
    lists = [Task(samples[pair.sample]) for pair in chosen[n_pairs:]]
    return pair_tasks(chosen[:n_pairs], samples, rng) + lists


def grpo_step(run: Run, stage: str, step: int) -> tuple[dict, list]:
    """One rollout and one update; returns its metrics and the groups."""
    args = run.args
    began = time.perf_counter()
    seed = (args.seed, STAGE_SEED[stage], step)
    groups = rollout(
        run.policy,
        run.ctx,
        stage_tasks(run, stage, step),
        seed=seed,
        k=args.k,
        slots=args.slots,
        group_size=args.group_size,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
    )
    for t in (t for group in groups for t in group):
        t.reward = pair_reward(t) if t.task.pair else list_reward(t, args.k, args.bonus)
    rolled = time.perf_counter()
    metrics = {"stage": stage, "step": step + 1} | rollout_metrics(groups)
    objective = Objective(
        args.baseline,
        args.divide_by_std,
        args.token_mean,
        not args.keep_negative_groups,
    )
    metrics |= policy_gradient(
        run.policy, groups, objective, args.temperature, args.micro_tokens
    )
    lr = args.ppr_lr if stage == "ppr" else args.lr
    metrics |= update(run, lr * min(1.0, (step + 1) / 5))
    metrics |= {
        "seconds_rollout": rolled - began,
        "seconds_update": time.perf_counter() - rolled,
    }
    return metrics, groups


def update(run: Run, lr: float) -> dict:
    """Clip the accumulated gradient and step; a gradient that is not finite skips the update and is counted."""
    parameters = [p for p in run.policy.model.parameters() if p.grad is not None]
    norm = (
        float(torch.nn.utils.clip_grad_norm_(parameters, run.args.max_grad_norm))
        if parameters
        else 0.0
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if not math.isfinite(norm):
        run.skipped += 1
    else:
        run.skipped = 0
        if norm > 0:
            run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "grad_norm": norm if math.isfinite(norm) else None,
        "lr": lr,
        "skipped": run.skipped,
    }


def warmup_step(run: Run, step: int) -> tuple[dict, list]:
    """One step of imitation of scripted demonstrations: mean cross-entropy over their action tokens.

    Curriculum: one call at first (copying), then up to two and up to four (adding up).
    """
    args, policy, began = run.args, run.policy, time.perf_counter()
    rng = np.random.default_rng([args.seed, STAGE_SEED["warmup"], step])
    pool = run.ds.splits["fit"] + run.ds.splits["train"]
    progress = step / args.warmup_steps
    max_calls = 1 if progress < 0.05 else 2 if progress < 0.2 else 4
    prompts, rows = [], []
    for _ in range(args.batch):
        sample = pool[rng.integers(len(pool))]
        pair = None
        if rng.random() < 0.2:
            pair = tuple(
                int(n) for n in rng.permutation(len(sample.candidates))[:2] + 1
            )
        task = Task(sample, pair, bool(rng.random() < 0.5))
        for _ in range(args.group_size):
            t = demonstrate(policy, run.ctx, task, args.k, rng, max_calls)
            if not prompts or t.prompt != prompts[-1]:
                prompts.append(t.prompt)
            rows.append(TrainRow(len(prompts) - 1, t.ids, t.action_mask))
    n_actions, total, answers = sum(sum(r.action_mask) for r in rows), 0.0, []
    for part_prompts, part_rows in micro_batches(prompts, rows, args.micro_tokens):
        logprobs, _ = token_logprobs(policy, part_prompts, part_rows)
        (-logprobs.sum() / n_actions).backward()
        total -= float(logprobs.detach().sum())
        for nll in (-logprobs.detach()).split([sum(r.action_mask) for r in part_rows]):
            answers.append(float(nll[-2 * args.k - 2 :].sum()) / args.k)
    lr = args.warmup_lr * min(1.0, (step + 1) / 50, max(0.02, 1.5 * (1 - progress)))
    metrics = {"stage": "warmup", "step": step + 1, "loss": total / n_actions}
    metrics |= {"answer_loss": float(np.mean(answers))} | update(run, lr)
    metrics["tokens"] = sum(len(r.ids) for r in rows)
    return metrics | {"seconds_update": time.perf_counter() - began}, []


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices and AdamW for the rest behind one interface; used by the warm-up only."""

    def __init__(self, model: torch.nn.Module, lr: float):
        matrices = [
            p
            for n, p in model.named_parameters()
            if p.ndim == 2 and "embed" not in n and "lm_head" not in n
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        muon = torch.optim.Muon(
            matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self.parts = [
            muon,
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__(model.parameters(), {})
        self.param_groups = [g for part in self.parts for g in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)
        self.param_groups = [g for part in self.parts for g in part.param_groups]


# -------------------------------------------------------------------------------------------------------------- stages


def mine_pairs(run: Run) -> None:
    """Stage 2's data: roll the stage-1 policy out once over training samples and keep its violations (Eq. 3)."""
    path, args = run.out / "hard_pairs.jsonl", run.args
    pool = run.ds.splits["train"]
    chosen = np.random.default_rng([args.seed, STAGE_SEED["mine"]]).permutation(
        len(pool)
    )[: args.mine_samples]
    with tqdm(total=len(chosen), desc="mining hard pairs", unit="sample") as bar:
        groups = rollout(
            run.policy, run.ctx, [Task(pool[i]) for i in chosen], group_size=1, k=args.k, temperature=args.temperature,
            max_new_tokens=args.max_new_tokens, seed=(args.seed, STAGE_SEED["mine"]), slots=8 * args.slots,
            progress=lambda group: bar.update(),
        )  # fmt: skip
    run.pairs = mine(
        [g[0] for g in groups],
        (args.seed, STAGE_SEED["mine"], 1),
        args.random_negatives,
    )
    if not run.pairs:
        raise ModelError(
            "no hard pairs: the policy ranked every positive first, or no answer was valid"
        )
    path.write_text("".join(json.dumps(p.to_json()) + "\n" for p in run.pairs))
    tqdm.write(f"mined {len(run.pairs)} hard pairs from {len(chosen)} training samples")


def stage_steps(run: Run, stage: str) -> int:
    """How many steps a stage takes: --steps, or the preset's steps or epochs."""
    args = run.args
    if stage == "warmup":
        return args.warmup_steps
    if stage == "ppr":
        epoch = max(1, round(len(run.pairs) / (args.batch * (1 - args.list_share) / 2)))
        return (
            args.ppr_steps
            if args.ppr_steps is not None
            else math.ceil(args.ppr_epochs * epoch)
        )
    epoch = max(1, len(run.ds.splits["train"]) // args.batch)
    return args.steps if args.steps is not None else math.ceil(args.epochs * epoch)


def train_stage(run: Run, stage: str) -> None:
    """Run one stage from where it stands to its end, logging, checkpointing and stopping on request."""
    if stage == "ppr":
        if not (run.out / "hard_pairs.jsonl").exists():
            mine_pairs(run)
        lines = (run.out / "hard_pairs.jsonl").read_text().splitlines()
        run.pairs = [HardPair(**json.loads(line)) for line in lines]
    steps = stage_steps(run, stage)
    if run.optimizer is None:
        run.optimizer = make_optimizer(run, stage)
    title = {"warmup": "warm-up", "rta": "stage 1 rta", "ppr": "stage 2 ppr"}[stage]
    with tqdm(total=steps, initial=run.step, desc=title, unit="step") as bar:
        while run.step < steps:
            metrics, groups = (
                warmup_step(run, run.step)
                if stage == "warmup"
                else grpo_step(run, stage, run.step)
            )
            run.step += 1
            log_step(run, metrics, groups)
            bar.set_postfix_str(postfix(metrics))
            bar.update()
            if run.skipped >= 3:
                save_state(run)
                raise ModelError(
                    f"3 updates in a row were not finite; state saved: lower --lr and --resume {run.out}"
                )
            if run.stop or run.step % run.args.save_every == 0:
                save_state(run)
            if run.stop:
                bar.close()
                print(
                    f"\nstopped after step {run.step} of {stage}; continue with: python train.py --resume {run.out}"
                )
                sys.exit(128 + run.stop)
    save_policy(run.policy, run.out / stage)


def make_optimizer(run: Run, stage: str) -> torch.optim.Optimizer:
    """A fresh optimizer for each stage."""
    if stage == "warmup":
        return MuonAdamW(run.policy.model, run.args.warmup_lr)
    return torch.optim.AdamW(
        run.policy.model.parameters(), run.args.lr, betas=(0.9, 0.95), weight_decay=0.0
    )


def postfix(m: dict) -> str:
    """The progress bar's figures."""
    if "valid" not in m:
        return f"loss {m['loss']:.3f}"
    return f"reward {m['reward_mean']:.3f} valid {m['valid']:.0%} calls {m['tool_calls']:.1f}"


def log_step(run: Run, metrics: dict, groups: list) -> None:
    """Append the step's metrics and its first group's best and worst trajectory."""
    with open(run.out / "metrics.jsonl", "a") as f:
        f.write(
            json.dumps(
                {
                    k: round(v, 6) if isinstance(v, float) else v
                    for k, v in metrics.items()
                }
            )
            + "\n"
        )
    if metrics.get("cut", 0) > 0.3:
        tqdm.write(
            f"warning: {metrics['cut']:.0%} of answers were cut by --max-new-tokens {run.args.max_new_tokens}"
        )
    if (
        run.policy.dtype == torch.float32
        and metrics.get("kl_sampler_trainer", 0) > 1e-4
    ):
        tqdm.write(
            f"warning: sampler and trainer disagree, KL {metrics['kl_sampler_trainer']:.1e}"
        )
    if groups and metrics["zero_variance_groups"] == len(groups):
        tqdm.write("all groups have equal rewards: no update in this step")
    for group in groups[:1]:
        advantages = group_advantages(
            np.array([[t.reward for t in group]]),
            run.args.baseline,
            run.args.divide_by_std,
        )
        with open(run.out / "trajectories.jsonl", "a") as f:
            f.writelines(
                json.dumps(trajectory_json(run, group[g], metrics, advantages[0][g]))
                + "\n"
                for g in {int(advantages[0].argmax()), int(advantages[0].argmin())}
            )


def trajectory_json(run: Run, t, metrics: dict, advantage: float) -> dict:
    """One trajectory to read: prompt and text, what was right, reward and advantage."""
    return {
        "stage": metrics["stage"], "step": metrics["step"], "sample": t.task.sample.id, "pair": t.task.pair,
        "more": t.task.more, "positive": t.task.sample.target + 1, "answer": t.answer, "end": t.end,
        "reward": round(t.reward, 4), "advantage": round(float(advantage), 4),
        "prompt": run.policy.decode(t.prompt), "text": run.policy.decode(t.ids),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ checkpoint and resume


def save_state(run: Run) -> None:
    """Write last/ beside the old one and swap it in, so that a kill at any moment leaves a complete state."""
    new, old, last = run.out / "last.new", run.out / "last.old", run.out / "last"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    model = {
        k: v
        for k, v in run.policy.model.state_dict().items()
        if k != "lm_head.weight" or not tied(run.policy)
    }
    save_file(model, new / "model.safetensors")
    torch.save(
        run.optimizer.state_dict() if run.optimizer else None, new / "optimizer.pt"
    )
    lines = {
        n: count_lines(run.out / n) for n in ("metrics.jsonl", "trajectories.jsonl")
    }
    (new / "state.json").write_text(
        json.dumps(
            {"stage": run.stage, "step": run.step, "skipped": run.skipped, **lines}
        )
    )
    shutil.rmtree(old, ignore_errors=True)
    if last.exists():
        last.rename(old)
    new.rename(last)
    shutil.rmtree(old, ignore_errors=True)


def tied(policy: Policy) -> bool:
    return bool(policy.model.config.tie_word_embeddings)


def count_lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def restore_state(run: Run) -> None:
    """Put weights, optimizer and counters back and cut the logs to the saved step."""
    folder = next(
        (
            p
            for p in (run.out / "last", run.out / "last.old")
            if (p / "state.json").exists()
        ),
        None,
    )
    if folder is None:
        return
    state = json.loads((folder / "state.json").read_text())
    run.stage, run.step, run.skipped = state["stage"], state["step"], state["skipped"]
    run.policy.model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    saved = torch.load(
        folder / "optimizer.pt", weights_only=True, map_location=run.policy.device
    )
    if saved is not None:
        run.optimizer = make_optimizer(run, run.stage)
        run.optimizer.load_state_dict(saved)
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        if (run.out / name).exists():
            lines = (
                (run.out / name).read_text().splitlines(keepends=True)[: state[name]]
            )
            (run.out / name).write_text("".join(lines))


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; defaults come from the preset, `--resume` takes all of them from the run's config.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--dataset",
        default="office",
        help="office (bundled simulation), office-sim, or a folder's name",
    )
    what.add_argument("--data-dir", help="folder with items.jsonl and interactions.csv")
    what.add_argument(
        "--stage", choices=STAGES, default="all", help="which stages to run"
    )
    what.add_argument(
        "--preset",
        choices=PRESETS,
        default="tiny",
        help="tiny: bundled agent; paper: Qwen3-4B",
    )
    what.add_argument(
        "--model", help="Hugging Face folder or hub id (default: the preset's)"
    )
    what.add_argument("--out", help="run folder (default runs/DATASET-SEED)")
    what.add_argument(
        "--overwrite", action="store_true", help="replace an existing run folder"
    )
    what.add_argument(
        "--resume", metavar="RUN", help="continue this run folder with its own flags"
    )
    how = parser.add_argument_group("training (default: the preset's)")
    how.add_argument("--steps", type=int, help="steps of stage 1")
    how.add_argument("--ppr-steps", type=int, help="steps of stage 2")
    how.add_argument(
        "--warmup-steps", type=int, help="steps of imitation before stage 1"
    )
    how.add_argument("--warmup-lr", type=float, help="learning rate of the warm-up")
    how.add_argument("--lr", type=float, help="learning rate (paper: 1e-6)")
    how.add_argument(
        "--ppr-lr", type=float, help="learning rate of stage 2 (paper: 1e-6)"
    )
    how.add_argument(
        "--list-share", type=float, help="share of rankings among stage 2's prompts"
    )
    how.add_argument("--batch", type=int, help="prompts a step (paper: 64)")
    how.add_argument(
        "--group-size", type=int, help="trajectories a prompt, G (paper: 8)"
    )
    how.add_argument("--temperature", type=float, help="of sampling (paper: 0.6)")
    how.add_argument(
        "--max-new-tokens",
        type=int,
        help="of a whole trajectory, observations included (paper: 6144)",
    )
    how.add_argument(
        "--mine-samples", type=int, help="training samples to mine hard pairs from"
    )
    how.add_argument(
        "--k", type=int, default=10, help="length of the ranking, K (paper: 10)"
    )
    how.add_argument(
        "--bonus",
        type=float,
        default=0.1,
        help="reward for rank 1 with a tool (paper: 0.1)",
    )
    how.add_argument(
        "--max-grad-norm", type=float, default=1.0, help="gradient clipping"
    )
    variants = parser.add_argument_group("variants (defaults: the paper's estimator)")
    variants.add_argument(
        "--baseline",
        choices=["mean", "loo"],
        default="mean",
        help="group baseline b of Eq. 6",
    )
    variants.add_argument(
        "--divide-by-std",
        action="store_true",
        help="common GRPO variant; breaks Proposition 1",
    )
    variants.add_argument(
        "--token-mean", action="store_true", help="mean over tokens instead of the sum"
    )
    variants.add_argument(
        "--keep-negative-groups", action="store_true", help="no dynamic sampling"
    )
    variants.add_argument(
        "--random-negatives",
        action="store_true",
        help="stage 2 on random instead of hard pairs",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--seed", type=int, default=0)
    machine.add_argument("--device", default="auto", help="cpu, cuda, ...")
    machine.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        help="of the computation; weights stay float32",
    )
    machine.add_argument(
        "--micro-tokens", type=int, help="tokens held at once in an update"
    )
    machine.add_argument(
        "--slots", type=int, default=16, help="prompts in flight during a rollout"
    )
    machine.add_argument(
        "--save-every", type=int, default=10, help="steps between resumable states"
    )
    machine.add_argument(
        "--test-samples", type=int, default=500, help="test samples of the final table"
    )
    machine.add_argument(
        "--no-eval",
        action="store_true",
        help="train only; eval.py RUN makes the table later",
    )
    args = parser.parse_args(argv)
    if not args.resume:
        check_flags(parser, args)
    return args


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the preset and refuse impossible values."""
    if args.model is None and args.stage == "warmup" and args.preset == "tiny":
        args.model, args.warmup_steps = "new", args.warmup_steps or 1500
    for name, value in (
        {"epochs": None, "ppr_epochs": None, "steps": None, "ppr_steps": None}
        | PRESETS[args.preset]
    ).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if has_bfloat16(args.device) else "float32"
    args.out = args.out or f"runs/{args.dataset}-{args.seed}"
    if args.group_size < 2 and args.stage != "warmup":
        parser.error(
            f"--group-size {args.group_size}: a group's mean needs at least 2 trajectories"
        )
    if not 1 <= args.k <= 20:
        parser.error(f"--k {args.k}: must be between 1 and the 20 candidates")
    if not 0 <= args.list_share < 1:
        parser.error(f"--list-share {args.list_share}: must be at least 0 and below 1")
    for name in (
        "lr",
        "batch",
        "temperature",
        "max_new_tokens",
        "micro_tokens",
        "slots",
        "save_every",
        "test_samples",
    ):
        if not getattr(args, name) > 0:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be positive"
            )


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (a CPU tells in /proc/cpuinfo)."""
    if device != "cpu":
        return True
    flags = pathlib.Path("/proc/cpuinfo")
    return flags.exists() and bool(
        {"avx512_bf16", "amx_bf16"} & set(flags.read_text().split())
    )


def open_run(args: argparse.Namespace) -> Run:
    """Load or build everything a run needs: folder, dataset, SASRec, policy."""
    out = pathlib.Path(args.out)
    used = out.exists() and any(out.iterdir())
    if used and not args.resumed and not args.overwrite:
        raise ModelError(
            f"{out} exists; choose another --out, continue it with --resume {out}, or --overwrite"
        )
    ds = load_dataset(args.dataset, args.data_dir)
    print(ds.describe(), *ds.notes, sep="\n", flush=True)
    if not args.resumed:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        write_config(args, out, ds)
    elif (
        json.loads((out / "config.json").read_text())["fingerprint"] != ds.fingerprint()
    ):
        raise DatasetError(
            f"{out}: the dataset has changed since this run started; restore it or start a new run"
        )
    fitted = {"sasrec": ds.fit_end, "sasrec_baseline": ds.train_end}
    for name, end in fitted.items():
        if not (out / f"{name}.safetensors").exists():
            model = train_sasrec(ds, end, progress=f"training {name}")
            save_sasrec(model, out / f"{name}.safetensors")
    ctx = Context(ds, load_sasrec(out / "sasrec.safetensors", len(ds.items)))
    if (
        args.model == "new"
    ):  # kept, since its tokenizer must not change when the run is resumed
        fresh = build_tiny_agent(
            demonstration_texts(ctx, ds.splits["train"][:1500], args.k)
        )
        save_policy(fresh, out / "start")
        args.model = str(out / "start")
        write_config(args, out, ds)
    path = HERE / args.model if (HERE / args.model).is_dir() else args.model
    policy = load_policy(str(path), args.device, args.dtype)
    print(
        f"agent {args.model}: {config_line(policy)}, {args.dtype} on {args.device}",
        flush=True,
    )
    return Run(args, out, ds, ctx, policy)


class TextCollector:
    """Stands in for a Policy in `demonstrate` to gather the texts that the tiny agent's tokenizer is trained on."""

    def __init__(self):
        self.texts: list[str] = []
        self.tokenizer = self

    def apply_chat_template(self, messages, **_) -> str:
        return messages[-1]["content"]

    def defuse(self, text: str) -> str:
        return text

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return []


def demonstration_texts(ctx: Context, samples: list[Sample], k: int) -> list[str]:
    """Prompts, actions and observations of one demonstration a sample, every fourth about a pair."""
    collector, rng = TextCollector(), np.random.default_rng(0)
    for i, sample in enumerate(samples):
        task = Task(sample, (3, 5) if i % 4 == 0 else None, i % 8 == 0)
        demonstrate(collector, ctx, task, k, rng, max_calls=6)
    return collector.texts


def write_config(args: argparse.Namespace, out: pathlib.Path, ds: Dataset) -> None:
    """config.json: every flag, versions, commit and the dataset's fingerprint."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        check=False,
        cwd=HERE,
        capture_output=True,
        text=True,
    ).stdout.strip()
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    config = {
        "args": vars(args),
        "versions": versions | {"numpy": np.__version__},
        "commit": commit or None,
    }
    config |= {
        "dataset": ds.describe(),
        "fingerprint": ds.fingerprint(),
        "threads": torch.get_num_threads(),
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))


def evaluate(args: argparse.Namespace, *flags: str) -> None:
    """Run eval.py on the run folder (a process of its own: it only needs what is on disk)."""
    if not args.no_eval:
        command = [
            sys.executable,
            str(HERE / "eval.py"),
            args.out,
            "--samples",
            str(args.test_samples),
            *flags,
        ]
        if subprocess.run(command, check=False).returncode:
            raise ModelError(
                f"eval.py failed; the training is saved: python eval.py {args.out}"
            )


def main() -> None:
    args = parse_args()
    if args.resume:
        config = pathlib.Path(args.resume) / "config.json"
        if not config.exists():
            raise ModelError(
                f"{args.resume}: no config.json; --resume takes a run folder that train.py made"
            )
        args = argparse.Namespace(
            **json.loads(config.read_text())["args"]
            | {"out": args.resume, "resumed": True}
        )
    else:
        args.resumed = False
    run = open_run(args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: setattr(run, "stop", received))
    if args.resumed:
        restore_state(run)
    elif args.stage != "warmup":
        evaluate(args, "--rows", "frozen")
    stages = [s for s in STAGES[args.stage] if s != "warmup" or args.warmup_steps]
    for stage in stages[stages.index(run.stage) if run.stage else 0 :]:
        if run.stage != stage:
            run.stage, run.step, run.optimizer = stage, 0, None
        train_stage(run, stage)
    if args.stage != "warmup":
        evaluate(args)
    print(f"done: {run.out}; read trajectories with: python eval.py {run.out} --show 3")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except (DatasetError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
