"""Kill a run with SIGKILL at random moments, resume it each time, and compare it with a run that was left alone.

    OMP_NUM_THREADS=1 python tests/kill_resume.py --kills 20

Run by hand (a few minutes). A child process trains both stages of a random two-layer agent (rewarded with noise, so that
every step has an update) on a 150-user shop and reports which phase it enters; the parent picks the phase killed least
and a moment in it. A run is resumed until it is done, then the next one starts, until all kills are spent. Weights, hard
pairs, trajectories and metrics (timings apart) must be the same byte for byte. --agent trains a real one instead.
"""

import argparse
import functools
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import torch
from long_run import SIZE, noisy

import data
import sasrec
import train
from data import load_dataset
from model import build_tiny_agent, save_policy
from ppr import HardPair
from sasrec import SASRec
from tools import Context

PHASES = ("train_sasrec", "put", "rollout", "policy_gradient", "mine_pairs", "save_state", "update", "log_step")  # fmt: skip
FLAGS = "--dataset office-sim --dtype float32 --batch 2 --group-size 2 --max-new-tokens 200 --mine-samples 8 --no-eval"
FLAGS += " --steps 3 --ppr-steps 2 --save-every 2"


def pair_each(trajectories, *_):
    """A hard pair for every trajectory, valid or not; stands in for `mine`."""
    samples = [t.task.sample for t in trajectories]
    return [HardPair(s.id, s.target + 1, 1 + (s.target == 0), None) for s in samples]


def forked(function, *args):
    """Start `function` in a child process; its id. The parent itself must run nothing: threads do not survive a fork."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*args)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid


def save_random_agent(folder):
    ds = load_dataset("office-sim")
    ctx = Context(ds, SASRec(len(ds.items)).eval())
    texts = train.demonstration_texts(ctx, ds.splits["train"][:60], 10)
    save_policy(build_tiny_agent(texts, SIZE), folder)


def reporting(name, function, report):
    """`function` that writes its name to `report` when it starts and when it ends."""

    def wrapped(*args, **kwargs):
        os.write(report, f"+{name}\n".encode())
        result = function(*args, **kwargs)
        os.write(report, f"-{name}\n".encode())
        return result

    return wrapped


def child(out, agent, report):
    """Start the run in `out`, or resume it if it has a config, as a process of its own."""
    log = os.open(out.with_name("log.txt"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    train.train_sasrec = functools.partial(train.train_sasrec, epochs=1)
    sasrec.EPOCHS = (1,)
    for name in PHASES:
        setattr(train, name, reporting(name, getattr(train, name), report))
    resume = (out / "config.json").exists()
    flags = (
        ["--resume", str(out)]
        if resume
        else [*FLAGS.split(), "--model", agent, "--out", str(out)]
    )
    sys.argv = ["train.py", *flags]
    train.main()


def attempt(out, agent, phase=None, nth=1, delay=0.0):
    """One process until its end, or until `delay` seconds into the nth `phase`; (exit status, its reports with times)."""
    reader, writer = os.pipe()
    pid = forked(child, out, agent, writer)
    os.close(writer)
    reports, seen = [], 0
    with open(reader) as lines:
        for line in lines:
            reports.append((line.strip(), time.monotonic()))
            seen += line.strip() == f"+{phase}"
            if seen == nth:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
                seen = nth + 1
    return os.waitpid(pid, 0)[1], reports


def innermost(reports):
    """The phase that was entered last and not left."""
    open_phases = []
    for report, _ in reports:
        if report[0] == "+":
            open_phases.append(report[1:])
        else:
            open_phases.pop()
    return open_phases[-1] if open_phases else "between phases"


def durations(reports):
    """Seconds that each phase takes at most."""
    began, longest = {}, {}
    for report, when in reports:
        if report[0] == "+":
            began[report[1:]] = when
        else:
            name = report[1:]
            longest[name] = max(longest.get(name, 0), when - began[name])
    return longest


def content(out):
    """Everything that must not depend on kills, by file name."""
    files = {n: (out / n).read_bytes() for n in ("hard_pairs.jsonl", "trajectories.jsonl")}  # fmt: skip
    files |= {str(p.relative_to(out)): p.read_bytes() for s in ("rta", "ppr") for p in (out / s).iterdir()}  # fmt: skip
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    files["metrics"] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]  # fmt: skip
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--agent", help="a checkpoint that answers, e.g. assets/tiny-agent"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    data.simulate_office = functools.partial(data.simulate_office, 150)
    rng, root = random.Random(args.seed), pathlib.Path(tempfile.mkdtemp())
    agent = args.agent or str(root / "agent")
    if not args.agent:
        train.reward, train.mine = noisy, pair_each
        assert os.waitpid(forked(save_random_agent, root / "agent"), 0)[1] == 0
    status, reports = attempt(root / "whole", agent)
    assert status == 0, (root / "log.txt").read_text()[-2000:]
    wanted, longest = content(root / "whole"), durations(reports)
    print("seconds at most", {k: round(v, 2) for k, v in longest.items()}, flush=True)
    tried, landed, runs = Counter(), Counter(), 0
    while landed.total() < args.kills:
        out, status = root / f"killed{runs}", None
        while status != 0:
            phase = min(PHASES, key=lambda name: (tried[name], rng.random()))
            nth = 1 if phase in ("train_sasrec", "mine_pairs") else rng.randint(1, 2)
            if landed.total() >= args.kills:
                nth = -1  # never: this one may end
            delay = rng.uniform(0, longest[phase])
            status, reports = attempt(out, agent, phase, nth, delay)
            assert status in (0, signal.SIGKILL), (root / "log.txt").read_text()[-2000:]
            if status:
                tried[phase] += 1
                landed[innermost(reports)] += 1
                print(f"kill {landed.total()} in {innermost(reports)}", flush=True)
        got = content(out)
        different = [name for name in wanted if got.get(name) != wanted[name]]
        assert got.keys() == wanted.keys() and not different, f"{out}: {different}"
        runs += 1
    print(f"{landed.total()} kills in {runs} runs, all files identical:", dict(landed))


if __name__ == "__main__":
    main()
