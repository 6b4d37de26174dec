"""Stage 2, Progressive Preference Refinement: hard pairs mined from the policy's own ranking violations (Eq. 3, 4, Prop. 2).

1. `mine`: wherever the stage-1 policy did not rank the positive first, the items above it are the pool (all ranked items if
   it was missed); one is drawn at random, not the hardest.
2. `pair_tasks`: each pair is asked in both directions, which of A and B is the user MORE, and LESS, likely to choose,
   in the same user context with the same tools; the positive is A in half of the questions of each direction.
3. `pair_reward`: 1 if right, 0 if wrong, -1 if invalid; optimised with the estimator of grpo.py.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from data import Sample
from grpo import INVALID
from rollout import Task, Trajectory


@dataclass(frozen=True)
class HardPair:
    """Candidate numbers (1 to 20) of the positive and of one item that the policy ranked before it."""

    sample: int  # sample id
    positive: int
    negative: int
    rank: int | None  # of the positive when mined; None: not in the top k

    def to_json(self) -> dict:
        return asdict(self)


def violation_pool(answer: list[int], positive: int) -> list[int]:
    """Eq. 3: the items ranked before the positive; all ranked items if it is not among them; empty if it is first."""
    return answer[: answer.index(positive)] if positive in answer else list(answer)


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
        positive = t.task.sample.target + 1
        pool = violation_pool(t.answer, positive) if t.valid else []
        if not pool:
            continue
        rank = len(pool) + 1 if positive in t.answer else None
        if random_negatives:
            pool = [
                n for n in range(1, len(t.task.sample.candidates) + 1) if n != positive
            ]
        rng = np.random.default_rng([*seed, t.task.sample.id])
        pairs.append(
            HardPair(
                t.task.sample.id, positive, int(pool[rng.integers(len(pool))]), rank
            )
        )
    return pairs


def pair_tasks(
    pairs: list[HardPair],
    samples: dict[int, Sample],
    rng: np.random.Generator,
    directions: tuple[bool, ...] = (True, False),
) -> list[Task]:
    """Eq. 4: for each pair the MORE and the LESS question, next to each other; A/B order balanced in each direction."""
    asked = {}
    for more in directions:
        first = rng.permutation(
            np.arange(len(pairs)) % 2 == 0
        )  # is the positive shown as A?
        for i, pair in enumerate(pairs):
            order = (
                (pair.positive, pair.negative)
                if first[i]
                else (pair.negative, pair.positive)
            )
            asked[i, more] = Task(samples[pair.sample], order, more)
    return [asked[i, more] for i in range(len(pairs)) for more in directions]


def target_letter(task: Task) -> str:
    """The right answer: the positive's letter if asked for MORE, the other one if asked for LESS."""
    positive_is_a = task.pair[0] == task.sample.target + 1
    return "A" if positive_is_a == task.more else "B"


def pair_reward(t: Trajectory) -> float:
    """1 for the right letter, 0 for the wrong one, -1 for an invalid answer (format and budget as in Eq. 1)."""
    if not t.valid:
        return INVALID
    return float(t.answer == target_letter(t.task))


def bidirectional_loss(delta: torch.Tensor) -> torch.Tensor:
    """-log P_pos - log P_neg = 2 log(1 + e^-delta) for delta = s(c+) - s(c-); at least 2 log 2 * 1[delta < 0] (Prop. 2)."""
    return 2 * torch.nn.functional.softplus(-delta)
