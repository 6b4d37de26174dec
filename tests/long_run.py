"""Train 2,000 steps of a miniature configuration: memory must stay flat and the throughput steady.

    OMP_NUM_THREADS=1 python tests/long_run.py --steps 2000

Run by hand (minutes). The agent is a random two-layer one, so its rewards are replaced by noise, which gives every step
an update, and every tool is called for every sample beside the rollout. Memory is the process's resident set; throughput
is steps per second of processor time, so that other work on the machine does not matter. Both are medians of 100 steps.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import numpy as np

import train
from data import load_dataset
from model import build_tiny_agent, save_policy
from sasrec import SASRec
from tools import TOOLS, Call, Context, run_call

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
FLAGS = "--dataset office-sim --stage rta --no-eval --dtype float32 --batch 2 --group-size 2 --max-new-tokens 40"
FLAGS += " --save-every 100 --lr 1e-4 --temperature 1"


def resident():
    """MiB of memory that this process holds."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def noisy(_, t, *__):
    """A reward that a random agent can earn; it depends on the tokens only."""
    return sum(i * n for n, i in enumerate(t.ids)) % 9973 / 9973


class Watch:
    """Stands around `train.log_step`: notes memory and processor time after each step and calls every tool."""

    def __init__(self, log_step):
        self.log_step, self.memory, self.seconds = log_step, [], []
        self.last = time.process_time()

    def __call__(self, run, metrics, groups):
        self.log_step(run, metrics, groups)
        for sample in (group[0].task.sample for group in groups):
            title = run.ctx.titles[sample.candidates[metrics["step"] % 20]]
            for name, tool in TOOLS.items():
                arguments = {tool.argument: title} if tool.argument else {}
                run_call(run.ctx, sample, Call(name, arguments))
        assert metrics["grad_norm"] > 0, "every step must update"
        self.memory.append(resident())
        self.seconds.append(time.process_time() - self.last)
        self.last = time.process_time()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--steps", type=int, default=2000)
    steps, folder = parser.parse_args().steps, pathlib.Path(tempfile.mkdtemp())
    ds = load_dataset("office-sim")
    ctx = Context(ds, SASRec(len(ds.items)).eval())
    texts = train.demonstration_texts(ctx, ds.splits["train"][:60], 10)
    save_policy(build_tiny_agent(texts, SIZE), folder / "agent")
    train.reward = noisy
    train.log_step = watch = Watch(train.log_step)
    out, agent = str(folder / "run"), str(folder / "agent")
    sys.argv = ["train.py", *FLAGS.split(), "--steps", str(steps), "--model", agent, "--out", out]  # fmt: skip
    train.main()
    early, late = slice(200, 300), slice(-100, None)
    memory = [statistics.median(watch.memory[s]) for s in (early, late)]
    speed = [1 / statistics.median(watch.seconds[s]) for s in (early, late)]
    every = np.array(watch.memory[200::200]).round(1).tolist()
    print(f"resident MiB {memory[0]:.1f} -> {memory[1]:.1f}, every 200 steps {every}")
    print(f"steps per second of processor time {speed[0]:.2f} -> {speed[1]:.2f}")
    assert memory[1] < 1.05 * memory[0], "memory grows"
    assert 0.8 < speed[1] / speed[0] < 1.25, "throughput drifts"


if __name__ == "__main__":
    main()
