"""A real chat model through the whole engine, one line a check: python tests/real_llm.py FOLDER [flags of train.py]

Run by hand: SmolLM2-135M takes some minutes of one CPU core. One tool and K = 3 keep it small; `--dataset NAME --data-dir DIR`,
`--warmup-steps`, `--steps`, `--lora-rank` and so on are train.py's. The exit code is 1 if a check fails.
"""

import pathlib
import sys
import tempfile
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import rollout as agent
import train
from data import load_dataset
from grpo import list_reward, rollout_metrics
from model import TrainRow, add_lora, load_policy, save_policy
from sasrec import train_sasrec
from tools import Context, load_context

TOOLS = ("get_user_profile",)
FLAGS = """--dataset office-sim --k 3 --batch 1 --group-size 6 --slots 4 --max-new-tokens 160 --temperature 1 --warmup-steps 24
    --steps 8 --lora-rank 16 --warmup-lr 5e-3 --lr 5e-4 --test-samples 2"""
FAILED = []


def told(passed: bool, what: str) -> None:
    print("PASS" if passed else "FAIL", what, flush=True)
    FAILED.extend([what] * (not passed))


def make_run(folder: str, flags: list[str]) -> train.Run:
    """A run as train.py holds it, with one tool."""
    args = train.parse_args([*FLAGS.split(), *flags])
    args.without_tool = [name for name in agent.ALL_TOOLS if name not in TOOLS]
    ds = load_dataset(args.dataset, args.data_dir)
    ctx = Context(ds, train_sasrec(ds, ds.fit_end, epochs=3))
    policy = load_policy(folder, args.device, args.dtype)
    print(f"{ds.describe()}\n{folder}: {policy.describe()}, {args.dtype}, EOS {policy.eos}")  # fmt: skip
    if args.lora_rank:
        add_lora(policy, args.lora_rank)
    return train.Run(args, pathlib.Path(tempfile.mkdtemp()), ds, ctx, policy)


def sampled(run: train.Run) -> str:
    """Valid answers and reward of 8 trajectories of each of 2 test samples."""
    tasks = [agent.Task(s) for s in run.ds.splits["test"][:2]]
    groups = train.sample_groups(run, tasks, (7,), 2, 8)
    for t in (t for group in groups for t in group):
        t.reward = list_reward(t, run.args.k)
    m = rollout_metrics(groups)
    return f"valid {m['valid']:.0%}, calls {m['tool_calls']:.1f}, reward {m['reward_mean']:.3f}"  # fmt: skip


def check_prompt(run: train.Run) -> None:
    task = agent.Task(run.ds.splits["test"][0])
    ids = agent.build_prompt(run.policy, run.ctx, task, TOOLS, run.args.k)
    text = run.policy.decode(ids)
    once = text.count("Rank.") == text.count("get_user_profile") == 1
    told(once, f"prompt: {len(ids)} tokens, {text[:20]!r} to {text[-30:]!r}")


def check_logprobs(run: train.Run) -> None:
    """Tokens score the same when they are sampled and when they are taught."""
    tasks = [agent.Task(s) for s in run.ds.splits["test"][:2]]
    how = {"group_size": 2, "max_new_tokens": 50, "tools": TOOLS}
    groups = agent.rollout(run.policy, run.ctx, tasks, **how)
    rows = [TrainRow(p, t.ids, t.action_mask) for p, g in enumerate(groups) for t in g]
    everyone = [t for group in groups for t in group]
    old = [x for t in everyone for x, m in zip(t.logprobs, t.action_mask) if m]
    with torch.no_grad():
        new, _ = train.token_logprobs(run.policy, [g[0].prompt for g in groups], rows)
    gap = new.float().cpu() - torch.tensor(old)
    kl = float((gap.exp() - 1 - gap).mean())
    limit = 1e-6 if run.policy.dtype == torch.float32 else 1e-2
    told(kl < limit, f"sampling and teacher forcing: KL {kl:.1e}, largest gap {gap.abs().max():.1e}, {len(gap)} tokens")  # fmt: skip


def check_profiles(run: train.Run) -> None:
    run.args.stage = "warmup"  # only for the test samples
    train.write_profiles(run)
    kept = load_context(run.out, run.ds, run.args.title_chars).profiles
    written = list(kept.values())[-2:]
    told(all(written), f"profiles: {written}")


def check_learning(run: train.Run, stage: str, steps: int, figure: str) -> None:
    """The mean of the last quarter of the steps is better than that of the first: a lower loss, a higher reward."""
    values, before, began = [], sampled(run), time.process_time()
    run.optimizers = train.make_optimizers(run, stage)
    for step in range(steps):
        if stage == "warmup":
            metrics, _ = train.warmup_step(run, step)
        else:
            metrics, _ = train.grpo_step(run, stage, step)
        values.append(round(metrics[figure], 3))
        print(f"{stage} {step + 1} {figure} {values[-1]}", flush=True)
    seconds, n = time.process_time() - began, max(1, steps // 4)
    change = sum(values[-n:]) / n - sum(values[:n]) / n
    better = change < 0 if stage == "warmup" else change > 0
    told(better, f"{stage}: {figure} {values}, change {change:.3f}, {seconds / steps:.1f} CPU s a step; {before} -> {sampled(run)}")  # fmt: skip


def check_reload(run: train.Run) -> None:
    """Greedy text up to the first observation: ours before saving, generate's after loading, in fp32."""
    run.policy.dtype = torch.float32
    tasks = [agent.Task(s) for s in run.ds.splits["test"][:3]]
    how = {"group_size": 1, "temperature": 0, "max_new_tokens": 40, "tools": TOOLS}
    groups = agent.rollout(run.policy, run.ctx, tasks, **how)
    save_policy(run.policy, run.out / "saved")
    loaded = train.transformers.AutoModelForCausalLM.from_pretrained(run.out / "saved")
    tokenizer = train.transformers.AutoTokenizer.from_pretrained(run.out / "saved")
    same = []
    for (t,) in groups:
        n = [*t.action_mask, 0].index(0)
        out = loaded.generate(torch.tensor([t.prompt]), max_new_tokens=n, do_sample=False)  # fmt: skip
        text = tokenizer.decode(out[0, len(t.prompt) :])
        same.append(text == run.policy.decode(t.ids[:n]))
    told(all(same), f"saved and reloaded: {sum(same)} of {len(same)} greedy texts equal generate's, {text!r}")  # fmt: skip


if __name__ == "__main__":
    run = make_run(sys.argv[1], sys.argv[2:])
    check_prompt(run)
    check_logprobs(run)
    check_profiles(run)
    check_learning(run, "warmup", run.args.warmup_steps, "loss")
    check_learning(run, "rta", run.args.steps, "reward_mean")
    check_reload(run)
    sys.exit(bool(FAILED))
