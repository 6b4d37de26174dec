"""Stage 1, list-wise GRPO: reward, group-relative advantages and the policy-gradient update (Eq. 1, Eq. 6, Prop. 1).

For each of P prompts the policy samples G trajectories; R_g is the reward of trajectory g and b the mean of the group's
rewards, R_g's own included. The gradient estimate is  1/G sum_g (R_g - b) grad log pi(tau_g), where log pi sums the
log-probabilities of the tokens the policy wrote. Its expectation is (G - 1)/G times the true gradient (Prop. 1).

Deviations: 1. on-policy with one update a batch, so there is neither ratio nor clipping; KL is not penalised (the paper
reports no settings); 2. groups whose rewards are all equal are skipped since their gradient is exactly zero; 3. with
--greedy-answer an answer's tokens have no policy gradient; to keep their form, they get the advantage of having it
where some answers of a group (neither dropped nor skipped) are well-formed and some are not.
Variants behind flags: dividing by the group's standard deviation, leave-one-out baseline, mean over tokens.
Under torchrun every rank knows all trajectories and computes the gradient of its share; train.py adds the shares up.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from model import (
    Policy,
    TrainRow,
    backward_prompts,
    micro_batches,
    share_prompts,
    token_logprobs,
    up_to_last_action,
)
from rollout import Trajectory

MICRO_TOKENS = 2048  # held at once in an update
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
    return ndcg(rank, k) + bonus * (rank == 1 and len(t.calls) > 0)  # Eq. 1


def group_advantages(
    rewards: np.ndarray, baseline: str = "mean", divide_by_std: bool = False
) -> np.ndarray:
    """[P, G] rewards to advantages R - b; b is the inclusive group mean (Eq. 6), or "loo", the mean of the others.

    `divide_by_std` is the common GRPO variant; it weights groups by 1/std and breaks Proposition 1.
    """
    G = rewards.shape[1]
    advantages = rewards - rewards.mean(1, keepdims=True)  # R_g - b of Eq. 6
    if baseline == "loo":
        advantages = advantages * G / (G - 1)
    if divide_by_std:
        advantages = advantages / (rewards.std(1, keepdims=True) + 1e-6)
    return advantages


@dataclass(frozen=True)
class Objective:
    """The variants of the estimator; the defaults are the paper's, and deviation 3."""

    baseline: str = "mean"  # or "loo"
    divide_by_std: bool = False
    token_mean: bool = False  # mean instead of sum over a trajectory's tokens
    drop_negative: bool = True  # dynamic sampling: groups of negative rewards only
    teach_form: bool = True  # to greedy answers: deviation 3 above


def policy_gradient(
    policy: Policy,
    groups: list[list[Trajectory]],
    objective: Objective = Objective(),
    temperature: float = 1.0,
    micro_tokens: int = MICRO_TOKENS,
) -> dict[str, float]:
    """Accumulate the gradient of Eq. 6 over all groups into `.grad` and return the step's metrics.

    The mean runs over the groups that dynamic sampling leaves, those of equal rewards included; the denominator is
    fixed before micro-batching, so `micro_tokens` (tokens held at once) changes memory and nothing else.
    """
    rewards = np.array([[t.reward for t in group] for group in groups])
    advantages = group_advantages(rewards, objective.baseline, objective.divide_by_std)
    flat = np.ptp(rewards, axis=1) < 1e-9
    dropped = (rewards < 0).all(1) & objective.drop_negative
    denominator = max(1, int((~dropped).sum())) * rewards.shape[1]
    metrics = {"zero_variance_groups": int(flat.sum())}
    metrics["dropped_groups"] = int(dropped.sum())
    informative = np.flatnonzero(~(flat | dropped))
    if not len(informative):
        return metrics | {"kl_sampler_trainer": None, "entropy": None, "loss": 0.0}
    own = my_share([sum(len(t.ids) for t in groups[p]) for p in informative])
    rows, weights, old_logprobs, is_sampled = [], [], [], []
    for p in informative[own]:
        formed = np.array([[t.answer is not None for t in groups[p]]], float)
        form = group_advantages(formed, objective.baseline)[0] * objective.teach_form
        for t, *gains in zip(groups[p], advantages[p], form):
            gain, kept = token_weights(t, *gains, objective.token_mean)
            rows.append(TrainRow(int(p), t.ids, kept.astype(int).tolist()))
            weights += gain[kept].tolist()
            old_logprobs += np.array(t.logprobs)[kept].tolist()
            is_sampled += np.array(t.sampled_mask, bool)[kept].tolist()
    prompts = [g[0].prompt for g in groups]
    how = {"temperature": temperature, "micro_tokens": micro_tokens}
    # Eq. 6: minus the gradient estimate, as the optimizer descends
    logprobs, entropies = accumulate(policy, prompts, rows, weights, denominator, **how)
    log_ratio = logprobs - torch.tensor(old_logprobs)
    kl = (log_ratio.exp() - 1 - log_ratio).sum()
    loss = -(torch.tensor(weights) * logprobs).sum() / denominator
    entropy = (torch.tensor(is_sampled) * entropies).sum()
    sums = [len(log_ratio), sum(is_sampled), kl, entropy, loss]
    n, n_sampled, kl, entropy, loss = over_ranks([float(x) for x in sums])
    found = {"kl_sampler_trainer": kl / n, "entropy": entropy / n_sampled, "loss": loss}
    return metrics | found


def token_weights(
    t: Trajectory, advantage: float, form_advantage: float, token_mean: bool
) -> tuple[np.ndarray, np.ndarray]:
    """[T] what multiplies each token's log-probability, and [T] which tokens have any: greedy ones only for their form."""
    sampled, action = np.array([t.sampled_mask, t.action_mask], bool)
    greedy = action & ~sampled
    n_sampled, n_greedy = 1, 1
    if token_mean:
        n_sampled, n_greedy = max(1, sampled.sum()), max(1, greedy.sum())
    gain = np.where(sampled, advantage / n_sampled, form_advantage / n_greedy)
    return gain, action if form_advantage else sampled


def accumulate(
    policy: Policy,
    prompts: list[list[int]],
    rows: list[TrainRow],
    weights: list[float] | None,
    denominator: float = 1.0,
    *,
    temperature: float = 1.0,
    micro_tokens: int = MICRO_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of -sum(weight * logprob) / denominator over the rows' action tokens to `.grad`.

    One weight an action token, row after row; None: no gradient, only look. Returns the tokens' log-probabilities and
    entropies [N] on the CPU. A prompt is computed once, and its backward waits until all of its rows have been through
    theirs. What comes after a row's last action changes none of them and is left out: a greedy answer, for the most part.

    Where parameters are sharded (`policy.score`) all ranks must make equally many forwards, and prompts go along with
    every part of their rows: a rank with less to do scores a spare token of weight 0. It does so without sharding too,
    since train.update adds up `.grad`, which every rank then has.
    """
    rows = [up_to_last_action(row) for row in rows]
    batches = list(micro_batches(prompts, rows, micro_tokens))
    n_parts = sum(len(parts) for _, parts in batches)
    spares = int(over_ranks([n_parts], "max")[0]) - n_parts
    batches += [([[0, 0]], [[TrainRow(0, [0], [1])]])] * spares
    weight = torch.tensor([*(weights or []), *[0.0] * spares])
    forward, done = policy.score or token_logprobs, 0
    found = [(torch.zeros(0), torch.zeros(0))]
    for own, parts in batches:
        cuts = []
        with torch.set_grad_enabled(weights is not None):
            shared = None if policy.score else share_prompts(policy, own, cuts)
            for part in parts:
                logprobs, entropies = forward(policy, own, part, temperature, shared)
                if weights is not None:
                    share = weight[done : done + len(logprobs)].to(logprobs)
                    (-(share * logprobs).sum() / denominator).backward()
                found.append((logprobs.detach().float().cpu(), entropies.float().cpu()))
                done += len(logprobs)
            backward_prompts(cuts)
    logprobs, entropies = (torch.cat(x)[: done - spares] for x in zip(*found))
    return logprobs, entropies


def rollout_metrics(groups: list[list[Trajectory]]) -> dict[str, float]:
    """What a batch of trajectories shows: reward, valid share, tool calls, and ranks where the task is a ranking.

    `tool_rate_of_rewarded`: share of trajectories with positive reward that called a tool (Fig. 3a).
    """
    everyone = [t for group in groups for t in group]
    ranks = [rank_of_positive(t) for t in everyone if t.task.pair is None]
    rewarded = [len(t.calls) > 0 for t in everyone if t.reward > 0]
    rewards = np.array([t.reward for t in everyone])
    metrics = {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
    shown = {
        "ndcg@10": [ndcg(r, 10) for r in ranks],
        "hit@1": [r == 1 for r in ranks],
        "hit@10": [r is not None and r <= 10 for r in ranks],
        "valid": [t.valid for t in everyone],
        "tool_calls": [len(t.calls) for t in everyone],
        "tool_rate_of_rewarded": rewarded,
        "cut": [t.end == "length" for t in everyone],
    }
    for name, values in shown.items():
        metrics[name] = float(np.mean(values)) if values else None
    return metrics | {"tokens": sum(len(t.ids) for t in everyone)}


# --------------------------------------------------------------------------------------------------- several processes


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks: 0 and 1 without torchrun."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


def over_ranks(values: list[float], how: str = "sum") -> list[float]:
    """The numbers' sums, or maxima, over all ranks; all ranks must call it."""
    if ranks()[1] == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, getattr(dist.ReduceOp, how.upper()))
    return total.tolist()


def my_share(sizes: list[int]) -> list[int]:
    """This rank's share of the items, as ascending indices; they are dealt out largest first."""
    rank, n = ranks()
    by_size = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return sorted(by_size[rank::n])


def gather_list(own: list) -> list[list]:
    """Every rank's list, on every rank."""
    lists = [own] * ranks()[1]
    if len(lists) > 1:
        dist.all_gather_object(lists, own)
    return lists
