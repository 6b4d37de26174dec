"""One rank of test_parallel.py: `torchrun tests/rank.py FAULT FLAGS...` is train.py on a miniature world.

FAULT tells what befalls rank 1 in stage 1: "none", "stop:N" (SIGTERM as step N begins) or "die:N:FILE" (an error then;
FILE gets the time).
"""

import functools
import pathlib
import signal
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import data
import sasrec
import train
from grpo import ranks


def shrink(setattr) -> None:
    """A 150-user shop and one epoch of SASRec in place of the bundled world's sizes; no data set is prepared."""
    shop, fit = data.simulate_office, train.train_sasrec
    setattr(data, "simulate_office", functools.partial(shop, 150))
    setattr(data, "HOME", pathlib.Path("/nowhere"))
    setattr(train, "train_sasrec", functools.partial(fit, epochs=1))
    setattr(sasrec, "EPOCHS", (1,))


def befall(fault: str, at: str = "", path: str = "") -> None:
    """Have `fault` happen to rank 1."""
    original = train.grpo_step

    def faulty(run, stage, step):
        if (stage, step, ranks()[0]) == ("rta", int(at), 1):
            if fault == "stop":
                signal.raise_signal(signal.SIGTERM)
            else:
                pathlib.Path(path).write_text(str(time.time()))
                raise RuntimeError("out of luck")
        return original(run, stage, step)

    if fault != "none":
        train.grpo_step = faulty


def fused(parameters, lr, adamw=torch.optim.AdamW, **settings):
    """The optimizer that a GPU has; CPUs have it too."""
    return adamw(parameters, lr, **settings | {"fused": True})


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW = fused
    shrink(setattr)  # for good: the process is this run
    befall(*sys.argv.pop(1).split(":"))
    train.main()
