"""Stage 2, Progressive Preference Refinement: hard pairs mined from the policy's own ranking violations (Eq. 3, 4, Prop. 2).

1. `mine`: wherever the stage-1 policy did not rank the positive first, the items above it are the pool (all ranked items if
   it was missed); one is drawn at random, not the hardest.
2. `pair_tasks`: each pair is asked in both directions, which of A and B is the user MORE, and LESS, likely to choose,
   in the same user context with the same tools; the positive is A in half of the questions of each direction.
3. `pair_reward`: 1 if right, 0 if wrong, -1 if invalid; optimised with the estimator of grpo.py.
4. `bound_gradient` instead minimises the bound of Prop. 2 itself. The paper does not say in which context: ours keeps the
   calls and observations of each sampled trajectory and forces `<answer>\\boxed{` right after them, without a last
   thought, which would name the answer. So this objective trains how evidence is read, not which calls are made.
"""

import pathlib
from dataclasses import dataclass

import numpy as np
import torch

from data import Sample, read_jsonl, reading
from grpo import INVALID, MICRO_TOKENS, accumulate, list_reward, my_share, over_ranks
from model import Policy, TrainRow
from rollout import Task, Trajectory
from tools import Context, tool_scores

DIRECTIONS = {"both": (True, False), "more": (True,), "less": (False,)}
FORCED = "<answer>\\boxed{"


@dataclass(frozen=True)
class HardPair:
    """Candidate numbers (1 to 20) of the positive and of one item that the policy ranked before it."""

    sample: int  # sample id
    positive: int
    negative: int
    rank: int | None  # of the positive when mined; None: not in the top k


def read_pairs(path: pathlib.Path) -> list[HardPair]:
    """The pairs that train.py mined; DatasetError if the file is damaged."""
    with reading(path):
        return [HardPair(**pair) for pair in read_jsonl(path)]


def violation_pool(answer: list[int], positive: int) -> list[int]:
    """Eq. 3: the items ranked before the positive; all ranked items if it is not among them; empty if it is first."""
    before = answer.index(positive) if positive in answer else len(answer)
    return answer[:before]  # Eq. 3


def mine(
    trajectories: list[Trajectory],
    seed: tuple[int, ...],
    random_negatives: bool = False,
) -> list[HardPair]:
    """One pair for each valid answer that violates the preference; the draw is uniform over the pool.

    `random_negatives` draws from all other candidates instead (the control for "are hard pairs better?").
    """
    pairs = []
    for t in trajectories:
        sample = t.task.sample
        positive = sample.target + 1
        pool = violation_pool(t.answer, positive) if t.valid else []
        if not pool:
            continue
        rank = len(pool) + 1 if positive in t.answer else None
        if random_negatives:
            pool = [n for n in range(1, len(sample.candidates) + 1) if n != positive]
        rng = np.random.default_rng([*seed, sample.id])
        negative = int(pool[rng.integers(len(pool))])
        pairs.append(HardPair(sample.id, positive, negative, rank))
    return pairs


def ordered(
    ctx: Context, tools: tuple[str, ...], sample: Sample, pair: HardPair
) -> str:
    """How the tools' summed scores order a pair, for --ppr-pairs (ours): "right", "wrong" or "equal"."""
    scores = np.zeros(len(sample.candidates))
    scores = sum((tool_scores(ctx, name, sample) for name in tools), scores).round(9)
    gap = scores[pair.positive - 1] - scores[pair.negative - 1]
    return "right" if gap > 0 else "wrong" if gap < 0 else "equal"


def pair_tasks(
    pairs: list[HardPair],
    samples: dict[int, Sample],
    rng: np.random.Generator,
    directions: tuple[bool, ...] = (True, False),
) -> list[Task]:
    """Eq. 4: for each pair the MORE and the LESS question, next to each other; A/B order balanced in each direction.

    Where the number of pairs is odd, one letter has one positive more: drawn for each direction, else it would tell.
    """
    tasks, places = [], np.arange(len(pairs))
    coins = [rng.integers(2) for _ in directions]
    shown_as_a = [rng.permutation((places + coin) % 2 == 0) for coin in coins]
    for i, pair in enumerate(pairs):
        for more, positive_is_a in zip(directions, shown_as_a):
            order = (pair.positive, pair.negative)
            order = order if positive_is_a[i] else order[::-1]
            tasks.append(Task(samples[pair.sample], order, more))  # Eq. 4
    return tasks


def target_letter(task: Task) -> str:
    """The right answer: the positive's letter if asked for MORE, the other one if asked for LESS."""
    positive_is_a = task.pair[0] == task.sample.target + 1
    return "A" if positive_is_a == task.more else "B"


def pair_reward(t: Trajectory) -> float:
    """1 for the right letter, 0 for the wrong one, -1 for an invalid answer (format and budget as in Eq. 1)."""
    return float(t.answer == target_letter(t.task)) if t.valid else INVALID


def reward(ctx: Context, t: Trajectory, k: int, bonus: float) -> float:
    """What both stages and eval.py reward: change it here. `ctx` holds the catalogue, for rewards of price or novelty.

    A group whose rewards are all negative is dropped (dynamic sampling), so negative has to mean "no use at all".
    """
    return pair_reward(t) if t.task.pair else list_reward(t, k, bonus)


def bidirectional_loss(delta: torch.Tensor) -> torch.Tensor:
    """-log P_pos - log P_neg = 2 log(1 + e^-delta) for delta = s(c+) - s(c-); at least 2 log 2 * 1[delta < 0] (Prop. 2)."""
    return 2 * torch.nn.functional.softplus(-delta)  # Prop. 2


def letter_rows(policy: Policy, t: Trajectory, prompt: int) -> list[TrainRow]:
    """The evidence of a trajectory followed by the right and by the wrong letter, the only action token."""
    end = max((i for i, m in enumerate(t.action_mask, 1) if not m), default=0)
    head = t.ids[:end] + policy.encode(FORCED)
    right = target_letter(t.task)
    letters = (right, "B" if right == "A" else "A")
    mask = [0] * len(head) + [1]
    return [TrainRow(prompt, head + policy.encode(x)[-1:], mask) for x in letters]


def bound_gradient(
    policy: Policy, groups: list[list[Trajectory]], micro_tokens: int = MICRO_TOKENS
) -> dict[str, float]:
    """Accumulate the gradient of Prop. 2's bound, its mean over pairs and trajectories, into `.grad`; returns metrics.

    delta = log p(right letter) - log p(wrong letter) estimates s(c+) - s(c-), so that a MORE question contributes
    -log P_pos = log(1 + e^-delta) and a LESS question -log P_neg. Two passes: the first finds every delta, the second
    accumulates d log(1 + e^-delta) = -sigmoid(-delta) d delta.
    """
    pairs = {(g[0].task.sample.id, frozenset(g[0].task.pair)) for g in groups}
    denominator = len(pairs) * len(groups[0])
    rows = []
    for p in my_share([sum(len(t.ids) for t in g) for g in groups]):
        rows += [row for t in groups[p] for row in letter_rows(policy, t, p)]
    prompts = [g[0].prompt for g in groups]
    logprobs, _ = accumulate(policy, prompts, rows, None, micro_tokens=micro_tokens)
    delta = logprobs[0::2] - logprobs[1::2]
    push = torch.sigmoid(-delta)
    weights = torch.stack([push, -push], 1).flatten().tolist()
    accumulate(policy, prompts, rows, weights, denominator, micro_tokens=micro_tokens)
    sums = [len(delta), (delta > 0).sum(), bidirectional_loss(delta).sum() / 2]
    n, right, loss = over_ranks([float(x) for x in sums])
    return {"pair_accuracy": right / n, "bound": loss / denominator}
