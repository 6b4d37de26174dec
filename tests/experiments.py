"""The variants of the README's experiments: train what is missing, then print each against the default, paired.

    python tests/experiments.py --run default 'no bonus' 'G 16'       # three seeds each, two runs at a time
    python tests/experiments.py                                      # the table of what is there, nothing is trained
    python tests/experiments.py --into experiments                   # puts it between its marks in README.md
    python tests/experiments.py --with=--no-teach-form               # the same, all runs with these flags

Run by hand (a run takes 5 to 10 minutes of one core). What each run's agent did with every test sample is kept in
experiments.json beside this script, so that the table can be printed, and added to, where the run folders are gone. Each
variant changes one thing of its `reference`: those of STAGE_1 train stage 1 alone, those of STAGE_2 start from the
default run's stage 1. A difference is taken for each test sample with the same seed's reference, averaged over the seeds;
its 95% interval resamples users, its standard error over the seeds stands behind "±". --dataset, --model and --with ask
the same of other data, another agent or other flags.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEPT = pathlib.Path(__file__).with_suffix(".json")
sys.path.insert(0, str(ROOT))
from readme_table import put_into_readme

from data import load_dataset, read_jsonl
from eval import intervals, metric, task_key
from rollout import ALL_TOOLS, Task

STAGE_1 = {
    "default": "",
    # what is left to learn is whether to read the titles: the answers need not be sampled
    "no tools": "--no-tools --greedy-answer",
    "G 2": "--group-size 2 --batch 48",
    "G 4": "--group-size 4 --batch 24",
    "G 16": "--group-size 16 --batch 6",
    "P 6": "--batch 6",
    "leave-one-out": "--baseline loo",
    "divided by std": "--divide-by-std",
    "mean over tokens": "--token-mean",
    "no bonus": "--bonus 0",
    "negative groups kept": "--keep-negative-groups",
    "answers sampled": "--no-greedy-answer",
    "form not taught": "--no-teach-form",
} | {f"no {name}": f"--without-tool {name}" for name in ALL_TOOLS}
# agents of other sizes; make them first, as the bundled one was: train.py --stage warmup --dataset office-sim
# --width 64 --batch 8 --group-size 5 --out runs/size-64
STAGE_1 |= {f"width {n}": f"--model {{runs}}/size-{n}/warmup" for n in (64, 128, 192)}
LENGTH = "--steps 50 --ppr-steps 12"  # all rows' unless they say so: train.py's default is shorter since 2026-11-29
LONGER = "--ppr-steps 24 --ppr-lr 1e-4"  # twice as long, at twice the rate: differences are easier to see
STAGE_2 = {
    "stage 2": "",
    # as many trajectories (96 x 15) as stage 2's mining and steps take (320 + 96 x 12), at its learning rate
    "as much of stage 1": "--stage rta --steps 15 --lr 5e-5",
    "longer stage 2": LONGER,
    "random negatives": f"{LONGER} --random-negatives",
    "asked for more only": f"{LONGER} --ppr-directions more",
    "asked for less only": f"{LONGER} --ppr-directions less",
    "bound as a loss": f"{LONGER} --ppr-objective logistic",
    "pairs only": f"{LONGER} --list-share 0",
    "pairs tools get right": f"{LONGER} --ppr-pairs right",
    "pairs tools get wrong": f"{LONGER} --ppr-pairs wrong",
    "stage 2 with sampled answers": f"{LONGER} --no-greedy-answer",
    # the same for the longer stage 2 (96 x 27; 320 + 96 x 24)
    "more of stage 1": "--stage rta --steps 27 --lr 1e-4",
}


def reference(name: str) -> str:
    """What a variant is compared with: stage 2 with the stage 1 that it starts from, what changes it with the longer one."""
    if name == "as much of stage 1":
        return "stage 2"
    return "longer stage 2" if name in list(STAGE_2)[3:] else "default"


def folder(args, name: str, seed: int) -> pathlib.Path:
    """Where a variant's run is; the default's own stage 2 is in the default run."""
    name = "default" if name == "stage 2" else name
    name = "-".join([args.dataset, *args.extra.split(), *name.split(), str(seed)])
    return args.runs / name.replace("--", "")


def train(args, name: str, seed: int) -> None:
    """One run, continued if it was interrupted, and its evaluation; nothing if that is done."""
    out = folder(args, name, seed)
    parts = [name, "stage 2"] if name == "default" else [name]
    if all(in_folder(args, part, seed) for part in parts):
        return
    if (out / "metrics.jsonl").exists():
        flags = ["--resume", str(out)]
    else:
        flags = ["--dataset", args.dataset, "--out", str(out), "--overwrite"]
        flags += ["--data-dir", args.data_dir] if args.data_dir else []
        flags += ["--test-samples", str(args.samples), "--no-eval"]
        if name.endswith("of stage 1"):  # on other samples than the first time
            flags += ["--seed", str(seed + 10)]
        else:
            flags += ["--seed", str(seed)]
        if name in STAGE_2:
            start = folder(args, "default", seed) / "rta"
            flags += ["--stage", "ppr", "--model", str(start)]
        else:
            flags += ["--model", args.model] if args.model else []
            flags += ["--stage", "rta"] if name != "default" else []
        own = (STAGE_1 | STAGE_2)[name].format(runs=args.runs)
        flags += [*LENGTH.split(), *args.extra.split(), *own.split()]
    evaluation = [str(out), "--samples", str(args.samples)]
    evaluation += ["--rows", *map(trained, parts)]
    with open(f"{out}.log", "a") as log:
        ok = script(log, "train.py", *flags) and script(log, "eval.py", *evaluation)
    print(out, "done" if ok else f"failed, see {out}.log", flush=True)


def script(log, *command: str) -> bool:
    """Run one of the repository's scripts with one thread; whether it went well."""
    how = {"stdout": log, "stderr": log, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    return subprocess.run(command, check=False, **how).returncode == 0


def trained(name: str) -> str:
    """eval.py's name for the agent that a variant trains."""
    if name == "no tools":
        return "r"
    return "ppr" if name in STAGE_2 and "rta" not in STAGE_2[name] else "rta"


def in_folder(args, name: str, seed: int) -> list[dict] | None:
    """What eval.py kept of the trained agent on the test samples, in their order; None if there is no such run."""
    out = folder(args, name, seed)
    for file in (out / "rows").glob(f"{trained(name)}-*.jsonl"):  # one for each setting
        kept = {x["task"]: x for x in read_jsonl(file)}
        if all(task_key(Task(s)) in kept for s in args.tested):
            return [kept[task_key(Task(s))] for s in args.tested]
    return None


def lines(args, name: str, seed: int) -> dict[str, np.ndarray] | None:
    """rank (0: not in the top k), calls and valid of each test sample; from the run folder, else as kept; None if neither.

    Kept as a digit a sample: 0 to 9, and "a" for ten.
    """
    setting = f"{args.dataset}, {args.samples} samples {args.extra}".strip()
    kept = args.kept.setdefault(setting, {})
    found = in_folder(args, name, seed)
    if found:
        columns = {
            "rank": [x["rank"] or 0 for x in found],
            "calls": [len(x["calls"]) for x in found],
            "valid": [int(x["valid"]) for x in found],
        }
        texts = {k: "".join(f"{x:x}" for x in column) for k, column in columns.items()}
        kept.setdefault(name, {})[str(seed)] = texts
    texts = kept.get(name, {}).get(str(seed))
    return texts and {k: np.array([int(x, 16) for x in t]) for k, t in texts.items()}


def scores(runs: list[dict], name: str) -> np.ndarray:
    """[seeds, n] a metric of each run's samples."""
    return np.array([[metric(name, x or None, 10) for x in r["rank"]] for r in runs])


def row(args, name: str, runs: list[dict], against: list[dict] | None) -> str:
    """One line of the table; the differences are paired with the runs `against`."""
    values = {m: scores(runs, m) for m in ("ndcg@10", "hit@1")}
    cells = [name, " ".join(f"{x:.3f}" for x in values["ndcg@10"].mean(1))]
    cells += [f"{x.mean():.3f}" for x in values.values()]
    cells += [f"{np.mean([r['valid'] for r in runs]):.1%}"]
    cells += [f"{np.mean([r['calls'] for r in runs]):.2f}"]
    if against:
        gain = {m: x - scores(against, m) for m, x in values.items()}
        users = np.array([s.user for s in args.tested])
        found = intervals({m: x.mean(0) for m, x in gain.items()}, users)
        for m, x in found.items():
            cells += [f"{x['mean']:+.3f} [{x['lo']:+.3f}, {x['hi']:+.3f}]"]
            if len(runs) > 1:
                error = gain[m].mean(1).std(ddof=1) / len(runs) ** 0.5
                cells[-1] += f" ±{error:.3f}"
    else:
        cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def table(args) -> str:
    """A row for each variant that has runs for all seeds."""
    out = ["| variant | N@10 by run | N@10 | H@1 | valid | calls | N@10 minus its reference | H@1 minus its reference |"]  # fmt: skip
    out += ["|---" * 8 + "|"]
    for name in [*STAGE_1, *STAGE_2]:
        both = name, reference(name)
        runs, base = ([lines(args, x, s) for s in args.seeds] for x in both)
        if None not in runs and None not in base:
            out.append(row(args, name, runs, base if name != "default" else None))
    return "\n".join(out)


def against_all(args) -> str:
    """N@10 of each variant of stage 1 minus that of all runs of the default that are kept, whatever their seed, and t."""
    every = (lines(args, "default", s) for s in range(20))
    base = scores([x for x in every if x], "ndcg@10").mean(1)
    out = [f"minus all {len(base)} runs of the default, {base.mean():.3f}:"]
    for name in STAGE_1:
        runs = [lines(args, name, s) for s in args.seeds]
        if name != "default" and None not in runs:
            own = scores(runs, "ndcg@10").mean(1)
            n, m = len(base), len(own)
            within = (n * base.var() + m * own.var()) / (n + m - 2)  # pooled
            gap = own.mean() - base.mean()
            out.append(
                f"  {name:24}{gap:+.3f}  t {gap / (within * (1 / n + 1 / m)) ** 0.5:+.1f}"
            )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", nargs="*", default=[], help="variants, or all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs")
    parser.add_argument("--dataset", default="office-sim")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", help="the agent to start from")
    flags = {"dest": "extra", "default": "", "metavar": "FLAGS"}
    parser.add_argument("--with", **flags, help="train.py's, for every run")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--into", help="name of the mark in README.md")
    args = parser.parse_args()
    args.runs.mkdir(exist_ok=True)
    known = [*STAGE_1, *STAGE_2]
    names = known if args.run == ["all"] else args.run
    names = ["default" if x == "stage 2" else x for x in names]  # the same run
    unknown = [x for x in names if x not in known]
    if unknown:
        parser.error(f"{unknown[0]}: not one of {', '.join(known)}")
    test = load_dataset(args.dataset, args.data_dir).splits["test"]
    order = np.random.default_rng(0).permutation(len(test))[: args.samples]
    args.tested = [test[i] for i in order]  # those of eval.py
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for part in STAGE_1, STAGE_2:  # stage 2 starts from the default
            jobs = [(x, s) for x in names if x in part for s in args.seeds]
            list(pool.map(lambda job: train(args, *job), dict.fromkeys(jobs)))
    args.kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    text = table(args)
    print(against_all(args))
    KEPT.write_text(json.dumps(args.kept, indent=1) + "\n")
    put_into_readme(args.into, text) if args.into else print(text)


if __name__ == "__main__":
    main()
