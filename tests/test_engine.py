"""The engine against dense computations: shared-prefix gradients, ragged sampling, stopping, masks and memory."""

import contextlib
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch.optim import Muon
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import model as model_module
import rollout as rollout_module
from grpo import Objective, accumulate, policy_gradient
from model import (
    Float32Muon,
    LoRA,
    RaggedBatch,
    TrainRow,
    add_lora,
    checkpoint_layers,
    load_policy,
    plain_copy,
    sample_tokens,
    save_policy,
    share_prompts,
    token_logprobs,
)
from rollout import Task, demonstrate, rollout


def random_rows(policy, prompt_lengths, suffixes, seed=0):
    """Prompts and rows of random ids with random action masks; `suffixes` lists the lengths for each prompt."""
    rng = np.random.default_rng(seed)
    V = policy.model.config.vocab_size
    prompts = [rng.integers(V, size=n).tolist() for n in prompt_lengths]
    rows = []
    for p, lengths in enumerate(suffixes):
        for n in lengths:
            mask = (rng.random(n) < 0.6).astype(int)
            mask[-1] = 1
            rows.append(TrainRow(p, rng.integers(V, size=n).tolist(), mask.tolist()))
    return prompts, rows


def dense_logprobs(policy, prompts, rows, temperature=1.0):
    """Unshared reference: transformers' own attention over each whole sequence."""
    policy.model.set_attn_implementation("sdpa")
    parts = []
    for r in rows:
        ids = torch.tensor([prompts[r.prompt] + r.ids])
        logits = policy.model(ids).logits[0, :-1] / temperature
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        parts.append(logprobs[-len(r.ids) :][torch.tensor(r.action_mask).bool()])
    policy.model.set_attn_implementation("shared_prefix")
    return torch.cat(parts)


def exact_norm(self, x):
    """RMSNorm in the dtype of its input (transformers' own rounds fp64 to fp32)."""
    return (
        self.weight
        * x
        * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    )


def gradient(policy, value):
    policy.model.zero_grad()
    value.backward(retain_graph=True)
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_shared_prefix_gradient_equals_the_dense_one(
    policy, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    policy.model.to(getattr(torch, dtype))
    prompts, rows = random_rows(policy, [17, 5, 2], [[9, 23, 1], [4], [12, 3]])
    weight = torch.randn(
        sum(sum(r.action_mask) for r in rows), dtype=getattr(torch, dtype)
    )
    shared, _ = token_logprobs(policy, prompts, rows, 0.7)
    got = gradient(policy, (shared * weight).sum())
    dense = dense_logprobs(policy, prompts, rows, 0.7)
    want = gradient(policy, (dense * weight).sum())
    if dtype == "float32":
        assert torch.allclose(shared, dense, atol=1e-4)
    assert (got - want).norm() / want.norm() < tolerance


def alike(prompts, n=70):
    """The prompts behind n tokens that they share, as behind a system prompt."""
    begin = list(range(5, 5 + n))
    return [begin + p for p in prompts]


def forwarded(monkeypatch):
    """Lists the lengths of the sequences of every packed forward."""
    seen, real = [], model_module.forward_packed

    def watching(policy, model, sequences, *more):
        seen.append(list(map(len, sequences)))
        return real(policy, model, sequences, *more)

    monkeypatch.setattr(model_module, "forward_packed", watching)
    return seen


def test_what_all_prompts_begin_with_is_computed_once(policy, monkeypatch):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    policy.model.double()
    prompts, rows = random_rows(policy, [17, 5, 2], [[9, 23, 1], [4], [12, 3]])
    prompts = alike(prompts)
    weight = torch.randn(sum(sum(r.action_mask) for r in rows), dtype=torch.float64)
    dense = dense_logprobs(policy, prompts, rows)
    want = gradient(policy, (dense * weight).sum())
    seen = forwarded(monkeypatch)
    shared = share_prompts(policy, prompts)
    logprobs, _ = token_logprobs(policy, prompts, rows, shared=shared)
    got = gradient(policy, (logprobs * weight).sum())
    assert seen == [[70], [16, 4, 1], [9, 23, 1, 4, 12, 3]]
    assert (got - want).norm() / want.norm() < 1e-9
    share_prompts(policy, prompts[:1])
    assert seen[3:] == [[86]], "one prompt shares with nobody"
    token_logprobs(policy, prompts, rows)
    assert seen[4:] == [[86, 74, 71], [9, 23, 1, 4, 12, 3]], "two forwards, always"


def test_attention_of_the_last_tokens_looks_back_only():
    """Where torch's own kernels attend, on a GPU or over long sequences: 7 of 12 tokens, each kv head for two heads."""
    q, k, v = (torch.randn(1, h, t, 16).double() for h, t in ((4, 7), (2, 12), (2, 12)))
    every = [x.requires_grad_() for x in (q, k, v)]
    found = model_module.whole_attention(*every, 0.3)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    hidden = torch.ones(7, 12, dtype=torch.bool).triu(6)
    scores = (0.3 * q @ keys.mT).masked_fill(hidden, -torch.inf)
    want = scores.softmax(-1) @ values
    assert torch.allclose(found, want)
    weight = torch.randn_like(want)
    one, two = (torch.autograd.grad((x * weight).sum(), every) for x in (found, want))
    assert all(torch.allclose(a, b) for a, b in zip(one, two))


def test_sampling_behind_a_shared_beginning(policy, monkeypatch):
    prompts, seen = alike([[3, 9, 4], [8], [9, 9]]), forwarded(monkeypatch)
    batch = RaggedBatch(policy, 4, 1)
    batch.prefill([0, 3], prompts[:2])
    batch.prefill([1], prompts[2:])
    logits = batch.decode([0, 1, 3], [prompts[i][-1] for i in (0, 2, 1)])
    assert seen == [[69], [3, 1], [71]], "a prompt's last token is not of the prefix"
    policy.model.set_attn_implementation("eager")
    for i, got in zip((0, 2, 1), logits):
        want = policy.model(torch.tensor([prompts[i]])).logits[0, -1]
        assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("micro_tokens", [1, 40, 90, 10_000])
@pytest.mark.parametrize("begin", [0, 70])
def test_gradient_does_not_depend_on_micro_batches(
    policy, micro_tokens, begin, monkeypatch
):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    policy.model.double()
    prompts, rows = random_rows(policy, [11, 7, 3], [[9, 2, 14], [5, 5], [8]])
    prompts = alike(prompts, begin)
    weight = torch.randn(sum(sum(r.action_mask) for r in rows))
    logprobs, want_entropies = token_logprobs(policy, prompts, rows, 0.7)
    want = gradient(policy, (logprobs * -weight / 3).sum())
    policy.model.zero_grad()
    weights = weight.tolist()
    how = {"temperature": 0.7, "micro_tokens": micro_tokens}
    got_logprobs, entropies = accumulate(policy, prompts, rows, weights, 3, **how)
    got = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert (got - want).norm() / want.norm() < 1e-9
    assert torch.allclose(got_logprobs, logprobs.detach().float(), atol=1e-6)
    assert torch.allclose(entropies, want_entropies.float(), atol=1e-6)


def test_the_gradient_is_what_finite_differences_say(policy, monkeypatch):
    """Along a random direction, through the model's own dense forward: no autograd on either side of the comparison."""
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    policy.model.double()
    prompts, rows = random_rows(policy, [11, 7], [[9, 2, 14], [5]])
    weight = torch.randn(sum(sum(r.action_mask) for r in rows))
    accumulate(policy, prompts, rows, weight.tolist(), 3, micro_tokens=30)
    parameters = list(policy.model.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(parameters, directions):
                p += step * d
            values.append(-float((dense_logprobs(policy, prompts, rows) * weight).sum()) / 3)  # fmt: skip
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_a_prompt_is_computed_once_though_its_rows_come_in_parts(policy, monkeypatch):
    prompts, rows = random_rows(policy, [40, 7], [[9, 5, 12], [6]])
    weights = [1.0] * sum(sum(r.action_mask) for r in rows)
    seen = forwarded(monkeypatch)
    accumulate(policy, prompts, rows, weights, micro_tokens=55)
    assert seen == [[39], [9, 5], [12], [6], [6]]


def test_what_is_behind_the_last_action_is_left_out(policy, monkeypatch):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    policy.model.double()
    prompts, rows = random_rows(policy, [11, 7], [[9, 20, 14], [5]])
    for row, n in zip(rows, (4, 12, 0, 5)):
        row.action_mask[n:] = [0] * (len(row.ids) - n)
    weight = torch.randn(sum(sum(r.action_mask) for r in rows), dtype=torch.float64)
    dense = dense_logprobs(policy, prompts, rows)
    want = gradient(policy, -(dense * weight).sum())
    policy.model.zero_grad()
    seen = forwarded(monkeypatch)
    accumulate(policy, prompts, rows, weight.tolist())
    got = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert (got - want).norm() / want.norm() < 1e-6  # weights pass through float32
    ends = [
        max((i + 1 for i, m in enumerate(r.action_mask) if m), default=1) for r in rows
    ]
    assert ends[2] == 1 and max(ends) <= 12, "nothing to leave out"
    assert seen == [[10, 6], ends]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("new", "old"), [(2, 0), (300, 0), (600, 0), (257, 100)])
def test_attention_in_blocks_is_the_dense_one(dtype, new, old):
    torch.manual_seed(0)
    H, K, D, T = 4, 2, 8, new + old
    dtype = getattr(torch, dtype)
    q, k, v = (
        torch.randn(n, t, D, dtype=dtype, requires_grad=True)
        for n, t in ((H, new), (K, T), (K, T))
    )
    bias = torch.full((new + 64, T + 64), -torch.inf, dtype=dtype).triu(old + 1)
    parts = [x.split(old or T, 1) for x in (k, v)]
    got = model_module.causal_attention(q, *parts, bias, 0.3)
    hidden = torch.ones(new, T).triu(old + 1).bool()
    wide = [x.double().repeat_interleave(H // K, 0) for x in (k, v)]
    scores = (q.double() @ wide[0].transpose(1, 2) * 0.3).masked_fill(hidden, -1e9)
    want = scores.softmax(-1) @ wide[1]
    weight = torch.randn(want.shape).double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - want).norm() / want.norm() < tolerance
    ours = torch.autograd.grad((got * weight).sum(), (q, k, v))
    right = torch.autograd.grad((want * weight).sum(), (q, k, v))
    for a, b in zip(ours, right):
        assert (a - b).norm() / b.norm() < tolerance


def test_attention_in_blocks_skips_what_no_query_sees(monkeypatch):
    scores, real = [], torch.baddbmm
    monkeypatch.setattr(
        torch, "baddbmm", lambda *a, **k: scores.append(real(*a, **k)) or scores[-1]
    )
    q, bias = torch.randn(2, 1024, 8), torch.zeros(1088, 1088)
    model_module.causal_attention(q, (q,), (q,), bias, 1.0)
    assert sum(s.numel() for s in scores) == 2 * 256 * (256 + 512 + 768 + 1024)


def scripted(policy, ctx, monkeypatch, seed=3):
    """Make the sampler write demonstrations (each row another one), so that rollouts have several turns."""
    scripts = {}

    def forced(logits, temperature, uniform, greedy):
        tokens, _ = sample_tokens(logits, temperature, uniform, greedy)
        logprobs = torch.log_softmax(logits / temperature, -1)
        ready = [r for r in forced.rows() if r and not r.trajectory.end]
        ready = [r for r in ready if len(r.pending) == 1]
        for b, row in enumerate(ready):
            key = id(row)
            if key not in scripts:
                rng = np.random.default_rng([seed, len(scripts)])
                scripts[key] = demonstrate(policy, ctx, row.trajectory.task, 10, rng)
            tokens[b] = scripts[key].ids[len(row.trajectory.ids)]
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    live = []
    original = rollout_module.Rollout.refill

    def refill(self):
        original(self)
        live[:] = [self.rows]

    forced.rows = lambda: live[0]
    monkeypatch.setattr(rollout_module.Rollout, "refill", refill)
    monkeypatch.setattr(rollout_module, "sample_tokens", forced)


CALL = '<answer><tool_call>{"name": "get_user_profile", "arguments": {}}</tool_call>'


def test_only_the_answer_is_greedy_and_it_learns_no_more_than_its_form(
    policy, ctx, monkeypatch
):
    """A call that mentions <answer>, then an opened answer after which the policy writes what it likes."""
    call, scripts = policy.encode(CALL), {}

    def forced(logits, temperature, uniform, greedy):
        tokens, _ = sample_tokens(logits, temperature, uniform, greedy)
        ready = [r for r in live[0] if r and not r.trajectory.end]
        for b, row in enumerate(r for r in ready if len(r.pending) == 1):
            thought = f"<think>{len(scripts)}</think><answer>"
            rest = scripts.setdefault(id(row), call + policy.encode(thought))
            if rest:
                tokens[b] = rest.pop(0)
        logprobs = torch.log_softmax(logits / temperature, -1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    live, refill = [], rollout_module.Rollout.refill

    def watched(self):
        refill(self)
        live[:] = [self.rows]

    monkeypatch.setattr(rollout_module.Rollout, "refill", watched)
    monkeypatch.setattr(rollout_module, "sample_tokens", forced)
    tasks = [Task(s) for s in ctx.ds.splits["train"][:2]]
    groups = rollout(
        policy, ctx, tasks, group_size=2, temperature=1.5, greedy_answer=True,
        max_new_tokens=360,
    )  # fmt: skip
    assert not any(t.valid for group in groups for t in group)
    groups[1][0].answer = [*range(1, 11)]  # the other's form is what it has to teach
    opening, first = policy.encode("<answer>")[0], len(call)
    # well-formed answers, invalid for a call before them: nothing to teach
    for t in groups[0]:
        t.answer = [*range(1, 11)]
    groups[0][1].malformed = True
    total = taught = total_mean = taught_mean = 0.0
    entropies = []
    for group, form in zip(groups, (0.0, 0.5)):
        for sign, t in zip((1, -1), group):
            t.reward = 0.5 + 0.5 * sign
            again = t.ids.index(opening, first)
            actions = [i for i, action in enumerate(t.action_mask) if action]
            sampled = {0, *range(first, again + 1)} & set(actions)
            answer = [i for i in actions if i > again]
            assert len(answer) > 3
            assert [i for i, chance in enumerate(t.sampled_mask) if chance] == sorted(sampled)  # fmt: skip
            ids = torch.tensor([t.prompt + t.ids])
            logits = policy.model(ids).logits[0, len(t.prompt) - 1 : -1]
            written = logits[answer].gather(1, ids[0, len(t.prompt) :][answer, None])
            assert (written[:, 0] > logits[answer].amax(-1) - 1e-4).all()
            logprobs = torch.log_softmax(logits / 1.5, -1)
            chosen = logprobs[range(len(t.ids)), t.ids]
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            entropies.append(entropy[sorted(sampled)].detach())
            total = total - sign * 0.5 * chosen[sorted(sampled)].sum() / 4
            taught = taught - sign * form * chosen[answer].sum() / 4
            total_mean = total_mean - sign * 0.5 * chosen[sorted(sampled)].mean() / 4
            taught_mean = taught_mean - sign * form * chosen[answer].mean() / 4
    for flag, mean, loss in (
        (True, False, total + taught),
        (False, False, total),
        (True, True, total_mean + taught_mean),
    ):
        want = gradient(policy, loss)
        policy.model.zero_grad()
        objective = Objective(teach_form=flag, token_mean=mean)
        found = policy_gradient(policy, groups, objective, temperature=1.5)
        assert found["entropy"] == pytest.approx(float(torch.cat(entropies).mean()))
        got = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
        assert (got - want).norm() / want.norm() < 5e-4


class Replayed:
    """Stands in for a CUDA graph: computes anew from the tensors that its step was captured with, into the same result."""

    def __init__(self, step):
        self.step, self.out, self.times = step, step(), 0

    def replay(self):
        self.out.copy_(self.step())
        self.times += 1


@pytest.mark.parametrize("graphs", [False, True])
def test_sampler_logprobs_equal_teacher_forcing(policy, ctx, monkeypatch, graphs):
    """Several turns, observations of different lengths, finished rows, refilled slots."""
    made = []

    def capture(step):
        made.append(Replayed(step))
        return made[-1], made[-1].out

    monkeypatch.setattr(model_module, "capture", capture)
    policy.graphs = graphs
    scripted(policy, ctx, monkeypatch)
    tasks = [Task(s) for s in ctx.ds.splits["train"][:5]]
    groups = rollout(
        policy, ctx, tasks, group_size=3, slots=2, temperature=0.8, max_new_tokens=700
    )
    trajectories = [t for g in groups for t in g]
    assert len({len(t.calls) for t in trajectories}) > 2
    assert all(t.end == "answer" and t.valid for t in trajectories)
    prompts = [g[0].prompt for g in groups]
    rows = [TrainRow(p, t.ids, t.action_mask) for p, g in enumerate(groups) for t in g]
    with torch.no_grad():
        dense = dense_logprobs(policy, prompts, rows, 0.8)
    sampled = torch.tensor(
        [lp for t in trajectories for lp, m in zip(t.logprobs, t.action_mask) if m]
    )
    assert (sampled - dense).abs().max() < 1e-4
    replays = sum(graph.times for graph in made)
    assert (len(made) > 1 and replays > 10 * len(made)) if graphs else not made


def test_what_cannot_be_captured_is_said_in_a_line(monkeypatch):
    """With stand-ins for what only a GPU has: `step` runs once to warm up and once in the capture."""
    stream, seen = types.SimpleNamespace(wait_stream=lambda other: None), []
    same = {"Stream": stream, "current_stream": stream, "CUDAGraph": "graph"}
    for name, made in same.items():
        monkeypatch.setattr(torch.cuda, name, lambda made=made: made)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    captures = lambda graph, stream: contextlib.nullcontext()
    monkeypatch.setattr(torch.cuda, "graph", captures)

    def step():
        seen.append(1)
        if len(seen) == 4:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return len(seen)

    assert model_module.capture(step) == ("graph", 2)
    with pytest.raises(model_module.ModelError, match="here: operation not permitted$"):
        model_module.capture(step)


def test_demonstrations_call_only_the_tools_that_the_flags_leave(policy, ctx):
    rng, allowed = np.random.default_rng(0), ("get_user_profile", "get_similar_users")
    for sample in ctx.ds.splits["train"][:20]:
        t = demonstrate(policy, ctx, Task(sample), 10, rng, allowed=allowed)
        assert {call.name for call in t.calls} <= set(allowed)


def test_demonstrations_ask_again_as_often_as_told(policy, ctx):
    task, calls, twice = Task(ctx.ds.splits["train"][0]), {}, {}
    for share in (0.0, 1.0):
        rng = np.random.default_rng(0)
        shown = [
            demonstrate(policy, ctx, task, 10, rng, max_steps=3, ask_again=share)
            for _ in range(200)
        ]
        names = [[call.name for call in t.calls] for t in shown]
        calls[share] = sum(map(len, names))
        twice[share] = sum(len(set(x)) < len(x) for x in names)
    assert calls[1] / calls[0] == pytest.approx(1.5, abs=0.15)  # half of them again
    assert twice[0] < 20 and twice[1] > 80  # of 200


def test_demonstrations_without_tools_rank_at_random(policy, ctx):
    rng, task = np.random.default_rng(0), Task(ctx.ds.splits["train"][0])
    how = {"max_steps": 0, "allowed": ()}
    shown = [demonstrate(policy, ctx, task, 10, rng, **how) for _ in range(300)]
    assert all(t.valid and not t.calls for t in shown)
    firsts = np.bincount([t.answer[0] for t in shown], minlength=21)[1:]
    assert firsts.min() > 3 and firsts.max() < 32  # 15 each on average


def test_tokens_do_not_depend_on_slots_or_neighbours(policy, ctx):
    tasks = [Task(s) for s in ctx.ds.splits["train"][:6]]
    args = {"group_size": 2, "max_new_tokens": 40, "seed": (5, 1)}
    few = rollout(policy, ctx, tasks, slots=1, **args)
    many = rollout(policy, ctx, tasks, slots=6, **args)
    assert [[t.ids for t in g] for g in few] == [[t.ids for t in g] for g in many]


def test_greedy_equals_generate(policy, ctx):
    """Greedy text equals transformers' own generate with its own attention and cache."""
    tasks = [Task(s) for s in ctx.ds.splits["train"][:3]]
    groups = rollout(policy, ctx, tasks, group_size=2, temperature=0, max_new_tokens=30)
    policy.model.set_attn_implementation("sdpa")
    for group in groups:
        prompt = torch.tensor([group[0].prompt])
        out = policy.model.generate(
            prompt,
            max_new_tokens=30,
            do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
        n = [*group[0].action_mask, 0].index(0)  # up to the first observation
        assert group[0].ids[:n] == out[0, prompt.shape[1] :].tolist()[:n]
        assert group[0].ids == group[1].ids


@pytest.mark.parametrize("few", [0, 100])  # rows apart from the batch: always, never
def test_extend_then_decode_equals_one_forward(policy, monkeypatch, few):
    """Tokens fed in chunks at different positions of different rows give the dense logits."""
    monkeypatch.setattr(model_module, "FEW", few)
    rng = np.random.default_rng(0)
    V = policy.model.config.vocab_size
    prompts = [rng.integers(V, size=n).tolist() for n in (9, 4)]
    batch = RaggedBatch(policy, 2, 2)
    batch.prefill([0, 1], prompts)
    suffix = [rng.integers(V, size=n).tolist() for n in (3, 80, 5, 1)]
    for b in range(4):
        fed = [prompts[b // 2][-1], *suffix[b]]
        if len(fed) > 1:
            batch.extend([b], [fed[:-1]])
    logits = {}
    for some in ([3, 0, 2], [1]):
        found = batch.decode(some, [suffix[b][-1] for b in some])
        logits |= dict(zip(some, found))
    policy.model.set_attn_implementation("eager")
    for b in range(4):
        want = policy.model(torch.tensor([prompts[b // 2] + suffix[b]])).logits[0, -1]
        assert torch.allclose(logits[b], want, atol=1e-4)


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3]])).expand(3000, 3)
    uniform = torch.linspace(0, 1, 3001)[:-1] + 0.5 / 3000
    drawn = torch.zeros(3000, dtype=torch.bool)
    tokens, logprobs = sample_tokens(logits, 1.0, uniform, drawn)
    counts = torch.bincount(tokens, minlength=3).float() / 3000
    assert torch.allclose(counts, torch.tensor([0.1, 0.6, 0.3]), atol=1e-3)
    assert torch.allclose(logprobs.exp(), torch.tensor([0.1, 0.6, 0.3])[tokens])
    for temperature, greedy in (0.0, drawn), (1.0, ~drawn):
        tokens, logprobs = sample_tokens(logits, temperature, uniform, greedy)
        assert (tokens == 1).all() and torch.allclose(logprobs.exp(), torch.tensor(0.6))


def test_saved_policy_loads_and_answers_alike(policy, ctx, tmp_path):
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path))
    tasks = [Task(ctx.ds.splits["test"][0])]
    args = {"group_size": 2, "max_new_tokens": 30}
    assert (
        rollout(policy, ctx, tasks, **args)[0][1].ids
        == rollout(again, ctx, tasks, **args)[0][1].ids
    )


def test_plain_forward_is_causal_without_a_past(policy):
    ids = torch.randint(policy.model.config.vocab_size, (2, 12))
    ours = policy.model(ids).logits
    policy.model.set_attn_implementation("eager")
    assert torch.allclose(ours, policy.model(ids).logits, atol=1e-5)


def test_tiny_learning_rate_moves_a_bf16_policy(policy):
    """Weights stay fp32 under bf16 compute: a step of 1e-6 is not swallowed."""
    policy.dtype = torch.bfloat16
    prompts, rows = random_rows(policy, [8], [[6, 4]])
    logprobs, _ = token_logprobs(policy, prompts, rows)
    before = [p.detach().clone() for p in policy.model.parameters()]
    optimizer = torch.optim.AdamW(policy.model.parameters(), 1e-6, weight_decay=0)
    logprobs.sum().backward()
    optimizer.step()
    moved = [
        (p != b).float().mean().item()
        for p, b in zip(policy.model.parameters(), before)
    ]
    assert np.mean(moved) > 0.5


def test_rounded_lengths_in_bf16_change_nothing(policy):
    """In bf16 keys and queries are padded to few lengths; the gradient stays that of fp32 up to bf16's rounding."""
    prompts, rows = random_rows(policy, [9, 70], [[5, 63, 64, 65], [1, 40]])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        policy.dtype = dtype
        logprobs, _ = token_logprobs(policy, prompts, rows)
        policy.model.zero_grad()
        logprobs.sum().backward()
        found += [
            logprobs.detach(),
            policy.model.model.embed_tokens.weight.grad.clone(),
        ]
    exact, exact_grad, near, near_grad = found
    assert torch.allclose(exact, near, atol=0.05)
    assert (exact_grad - near_grad).norm() < 0.02 * exact_grad.norm()


def flat_gradients(policy):
    return {n: p.grad for n, p in policy.model.named_parameters() if p.requires_grad}


def lora_policy(policy, rank=3):
    """The policy with adapters that are not zero, so that both factors have a gradient."""
    add_lora(policy, rank)
    for name, parameter in policy.model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def test_lora_gradient_is_the_full_one_on_the_adapted_product(policy, monkeypatch):
    """dL/dB = scale dL/dW A^T and dL/dA = scale B^T dL/dW, dL/dW from a plain model with the merged weights."""
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    lora_policy(policy).model.double()
    prompts, rows = random_rows(policy, [7, 4], [[9, 3], [5]])
    token_logprobs(policy, prompts, rows)[0].sum().backward()
    trained = flat_gradients(policy)
    adapters = {n: m for n, m in policy.model.named_modules() if isinstance(m, LoRA)}
    assert len(trained) == 2 * len(adapters) == 2 * 7 * 2
    policy.model = plain_copy(policy.model, torch.float64).requires_grad_()
    policy.model.zero_grad()
    token_logprobs(policy, prompts, rows)[0].sum().backward()
    full = flat_gradients(policy)
    for name, m in adapters.items():
        weight = full[f"{name}.weight"] * m.scale
        assert torch.allclose(trained[f"{name}.b"], weight @ m.a.T, rtol=1e-9)
        assert torch.allclose(trained[f"{name}.a"], m.b.T @ weight, rtol=1e-9)


def test_lora_samples_and_saves_plain_merged_weights(policy, ctx, tmp_path):
    names = list(policy.model.state_dict())
    lora_policy(policy)
    prompts, rows = random_rows(policy, [7, 4], [[9, 3], [5]])
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path))
    assert list(again.model.state_dict()) == names
    with torch.no_grad():
        want = token_logprobs(policy, prompts, rows)[0]
        assert torch.allclose(token_logprobs(again, prompts, rows)[0], want, atol=1e-5)
    tasks, args = [Task(ctx.ds.splits["test"][0])], {"group_size": 2}
    ours, theirs = (
        rollout(p, ctx, tasks, max_new_tokens=30, **args)[0] for p in (policy, again)
    )
    assert [t.ids for t in ours] == [t.ids for t in theirs]


def test_gradient_checkpointing_recomputes_and_changes_nothing(policy, monkeypatch):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    policy.model.double()
    prompts, rows = random_rows(policy, [11, 7], [[9, 2, 14], [5]])
    want = gradient(policy, token_logprobs(policy, prompts, rows)[0].sum())
    checkpoint_layers(policy)
    forwards = []
    for layer in policy.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    logprobs = token_logprobs(policy, prompts, rows)[0]
    assert len(forwards) == 4, "two layers, once for the prompts and once for the rows"
    got = gradient(policy, logprobs.sum())
    assert len(forwards) == 8
    assert torch.allclose(got, want, rtol=1e-12)


def test_sampler_and_trainer_agree_in_bf16(policy, ctx):
    """The sampler's matrices are cast once, the trainer's at each use; both see the same numbers."""
    policy.dtype = torch.bfloat16
    tasks = [Task(s) for s in ctx.ds.splits["train"][:3]]
    groups = rollout(policy, ctx, tasks, group_size=3, max_new_tokens=60)
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
    assert all(p.requires_grad for p in policy.model.parameters())
    rows = [TrainRow(p, t.ids, t.action_mask) for p, g in enumerate(groups) for t in g]
    sampled = [
        x for g in groups for t in g for x, m in zip(t.logprobs, t.action_mask) if m
    ]
    with torch.no_grad():
        trained, _ = token_logprobs(policy, [g[0].prompt for g in groups], rows)
    gap = trained - torch.tensor(sampled)
    assert (gap.exp() - 1 - gap).mean() < 1e-4


def test_only_action_tokens_reach_the_vocabulary(policy, ctx):
    """Logits are computed for tokens to sample and for action tokens, not for prompts and observations."""
    seen = []
    policy.model.lm_head.register_forward_hook(
        lambda _, inputs, output: seen.append(len(output))
    )
    tasks = [Task(s) for s in ctx.ds.splits["train"][:2]]
    groups = rollout(policy, ctx, tasks, group_size=2, max_new_tokens=40)
    rows = [TrainRow(p, t.ids, t.action_mask) for p, g in enumerate(groups) for t in g]
    assert sum(seen) == sum(sum(r.action_mask) for r in rows)
    seen.clear()
    prompts, rows = random_rows(policy, [17, 5], [[9, 23], [4]])
    token_logprobs(policy, prompts, rows)
    assert sum(seen) == sum(sum(r.action_mask) for r in rows)


def test_groups_without_signal_and_the_estimators_variants(policy, ctx):
    """Equal rewards count in Eq. 6's mean and have no gradient; negative ones alone do not even count, unless asked."""
    rng, rewards = np.random.default_rng(0), ([1.0, 0.0], [0.5, 0.5], [-0.5, -1.0])
    groups = [
        [demonstrate(policy, ctx, Task(s), 10, rng, 1) for _ in "ab"]
        for s in ctx.ds.splits["train"][:3]
    ]
    for group, values in zip(groups, rewards):
        for t, value in zip(group, values):
            t.reward = value
    rows = [TrainRow(p, t.ids, t.action_mask) for p, g in enumerate(groups) for t in g]
    logprobs, _ = token_logprobs(policy, [g[0].prompt for g in groups], rows)
    of_row = [x.sum() for x in logprobs.split([sum(r.action_mask) for r in rows])]
    first, last = of_row[0] - of_row[1], of_row[4] - of_row[5]
    for objective, dropped, loss in (
        (Objective(), 1, -0.5 * first / 4),
        (Objective(baseline="loo"), 1, -first / 4),
        (Objective(divide_by_std=True), 1, -first / 4),
        (Objective(drop_negative=False), 0, -(0.5 * first + 0.25 * last) / 6),
    ):
        want = gradient(policy, loss)
        policy.model.zero_grad()
        found = policy_gradient(policy, groups, objective)
        assert (found["zero_variance_groups"], found["dropped_groups"]) == (1, dropped)
        got = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
        assert (got - want).norm() / want.norm() < 5e-4, objective


def memory_of_an_update(n_actions, vocabulary=151_936):
    """Peak resident bytes of one update of 8 rows of `n_actions` tokens each; run in a process of its own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, head_dim=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    policy = types.SimpleNamespace(
        model=Qwen3ForCausalLM(config),
        device=torch.device("cpu"),
        dtype=torch.float32,
        autocast=contextlib.nullcontext,
    )
    policy.model.set_attn_implementation("shared_prefix")
    prompts, rows = random_rows(policy, [500], [[n_actions] * 8])
    rows = [TrainRow(0, r.ids, [1] * n_actions) for r in rows]
    token_logprobs(policy, prompts, rows)[0].sum().backward()
    status = pathlib.Path(
        "/proc/self/status"
    ).read_text()  # getrusage counts the parent
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_memory_with_a_large_vocabulary():
    """A vocabulary of 151,936 words: all logits of 8 x 250 actions at once would take 1.2 GB, three times over."""
    command = [sys.executable, __file__, "250"]
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    assert int(done.stdout) < 2e9


def test_chunks_of_the_vocabulary_projection_have_no_odd_pieces(monkeypatch):
    """A last piece of 28 rows kept heap blocks from being used again: 8 x 1,000 actions took 2.4 GB instead of 1.2."""
    seen = []

    def note(head, hidden, targets, temperature, few):
        seen.append((len(hidden), few))
        return targets, targets

    monkeypatch.setattr(model_module, "project_chunk", note)
    head = types.SimpleNamespace(out_features=151_936)
    with torch.no_grad():
        model_module.project(head, torch.zeros(500, 1), torch.zeros(500), 1.0)
    assert seen == [(192, 64), (192, 64), (116, 64)]


def test_muon_in_float32():
    """Three steps against the polynomial applied to singular values in float64, and against torch's in bfloat16."""
    torch.manual_seed(0)
    shapes = [(48, 96), (96, 48), (64, 64)]
    starts = [torch.randn(s) for s in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    how = {"lr": 0.1, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Float32Muon(ours, **how), Muon(theirs, **how)
    a, b, c = optimizers[0].defaults["ns_coefficients"]
    expected = [x.double() for x in starts]
    momentum = [torch.zeros_like(x) for x in expected]
    for _ in range(3):
        for i, shape in enumerate(shapes):
            ours[i].grad = theirs[i].grad = grad = torch.randn(shape)
            momentum[i] = 0.95 * momentum[i] + 0.05 * grad
            u, s, v = torch.linalg.svd(0.05 * grad + 0.95 * momentum[i], False)
            s = s / s.norm()
            for _ in range(5):
                s = a * s + b * s**3 + c * s**5
            expected[i] *= 1 - 0.1 * 0.01
            expected[i] -= 0.1 * 0.2 * max(shape) ** 0.5 * (u * s) @ v
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, truth in zip(ours, theirs, expected):
        torch.testing.assert_close(mine.detach().double(), truth, atol=1e-5, rtol=0)
        torch.testing.assert_close(mine, other, atol=2e-2, rtol=0)


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_engine.py 1000
    print(memory_of_an_update(int(sys.argv[1])))
