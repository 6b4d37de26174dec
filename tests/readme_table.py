"""Print the README's result tables from finished run folders: mean over runs, pooled 95% intervals, paired differences.

    python tests/readme_table.py runs/office-0 runs/office-1 runs/office-2

Run by hand. A cell is the mean over the runs of a row's mean; its interval is the mean of the runs' intervals (the runs
share the test samples, so it covers the choice of users), and the range over the runs shows the choice of seed.
"""

import json
import pathlib
import sys

METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10", "mrr")


def mean(values):
    return sum(values) / len(values)


def common(results, part):
    return [x for x in results[0][part] if all(x in r[part] for r in results)]


def cell(results, row, metric):
    parts = [r["rows"][row][metric] for r in results]
    return " ".join(
        [
            f"{mean([p['mean'] for p in parts]):.3f}",
            f"({mean([p['lo'] for p in parts]):.3f}–{mean([p['hi'] for p in parts]):.3f})",
        ]
    )


def main(folders):
    results = [json.loads((pathlib.Path(f) / "eval.json").read_text()) for f in folders]
    print(
        f"{len(results)} runs, {results[0]['split']} split, {results[0]['n']} samples\n"
    )
    print(
        "| row | H@1 | H@5 | H@10 | N@5 | N@10 | MRR | N@10 by run | valid | calls | ms | in tools |"
    )
    print("|---" * 13 + "|")
    for row in common(results, "rows"):
        cells = [cell(results, row, m) for m in METRICS]
        runs = [r["rows"][row] for r in results]
        by_run = " ".join(f"{r['ndcg@10']['mean']:.3f}" for r in runs)
        agent = ["", "", "", ""]
        if runs[0]["valid"] is not None:
            agent = [
                f"{mean([r['valid'] for r in runs]):.1%}",
                f"{mean([r['tool_calls'] for r in runs]):.2f}",
                f"{mean([r['ms'] for r in runs]):.0f}",
                f"{mean([r['tool_ms'] for r in runs]):.1f}",
            ]
        print("| " + " | ".join([row, *cells, by_run, *agent]) + " |")
    print(
        "\n| difference | metric | by run: mean [95% paired interval] |\n|---|---|---|"
    )
    for pair in common(results, "paired"):
        if pair.startswith("ppr-") or pair in ("rta-frozen", "rta-r", "r-frozen"):
            for metric in ("ndcg@10", "hit@1"):
                parts = [r["paired"][pair][metric] for r in results]
                text = "; ".join(
                    f"{p['mean']:+.3f} [{p['lo']:+.3f}, {p['hi']:+.3f}]" for p in parts
                )
                print(f"| {pair} | {metric} | {text} |")


if __name__ == "__main__":
    main(sys.argv[1:])
