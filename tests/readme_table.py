"""The README's result tables from finished run folders: print one, or put it between its marks in README.md.

    python tests/readme_table.py runs/office-0 runs/office-1 runs/office-2
    python tests/readme_table.py runs/office-[0-9] --into office     # replaces what stands between <!-- office --> and <!-- end -->

Run by hand. A cell is the mean over the runs of a row's mean; its interval is the mean of the runs' intervals (the runs
share the test samples, so it covers the choice of users), and "by run" shows the choice of seed.
"""

import argparse
import json
import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"
METRICS = {"hit@1": "H@1", "hit@5": "H@5", "hit@10": "H@10", "ndcg@5": "N@5", "ndcg@10": "N@10", "mrr": "MRR"}  # fmt: skip
WITH_INTERVAL = ("hit@1", "ndcg@10")
PAIRS = re.compile(
    "ppr-(rta|frozen|popularity|sasrec|itemknn|fusion|learned_fusion|oracle)$|rta-(frozen|r)$|r-frozen_r$"
)


def mean(values) -> float:
    return sum(values) / len(values)


def common(results: list[dict], part: str) -> list[str]:
    """Names that every run has."""
    return [x for x in results[0][part] if all(x in r[part] for r in results)]


def cell(runs: list[dict], metric: str) -> str:
    """Mean of the runs' means, with the mean of their intervals where it is shown."""
    m, lo, hi = (mean([r[metric][x] for r in runs]) for x in ("mean", "lo", "hi"))
    return f"{m:.3f} ({lo:.3f}–{hi:.3f})" if metric in WITH_INTERVAL else f"{m:.3f}"


def table(results: list[dict]) -> list[str]:
    """A line for each row that all runs have."""
    lines = [f"| row | {' | '.join(METRICS.values())} | N@10 by run | valid | calls |"]
    lines += ["|---" * (len(METRICS) + 4) + "|"]
    for row in common(results, "rows"):
        runs = [r["rows"][row] for r in results]
        cells = [cell(runs, m) for m in METRICS]
        cells += [" ".join(f"{r['ndcg@10']['mean']:.3f}" for r in runs)]
        if runs[0]["valid"] is None:
            cells += ["", ""]
        else:
            cells += [f"{mean([r['valid'] for r in runs]):.1%}"]
            cells += [f"{mean([r['tool_calls'] for r in runs]):.2f}"]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return lines


def differences(results: list[dict]) -> list[str]:
    """Paired differences, a run each; of the single tools only the best one's."""
    score = {x: r["ndcg@10"]["mean"] for x, r in results[0]["rows"].items()}
    best = "ppr-" + max((x for x in score if x.startswith("tool:")), key=score.get)
    lines = ["| difference | N@10 by run: mean [95% paired interval] | H@1 |"]
    lines += ["|---|---|---|"]
    for pair in common(results, "paired"):
        if pair != best and not PAIRS.match(pair):
            continue
        cells = []
        for metric in ("ndcg@10", "hit@1"):
            parts = [r["paired"][pair][metric] for r in results]
            texts = (
                f"{p['mean']:+.3f} [{p['lo']:+.3f}, {p['hi']:+.3f}]" for p in parts
            )
            cells.append("; ".join(texts))
        lines.append(f"| {pair.replace('-', ' - ')} | {' | '.join(cells)} |")
    return lines


def put_into_readme(name: str, text: str) -> None:
    """Replace what README.md has between <!-- name --> and the next <!-- end -->."""
    start, end = f"<!-- {name} -->", "<!-- end -->"
    before, _, rest = README.read_text().partition(start)
    _, found, after = rest.partition(end)
    assert found, f"README.md has no {start} ... {end}"
    README.write_text(f"{before}{start}\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--into", help="name of the mark in README.md")
    args = parser.parse_args()
    results = [json.loads((run / "eval.json").read_text()) for run in args.runs]
    text = "\n".join([*table(results), "", *differences(results)])
    if not args.into:
        n, split = results[0]["n"], results[0]["split"]
        return print(f"{len(results)} runs, {n} {split} samples\n\n{text}")
    put_into_readme(args.into, text)


if __name__ == "__main__":
    main()
