"""Does the bundled agent read and add up correctly, and what does it ask for? Counted in what eval.py kept of its runs.

    python tests/thoughts.py runs/office-0 runs/office-1 --agent ppr

A line for each run, over its ranked samples: the share of thoughts on titles that list exactly the candidates of the last
purchase's series, of written sums that are right, of answers that rank by the written sums, NDCG@10 as answered, if all
scores it saw had been added up and sorted exactly, and if of its thoughts on titles only the first had counted; then how
often it asked for each piece of evidence at all, and more than once. Run by hand.
"""

import argparse
import collections
import pathlib
import re
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import read_jsonl
from eval import metric
from rollout import SERIES, series_of

_SCORES = re.compile(r"\n((?:\d+:\d+ ?)+)</(?:observation|think)>")
_PAIR = re.compile(r"(?<!\S)(\d+):(\d+)(?!\S)")
_SERIES = re.compile(rf"<think>{SERIES} (\S+)(.*)\n")


def added(pairs: str, n: int) -> np.ndarray:
    """[n] sums of the scores in "3:9 20:4 3:1"."""
    total = np.zeros(n, int)
    for number, score in _PAIR.findall(pairs):
        number, score = int(number), int(score)
        if 1 <= number <= n:
            total[number - 1] += score
    return total


def exact_sums(seen: str, n: int) -> np.ndarray:
    """[n] sums of all scores in what the agent wrote and read before its answer."""
    return added(" ".join(_SCORES.findall(seen)), n)


def ndcg_by(total: np.ndarray, positive: int) -> float:
    """NDCG@10 of the candidates sorted by these sums."""
    order = (np.argsort(-total, kind="stable") + 1).tolist()
    return metric("ndcg@10", order.index(positive) + 1, 10)


def of_series(prompt: str) -> tuple[str, list[str]]:
    """The last purchase's series and the numbers of the candidates that share it, read from the prompt."""
    history, _, candidates = prompt.partition("\nCandidates:\n")
    last = history.partition("History:\n")[2].split("\n")[0]
    own = series_of(last.rsplit(" (", 1)[0])
    lines = [x.rsplit(" = ", 1) for x in candidates.split("\n") if " = " in x]
    return own, [number for title, number in lines if series_of(title) == own]


def count(row: dict) -> dict[str, list]:
    """What one answer adds to each share."""
    seen, _, answer = row["text"].partition("<answer>")
    n = row["prompt"].partition("\nCandidates:\n")[2].count(" = ")
    exact = exact_sums(seen, n)
    written = added(answer.partition(" \\boxed")[0], n)
    order = np.argsort(-written, kind="stable") + 1
    before, *parts = re.split(rf"(?=<think>{SERIES} )", seen)
    rest = (part.partition("</think>")[2] for part in parts[1:])
    once = exact_sums("".join([before, *parts[:1], *rest]), n)
    own, numbers = of_series(row["prompt"])
    thoughts = [
        word == own and re.findall(r" (\d+)", found) == numbers
        for word, found in _SERIES.findall(seen)
    ]
    ranked = row["valid"] and row["answer"] == order[: len(row["answer"])].tolist()
    return {
        "thoughts": thoughts,
        "sums": (written == exact).tolist(),
        "sorted": [ranked],
        "N@10": [metric("ndcg@10", row["rank"], 10)],
        "N@10 exact": [ndcg_by(exact, row["positive"])],
        "N@10 exact, titles once": [ndcg_by(once, row["positive"])],
    }


def asked(row: dict) -> collections.Counter:
    """How often this answer asked for each piece of evidence."""
    return collections.Counter(
        [*row["calls"], *[SERIES] * len(_SERIES.findall(row["text"]))]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--agent", default="ppr", help="rta or ppr")
    args = parser.parse_args()
    for run in args.runs:
        files = (run / "rows").glob(f"{args.agent}-*.jsonl")
        rows = {x["task"]: x for f in files for x in read_jsonl(f) if not x["pair"]}
        rows = list(rows.values())
        shares = collections.defaultdict(list)
        for row in rows:
            for name, values in count(row).items():
                shares[name] += values
        means = ", ".join(f"{x} {np.mean(v):.3f}" for x, v in shares.items() if v)
        print(f"{run.name} {args.agent}, {len(rows)} answers: {means}")
        often = [asked(row) for row in rows]
        for name in sorted(set().union(*often)):
            once, more = (np.mean([x[name] > n for x in often]) for n in (0, 1))
            print(f"    {name} {once:.0%}, more than once {more:.0%}")


if __name__ == "__main__":
    main()
