"""Stage 1, list-wise GRPO: reward, group-normalised advantages and the policy-gradient update (Eq. 1, Eq. 6, Prop. 1).

For each of P prompts the policy samples G trajectories; R_g is the reward of trajectory g and b the mean of the group's
rewards, R_g's own included. The gradient estimate is  1/G sum_g (R_g - b) grad log pi(tau_g), where log pi sums the
log-probabilities of the tokens the policy wrote. Its expectation is (G - 1)/G times the true gradient (Prop. 1).

Deviations: 1. on-policy with one update a batch, so there is neither ratio nor clipping; KL is not penalised (the paper
reports no settings); 2. groups whose rewards are all equal are skipped since their gradient is exactly zero.
Variants behind flags: dividing by the group's standard deviation, leave-one-out baseline, mean over tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from model import Policy, TrainRow, micro_batches, token_logprobs
from rollout import Trajectory

BONUS = 0.1  # for ranking the positive first after at least one tool call
NOT_RANKED, INVALID = -0.5, -1.0


def ndcg(rank: int | None, k: int) -> float:
    """NDCG@k of one relevant item at `rank` (1 is first; None: not ranked): 1/log2(1 + rank), 0 beyond k."""
    return 1 / math.log2(1 + rank) if rank is not None and rank <= k else 0.0


def rank_of_positive(t: Trajectory) -> int | None:
    """1-based rank of the positive in a valid ranking; None if invalid or not ranked."""
    if t.task.pair:
        return None
    positive = t.task.sample.target + 1
    return t.answer.index(positive) + 1 if t.valid and positive in t.answer else None


def list_reward(t: Trajectory, k: int, bonus: float = BONUS) -> float:
    """Eq. 1: NDCG@k if the positive is ranked, -0.5 if a valid answer misses it, -1 if the answer is invalid."""
    if not t.valid:
        return INVALID
    rank = rank_of_positive(t)
    if rank is None:
        return NOT_RANKED
    return ndcg(rank, k) + bonus * (rank == 1 and len(t.calls) > 0)


def group_advantages(
    rewards: np.ndarray, baseline: str = "mean", divide_by_std: bool = False
) -> np.ndarray:
    """[P, G] rewards to advantages R - b; b is the inclusive group mean (Eq. 6), or "loo", the mean of the others.

    `divide_by_std` is the common GRPO variant; it weights groups by 1/std and breaks Proposition 1.
    """
    G = rewards.shape[1]
    advantages = rewards - rewards.mean(1, keepdims=True)
    if baseline == "loo":
        advantages = advantages * G / (G - 1)
    if divide_by_std:
        advantages = advantages / (rewards.std(1, keepdims=True) + 1e-6)
    return advantages


@dataclass(frozen=True)
class Objective:
    """The variants of the estimator; the defaults are the paper's."""

    baseline: str = "mean"  # or "loo"
    divide_by_std: bool = False
    token_mean: bool = False  # mean instead of sum over a trajectory's tokens
    drop_negative: bool = (
        True  # dynamic sampling: drop groups whose rewards are all negative
    )


def policy_gradient(
    policy: Policy,
    groups: list[list[Trajectory]],
    objective: Objective = Objective(),
    temperature: float = 1.0,
    micro_tokens: int = 16_384,
) -> dict[str, float]:
    """Accumulate the gradient of Eq. 6 over all groups into `.grad` and return the step's metrics.

    The mean runs over kept groups; the denominator is fixed before micro-batching, so `micro_tokens` (padded tokens
    held at once) changes memory and nothing else.
    """
    rewards = np.array([[t.reward for t in group] for group in groups])
    advantages = group_advantages(rewards, objective.baseline, objective.divide_by_std)
    flat = np.ptp(rewards, axis=1) < 1e-9
    dropped = (rewards < 0).all(1) & objective.drop_negative
    denominator = max(1, int((~dropped).sum())) * rewards.shape[1]
    metrics = {
        "zero_variance_groups": int(flat.sum()),
        "dropped_groups": int(dropped.sum()),
    }
    rows, weights, old = [], [], []
    for p in np.flatnonzero(~(flat | dropped)):
        for t, advantage in zip(groups[p], advantages[p]):
            n_actions = sum(t.action_mask)
            rows.append(TrainRow(int(p), t.ids, t.action_mask))
            weights.append(
                np.full(
                    n_actions, advantage / (n_actions if objective.token_mean else 1)
                )
            )
            old.append([logprob for logprob, m in zip(t.logprobs, t.action_mask) if m])
    if not rows:
        return metrics | {"kl_sampler_trainer": 0.0, "entropy": 0.0, "loss": 0.0}
    weight, old_logprobs = (
        torch.tensor(np.concatenate(x), dtype=torch.float32) for x in (weights, old)
    )
    done, kl, entropy, loss_sum = 0, 0.0, 0.0, 0.0
    for part_prompts, part_rows in micro_batches(
        [g[0].prompt for g in groups], rows, micro_tokens
    ):
        logprobs, entropies = token_logprobs(
            policy, part_prompts, part_rows, temperature
        )
        part = slice(done, done + len(logprobs))
        loss = -(weight[part].to(logprobs) * logprobs).sum() / denominator  # Eq. 6
        loss.backward()
        gap = logprobs.detach().cpu() - old_logprobs[part]
        kl += float((gap.exp() - 1 - gap).sum())
        entropy += float(entropies.sum())
        loss_sum += float(loss.detach())
        done += len(logprobs)
    return metrics | {
        "kl_sampler_trainer": kl / done,
        "entropy": entropy / done,
        "loss": loss_sum,
    }


def rollout_metrics(groups: list[list[Trajectory]]) -> dict[str, float]:
    """What a batch of trajectories shows: reward, valid share, tool calls, and ranks where the task is a ranking.

    `tool_rate_of_rewarded`: share of trajectories with positive reward that called a tool (Fig. 3a).
    """
    everyone = [t for group in groups for t in group]
    rewards = np.array([t.reward for t in everyone])
    rewarded = [len(t.calls) > 0 for t in everyone if t.reward > 0]
    ranks = [rank_of_positive(t) for t in everyone if t.task.pair is None]
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "ndcg@10": float(np.mean([ndcg(r, 10) for r in ranks])) if ranks else None,
        "hit@1": float(np.mean([r == 1 for r in ranks])) if ranks else None,
        "hit@10": float(np.mean([r is not None for r in ranks])) if ranks else None,
        "valid": float(np.mean([t.valid for t in everyone])),
        "tool_calls": float(np.mean([len(t.calls) for t in everyone])),
        "tool_rate_of_rewarded": float(np.mean(rewarded)) if rewarded else 0.0,
        "cut": float(np.mean([t.end == "length" for t in everyone])),
        "tokens": sum(len(t.ids) for t in everyone),
    }
