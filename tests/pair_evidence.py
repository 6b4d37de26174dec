"""How often the tools' own scores order the hard pairs of a run rightly, and all pairs of the same samples.

    python tests/pair_evidence.py runs/NAME [runs/NAME ...]      # runs of the same dataset
    python tests/pair_evidence.py runs/NAME --keep right --into runs/OTHER && python train.py --resume runs/OTHER

What stage 2 rewards is a choice against the evidence wherever a pair is one that the evidence orders wrongly. Run by
hand; a tie counts half. "sum" adds up the tools that the run may call. The second form starts the same stage 2 again on
those of its pairs alone that the sum orders rightly, or wrongly (ties: neither).
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from data import load_dataset
from eval import own_tools
from model import read_config
from ppr import HardPair, read_pairs
from tools import load_context, tool_scores

PAIRS = "hard_pairs.jsonl"


def right(scores: np.ndarray, positive: int, others: np.ndarray) -> float:
    """Mean over `others` (candidate numbers) of 1, 1/2 or 0: the positive scores higher, as high, or lower."""
    return float(np.mean((np.sign(scores[positive - 1] - scores[others - 1]) + 1) / 2))


def judged(run: pathlib.Path):
    """Each pair of a run and, by tool and for their sum, [hard, all]: `right` for the pair and for all of its sample."""
    flags = read_config(run)["args"]
    ds = load_dataset(flags["dataset"], flags["data_dir"])
    ctx = load_context(run, ds, flags["title_chars"])
    for pair in read_pairs(run / PAIRS):
        sample = ds.splits["train"].of(pair.sample)
        scores = {name: tool_scores(ctx, name, sample) for name in own_tools(run)}
        scores["sum"] = sum(scores.values())
        numbers = np.arange(1, len(sample.candidates) + 1)
        kinds = np.array([pair.negative]), numbers[numbers != pair.positive]
        # rounded: sums of equal scores stay equal
        tools = {name: x.round(9) for name, x in scores.items()}
        yield (
            pair,
            {
                name: [right(x, pair.positive, others) for others in kinds]
                for name, x in tools.items()
            },
        )


def start_again(run: pathlib.Path, out: pathlib.Path, pairs: list[HardPair]) -> None:
    """A run folder as if stopped after mining, with these pairs; train.py --resume begins its stage 2."""
    out.mkdir(parents=True)
    shutil.copy(run / "sasrec.safetensors", out)
    config = read_config(run)
    if config["args"]["stage"] == "all":
        config["args"] |= {"stage": "ppr", "model": str((run / "rta").resolve())}
    (out / "config.json").write_text(json.dumps(config))
    rows = (json.dumps(dataclasses.asdict(pair)) + "\n" for pair in pairs)
    (out / PAIRS).write_text("".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--keep", choices=("right", "wrong"))
    parser.add_argument("--into", type=pathlib.Path, help="a new run folder")
    args = parser.parse_args()
    if args.keep:
        if not args.into or len(args.runs) > 1:
            parser.error("--keep takes one run and --into")
        wanted = float(args.keep == "right")
        found = judged(args.runs[0])
        kept = [pair for pair, shares in found if shares["sum"][0] == wanted]
        start_again(args.runs[0], args.into, kept)
        return print(f"{args.into}: {len(kept)} pairs; train.py --resume {args.into}")
    found = [shares for run in args.runs for _, shares in judged(run)]
    print(f"{len(found)} pairs; the positive scores higher:")
    for name in found[0]:
        hard, every = np.mean([shares[name] for shares in found], 0)
        print(f"  {name:22} hard {hard:.1%}, all {every:.1%}")


if __name__ == "__main__":
    main()
