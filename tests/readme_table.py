"""The README's result tables from finished run folders: print one, or put it between its marks in README.md.

    python tests/readme_table.py runs/office-0 runs/office-1 runs/office-2
    python tests/readme_table.py runs/office-[0-9] --into office     # replaces what stands between <!-- office --> and <!-- end -->
    python tests/readme_table.py fp32.json bf16.json growth.json --into bench                  # what bench.py --json wrote

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
    "ppr-(rta|sasrec|itemknn|fusion|subset_fusion|learned_fusion|titles_fusion)$|rta-(frozen|r)$|r-frozen_r$"
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
        if runs[0]["valid"] is None:  # no agent, so the same in all runs
            cells += ["", "", ""]
        else:
            cells += [" ".join(f"{r['ndcg@10']['mean']:.3f}" for r in runs)]
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


def speed(results: list[dict]) -> list[str]:
    """What bench.py measured: a line for each case and peer, then one for each axis of growth."""
    lines = ["| case | | rollout s | update s | step s | x ours | peak MB | rollout, of limit | update, of limit |"]  # fmt: skip
    lines += ["|---" * 9 + "|"]
    for result in results:
        for name, case in result["cases"].items():
            ours = case["peers"]["ours"]
            for peer, r in case["peers"].items():
                seconds = " | ".join(f"{r[x]:.2f}" for x in ("rollout", "update", "step"))  # fmt: skip
                shares = f"{r['rollout_of_limit']:.0%} | {r['update_of_limit']:.0%}"
                where = f"{name}, {result['args']['dtype']}" if r is ours else ""
                times = f"{r['step'] / ours['step']:.1f}"
                lines += [f"| {where} | {peer} | {seconds} | {times} | {r['peak_mb']:.0f} | {shares} |"]  # fmt: skip
    lines += ["", "| ours, float32, as it grows | rollout s | update s | least work |"]
    lines += ["|---" * 4 + "|"]
    for result in results:
        for axis in (x for x in result if x.startswith("growth with ")):
            points = result[axis]
            first = next(iter(points.values()))["flops"]
            cells = [f"{axis[12:]} {' / '.join(points)}"]
            cells += [" / ".join(f"{r[x]:.2f}" for r in points.values()) for x in ("rollout", "update")]  # fmt: skip
            cells += [" / ".join(f"{r['flops'] / first:.1f}" for r in points.values())]
            lines += [f"| {' | '.join(cells)} |"]
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
    files = [run if run.suffix == ".json" else run / "eval.json" for run in args.runs]
    results = [json.loads(file.read_text()) for file in files]
    if "cases" in results[0]:
        text, what = "\n".join(speed(results)), f"{len(results)} measurements"
    else:
        text = "\n".join([*table(results), "", *differences(results)])
        what = f"{len(results)} runs, {results[0]['n']} {results[0]['split']} samples"
    if not args.into:
        return print(f"{what}\n\n{text}")
    put_into_readme(args.into, text)


if __name__ == "__main__":
    main()
