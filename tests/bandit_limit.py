"""What can feedback on whole rankings teach in so many trajectories? Stage 1 without a language model.

    python tests/bandit_limit.py        # four to seven minutes on one core
    python tests/bandit_limit.py --dataset office2018 --data-dir DIR --without-tool NAME ...

A table stands in for the agent: for each tool, and for reading the titles, the chance of asking not at all, once and
twice (24 numbers, not 2.6 million), the same for all users. It cannot write an invalid answer or add up wrongly: the
ranking sorts by the sum of what was shown, as the warm-up's demonstrations do. Samples, observations, reward (Eq. 1),
advantages (Eq. 6) and temperature are those of `python train.py`; the learning rate is the best of three on the
validation split. Beside it `learned_fusion`, which is told the positive of every sample instead of a reward for a sampled
ranking, and the best of all choices on the training split, with what one piece of evidence more or less would change.
Printed: N@10 of the likeliest choices on the test split, ten seeds each.
"""

import argparse
import itertools
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from data import load_dataset
from eval import evidence_scores, fit_fusion
from grpo import BONUS, NOT_RANKED, group_advantages
from rollout import ALL_TOOLS
from sasrec import train_sasrec
from tools import Context, digits

K, G, TEMPERATURE, SEEDS = 10, 8, 0.6, 10
# steps, prompts a step: the default, that of the variants, more
SIZES = ((24, 12), (50, 12), (200, 12), (50, 48), (200, 48), (200, 192))
TIMES = np.arange(3)  # not at all, once, twice


def ndcg_of(totals: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[n] NDCG@10 of [n, 20] totals, 0 beyond rank 10; a tie counts as half a place."""
    own = np.take_along_axis(totals, targets[:, None], 1)
    rank = 1 + (totals > own).sum(1) + ((totals == own).sum(1) - 1) / 2
    return np.where(rank <= K, 1 / np.log2(1 + rank), 0.0)


def draw(chances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[G, tools] choices, one for each row and tool from [tools, n] chances."""
    shape = (G, len(chances), 1)
    return (rng.random(shape) > chances.cumsum(1)[:, :-1]).sum(2)


def gradient(logits: np.ndarray, shown: np.ndarray, target: int, rng) -> np.ndarray:
    """Eq. 6 for one sample: [tools, 3] from G sampled choices of how often to ask each tool."""
    chances = np.exp(logits / TEMPERATURE)
    chances /= chances.sum(1, keepdims=True)
    choice = draw(chances, rng)
    totals = TIMES[choice] @ shown  # G, 20
    score = ndcg_of(totals, np.full(G, target))
    reward = np.where(score > 0, score + BONUS * (score == 1), NOT_RANKED)
    advantage = group_advantages(reward[None])[0]
    # G, tools, 3: d log p / d logits, times T
    taken = np.eye(len(TIMES))[choice] - chances
    return np.einsum("g,gtc->tc", advantage, taken) / G / TEMPERATURE


def train(shown, targets, steps: int, batch: int, lr: float, seed: int) -> np.ndarray:
    """[tools] weights of the likeliest choices after `steps` of Adam with a linearly falling rate."""
    rng, logits = np.random.default_rng(seed), np.zeros((shown.shape[1], len(TIMES)))
    mean, square = np.zeros_like(logits), np.zeros_like(logits)
    for step in range(steps):
        chosen = rng.choice(len(targets), batch, replace=False)
        rows = [gradient(logits, shown[i], targets[i], rng) for i in chosen]
        g = np.mean(rows, 0)
        mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
        size = np.sqrt(square / (1 - 0.95 ** (step + 1))) + 1e-8
        logits += lr * (1 - step / steps) * mean / (1 - 0.9 ** (step + 1)) / size
    return TIMES[logits.argmax(1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="office-sim")
    parser.add_argument("--data-dir")
    parser.add_argument("--title-chars", type=int, default=30)
    parser.add_argument("--without-tool", action="append", default=[])
    args = parser.parse_args()
    ds = load_dataset(args.dataset, args.data_dir)
    ctx = Context(ds, train_sasrec(ds, ds.fit_end), title_limit=args.title_chars)
    names = [*ALL_TOOLS, "titles"]
    shown, scores, targets = {}, {}, {}
    for split in ("train", "valid", "test"):
        samples = ds.splits[split]
        evidence = evidence_scores(ctx, samples, split)
        scores[split], shown[split] = evidence[:, :-1], digits(evidence)
        targets[split] = np.array([s.target for s in samples])
        for name in ("item_info_search", *args.without_tool):  # the former shows none
            shown[split][:, names.index(name)] = 0

    def score(weights, split, by=shown):
        totals = np.einsum("t,ntc->nc", weights, by[split])
        return ndcg_of(totals, targets[split]).mean()

    def best(most: int):
        """The weights up to `most` that rank the training split best."""
        tried = [range(1 + most * x.any()) for x in shown["train"].swapaxes(0, 1)]
        return max(itertools.product(*tried), key=lambda w: score(w, "train"))

    fitted = fit_fusion(scores["train"], targets["train"])
    print(f"learned fusion {score(fitted, 'test', scores):.3f}")
    for most in (1, 2, 3):
        weights = best(most)
        named = ", ".join(f"{n}x {name}" for n, name in zip(weights, names) if n)
        splits = ", ".join(f"{score(weights, s):.3f} {s}" for s in shown)
        print(f"best of none to {most}: {splits} ({named})", flush=True)
        if most == 1:
            for i, name in enumerate(names):  # what one piece more or less is worth
                for n in {0, 1, 2} - {weights[i]}:
                    other = [*weights[:i], n, *weights[i + 1 :]]
                    print(f"    but {name} {n}x: {score(other, 'test'):.3f} test")
    print(
        "| steps x prompts x G | trajectories | lr | N@10 | of ten seeds |\n|---|---|---|---|---|"
    )
    for steps, batch in SIZES:
        tried = {}
        for lr in (0.05, 0.1, 0.2):
            data = shown["train"], targets["train"], steps, batch, lr
            found = [train(*data, seed) for seed in range(SEEDS)]
            valid = np.mean([score(w, "valid") for w in found])
            tried[valid] = lr, [score(w, "test") for w in found]
        lr, test = tried[max(tried)]
        spread = f"{min(test):.3f} to {max(test):.3f}"
        print(
            f"| {steps} x {batch} x {G} | {steps * batch * G:,} | {lr} | {np.mean(test):.3f} | {spread} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
