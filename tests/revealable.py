"""How much of the oracle's lead can ten interactions reveal? A ranker that knows the shop but not the user.

    python tests/revealable.py      # half a minute on two cores

The oracle knows each user's hidden taste. This script trains a small network on other simulated users (another seed of
the same shop) that sees, for each candidate, how it matches the visible history on every hidden property of the shop
(brand, price band, style, project, series, rated categories). It is as close to the best possible use of the history
as we can get by learning, so its N@10 on the test split is an estimate (from below) of what a history can reveal.
"""

import pathlib
import sys

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import data
from eval import intervals, metric, ranks_from_scores


def features(ds, prop, samples):
    """[n, 20, F] matches of each candidate with the history, and what kind of buyer the history suggests."""
    out = []
    for s in samples:
        rows = data.history(ds, s)
        past, rating = ds.item[rows], ds.rating[rows]
        cand = np.array(s.candidates)
        n = len(past)
        columns, habits = [], [n / 10]
        for name in ("brand", "band", "style", "project", "category"):
            same = prop[name][cand][:, None] == prop[name][past][None]  # 20, n
            columns += [same.mean(1), same[:, -3:].mean(1), same.sum(1) / (n + 2)]
            counts = np.bincount(prop[name][past])
            habits += [
                counts.max() / n,
                (prop[name][past][1:] == prop[name][past][:-1]).mean() if n > 1 else 0,
            ]
        series = prop["series"]
        follows = series[past[1:]] == series[past[:-1]]
        columns.append((series[cand] == series[past[-1]]).astype(float))
        columns.append(
            np.abs(prop["band"][cand][:, None] - prop["band"][past][None]).mean(1)
        )
        same = prop["category"][cand][:, None] == prop["category"][past][None]
        columns += [
            (same * (rating - 3.4)).sum(1) / (same.sum(1) + 0.5),
            prop["appeal"][cand],
        ]
        habits += [
            np.mean(follows) if n > 1 else 0.0,
            rating.mean() / 5,
            rating.std(),
        ]
        out.append(
            np.concatenate([np.stack(columns, 1), np.tile(habits, (len(cand), 1))], 1)
        )
    return torch.tensor(np.array(out), dtype=torch.float32)


def main():
    world = data.load_dataset("office-sim")
    # the same shop (catalogue seed 7), other users: simulate_office draws users after the catalogue
    _, prop = data.make_catalogue(np.random.default_rng(7))
    others = data.simulate_office(n_users=9000)
    data.make_splits(others)
    train = others.splits["train"] + others.splits["fit"][::2] + others.splits["valid"]
    test = world.splits["test"]
    x, y = features(others, prop, train), torch.tensor([s.target for s in train])
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(x.shape[2], 128),
        nn.GELU(),
        nn.Linear(128, 64),
        nn.GELU(),
        nn.Linear(64, 1),
    )
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    epochs = 12
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=epochs * -(-len(x) // 256)
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(256):
            loss = nn.functional.cross_entropy(net(x[batch])[..., 0], y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        scores = net(features(world, prop, test))[..., 0].numpy()
    users = np.array([s.user for s in test])
    utility = np.array([world.utility[s.id][list(s.candidates)] for s in test])
    for name, table in (("revealable", scores), ("oracle", utility)):
        ranks = ranks_from_scores(table, test)
        columns = {m: [metric(m, r, 10) for r in ranks] for m in ("hit@1", "ndcg@10")}
        for m, b in intervals(columns, users).items():
            print(
                f"{name:12}{m:9}{b['mean']:.3f} ({b['lo']:.3f}–{b['hi']:.3f}), {len(test)} test samples"
            )


if __name__ == "__main__":
    main()
