"""How often the tools' own scores order the hard pairs of a run rightly, and all pairs of the same samples.

    python tests/pair_evidence.py runs/NAME [runs/NAME ...]      # runs of the same dataset

What stage 2 rewards is a choice against the evidence wherever a pair is one that the evidence orders wrongly. Run by
hand; a tie counts half. "sum" adds up the tools that the run may call.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from data import load_dataset
from eval import own_tools
from model import read_config
from ppr import read_pairs
from tools import load_context, tool_scores


def right(scores: np.ndarray, positive: int, others: np.ndarray) -> float:
    """Mean over `others` (candidate numbers) of 1, 1/2 or 0: the positive scores higher, as high, or lower."""
    return float(np.mean((np.sign(scores[positive - 1] - scores[others - 1]) + 1) / 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    runs = parser.parse_args().runs
    flags = read_config(runs[0])["args"]
    ds = load_dataset(flags["dataset"], flags["data_dir"])
    hard, every = {}, {}
    for run in runs:
        ctx = load_context(run, ds, flags["title_chars"])
        for pair in read_pairs(run / "hard_pairs.jsonl"):
            sample = ds.splits["train"].of(pair.sample)
            scores = {name: tool_scores(ctx, name, sample) for name in own_tools(run)}
            scores["sum"] = sum(scores.values())
            numbers = np.arange(1, len(sample.candidates) + 1)
            rest = numbers[numbers != pair.positive]
            for name, x in scores.items():
                x = x.round(9)  # sums of equal scores stay equal
                found = right(x, pair.positive, np.array([pair.negative]))
                hard.setdefault(name, []).append(found)
                every.setdefault(name, []).append(right(x, pair.positive, rest))
    print(f"{len(hard['sum'])} pairs; the positive scores higher:")
    for name, found in hard.items():
        shares = f"hard {np.mean(found):.1%}, all {np.mean(every[name]):.1%}"
        print(f"  {name:22} {shares}")


if __name__ == "__main__":
    main()
