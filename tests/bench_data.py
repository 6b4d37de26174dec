"""Data at scale, run by hand: time and peak memory of loading, of the tools and of preparing Amazon Reviews 2023.

    python tests/bench_data.py            # a few minutes, 1 GB in the temporary folder
    python tests/bench_data.py tools --interactions 100000 --items 10000

`tools` loads 1M generated interactions with 100k items, `amazon` prepares generated raw files of the size of
Office_Products (700k products of 3 kB, 1.8M ratings). Each runs in a process of its own, so its peak memory is its own.
"""

import argparse
import gzip
import json
import multiprocessing
import pathlib
import re
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import data
from sasrec import SASRec, next_item_loss, pad
from tools import TOOLS, Call, Context, run_call

START = data.milliseconds("2021-10-01")


def peak_gb() -> float:
    """The most memory this process has held, in GB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def now() -> np.ndarray:
    """Seconds on the clock and of processor time: on a busy machine only the second says what the code costs."""
    return np.array([time.perf_counter(), time.process_time()])


def spent(began: np.ndarray) -> str:
    return "{:.1f} s ({:.1f} s of CPU)".format(*(now() - began))


def draw_ratings(rng, n, n_items, days):
    """[n] user, item, stars and time: ten a user on average, 1 to a few hundred; few items take most of it."""
    share = rng.lognormal(size=n // 10)
    user = rng.choice(n // 10, n, p=share / share.sum())
    item = (n_items * rng.random(n) ** 2).astype(int)
    when = START + rng.integers(days * data.DAY, size=n)
    return user, item, rng.integers(1, 6, n), when


def write_ratings(f, columns):
    """The CSV of both formats; ids are as long as Amazon's."""
    f.write(",".join(data.HEADER) + "\n")
    for u, i, stars, when in zip(*(c.tolist() for c in columns)):
        f.write(f"AE{u:026d},B{i:09d},{stars}.0,{when}\n")


def write_dataset(folder, n, n_items):
    """A dataset folder of n interactions."""
    rng = np.random.default_rng(0)
    with open(folder / "items.jsonl", "w") as f:
        for i in range(n_items):
            row = {
                "parent_asin": f"B{i:09d}",
                "title": f"Brand{i % 5000} office product number {i} of the shop",
                "store": f"Brand{i % 5000}",
                "categories": ["Office Products", f"Category {i % 1500}"],
                "price": 1 + i % 97,
                "average_rating": 4.1,
            }
            f.write(json.dumps(row) + "\n")
    with open(folder / "interactions.csv", "w") as f:
        write_ratings(f, draw_ratings(rng, n, n_items, 365))


def bench_tools(folder):
    """Load a dataset folder, draw samples, and time every tool."""
    began = now()
    ds = data.load_dataset("generated", str(folder))
    print(ds.describe())
    print(f"load and split: {spent(began)} (limit 30), {peak_gb():.2f} GB (limit 4)")
    began, test = now(), list(ds.splits["test"])
    print(f"candidates of the {len(test):,} test samples: {spent(began)}")
    model = SASRec(len(ds.items))
    ids = pad([ds.item[rows] for rows in ds.by_user[:128]])
    began = now()
    next_item_loss(model, ids).backward()
    print(f"SASRec, one training step of 128 users: {spent(began)}")
    began = now()
    ctx = Context(ds, model.eval())
    print(f"context: {spent(began)}, {peak_gb():.2f} GB so far (limit 4)")
    rng = np.random.default_rng(0)
    samples = [test[i] for i in rng.choice(len(test), 200, replace=False)]
    print(f"{'tool':24}{'median ms':>10}{'CPU ms':>8}   (limit 10)")
    for name, tool in TOOLS.items():
        took = []
        for s in samples:
            title = ds.items[s.candidates[0]].title
            call = Call(name, {tool.argument: title} if tool.argument else {})
            began = now()
            run_call(ctx, s, call)
            took.append(1e3 * (now() - began))
        wall, cpu = np.median(took, axis=0)[0], np.mean(took, axis=0)[1]
        print(f"{name:24}{wall:10.2f}{cpu:8.2f}")
    print(f"peak: {peak_gb():.2f} GB (limit 4)")


def write_raw(folder, n_products, n_ratings):
    """Raw files with the real ones' fields and sizes; a third of the products has no price."""
    rng = np.random.default_rng(0)
    words = [f"{w}{i}" for w in data.ADJECTIVES.split() for i in range(200)]
    texts = [" ".join(rng.choice(words, 360)) for _ in range(2000)]
    with gzip.open(folder / "meta_Office_Products.jsonl.gz", "wt", 1) as f:
        for i in range(n_products):
            row = {
                "main_category": "Office Products",
                "title": f"Brand{i % 5000} office product {i}",
                "average_rating": 4.1,
                "rating_number": i % 900,
                "description": [texts[i % len(texts)]],
                "price": (None, 8.99, "12.50")[i % 3],
                "images": [{"hi_res": f"https://images/{i}-{j}.jpg"} for j in range(5)],
                "store": f"Brand{i % 5000}",
                "categories": ["Office Products", f"Category {i % 1500}"],
                "details": {"Brand": f"Brand{i % 5000}"},
                "parent_asin": f"B{i:09d}",
            }
            f.write(json.dumps(row) + "\n")
    with gzip.open(folder / "Office_Products.csv.gz", "wt", 1) as f:
        write_ratings(f, draw_ratings(rng, n_ratings, n_products, 730))


def bench_amazon(folder, n_rows):
    """Prepare the raw files of `write_raw`."""
    began = now()
    places = "--raw-dir", str(folder), "--data-dir", str(folder / "office")
    data.main(["office", *places])
    wall, cpu = now() - began
    size = sum(p.stat().st_size for p in folder.glob("*.gz")) / 1e6
    print(
        f"prepare {n_rows:,} rows, {size:,.0f} MB packed: {spent(began)}, {peak_gb():.2f} GB (limit 2)"
    )
    print(f"{n_rows / wall:,.0f} rows/s, {n_rows / cpu:,.0f} a second of CPU")


def alone(function, *arguments):
    """Run a function in a fresh process; an error ends this one too."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)  # fmt: skip
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["tools", "amazon"])
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--products", type=int, default=700_000)
    parser.add_argument("--ratings", type=int, default=1_800_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if args.part in (None, "tools"):
            alone(write_dataset, folder, args.interactions, args.items)
            alone(bench_tools, folder)
        if args.part in (None, "amazon"):
            alone(write_raw, folder, args.products, args.ratings)
            alone(bench_amazon, folder, args.products + args.ratings)


if __name__ == "__main__":
    main()
