"""Fuzz: whatever a model writes, the parser, the tools and the rollout end soon, with a reason and the reward of Eq. 1.

    OMP_NUM_THREADS=1 python tests/test_fuzz.py --outputs 100000      # the long version; pytest runs a short one

Outputs come from a grammar of dialogues (right ones, and wrong in every place) and from demonstrations, both mutated:
cut, repeated, spliced, sprinkled with tags, brackets, control characters and lone surrogates, up to a megabyte. Each is
read as text by the parser and the tools, and written token by token in a rollout. The reward is checked against `judge`, which reads
the same trajectory with code of its own. No call may take more than 100 ms of processor time.
"""

import argparse
import json
import math
import pathlib
import random
import re
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import rollout as rollout_module
from data import make_splits, simulate_office
from grpo import list_reward
from model import load_policy
from ppr import pair_reward
from rollout import ALL_TOOLS, Task, Trajectory, act, demonstrate, parse_answer, rollout
from sasrec import SASRec
from tools import TOOLS, Context

LIMIT = 0.1  # seconds of processor time for one call
TAGS = [f"<{s}{t}>" for t in ("think", "tool_call", "observation", "answer") for s in ("", "/")]  # fmt: skip
ODD = [
    *TAGS, "\\boxed{", "\\boxed{}", "{", "}", "[", "]", '"', "\\", ",", ":", " ", "\n", "\x00", "\x1b[31m", "\x85",
    "\u2028", "\u202e", "\u200b", "\ufeff", "\ufffd", "\ud800", "\udfff", "\\ud800", "\\u0000", "é", "１", "٣", "🙂", "<|end|>",
    "<|user|>", "<|im_end|>", "NaN", "-Infinity", "1e999", "-1", "null", "true", "9" * 5000, "[" * 3000, '{"a":' * 1000,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is written


def value(rng, depth=0):
    """Any JSON value, seldom deep."""
    kind = rng.randrange(7 if depth < 4 else 5)
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        keys = ("item_title", "name", "arguments", "", rng.choice(ODD))
        return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(3))}  # fmt: skip
    scalars = (None, rng.random() * 10**6, "x" * rng.randrange(600), rng.choice(ODD), True)  # fmt: skip
    return scalars[kind]


def a_call(rng, titles):
    """A tool call, right nine times out of ten."""
    name = rng.choice(ALL_TOOLS)
    argument = TOOLS[name].argument
    arguments = {argument: rng.choice(titles)} if argument else {}
    if rng.random() < 0.04:
        name = rng.choice(("get_weather", "", name.upper(), name + " ", value(rng)))
    if rng.random() < 0.04:
        arguments = value(rng)
    written = {"name": name, "arguments": arguments}
    if rng.random() < 0.04:
        written.pop(rng.choice(list(written)))
    text = json.dumps(written, ensure_ascii=rng.random() < 0.5)
    return f"<tool_call>{text}</tool_call>"


def an_answer(rng, k):
    """An answer, right half the time."""
    numbers = rng.sample(range(1, 21), k)
    if rng.random() < 0.3:
        numbers[rng.randrange(k)] = rng.choice((0, 21, -1, 1.5, numbers[0], 10**6))
    if rng.random() < 0.1:
        numbers = numbers[: rng.randrange(k)] or numbers * 3
    inside = rng.choice((str(numbers), str(numbers).replace(" ", "")))
    if rng.random() < 0.3:
        wrong = rng.choice(("AB", "a", "[]", "", inside[1:], inside[:-1]))
        inside = rng.choice(("A", "B", " B\n", wrong))
    return f"<answer>\\boxed{{{inside}}}</answer>"


def dialogue(rng, titles, k):
    """Thoughts and calls, then an answer; now and then thousands of them."""
    n = rng.choice((0, 0, 1, 1, 2, 3, 5, 9, 10, 11, 12))
    if rng.random() < 0.002:
        n = 3000
    parts = []
    for _ in range(n):
        parts += [f"<think>{rng.choice(titles)}</think>"] * rng.randrange(2)
        parts.append(a_call(rng, titles))
    if rng.random() < 0.9:
        parts += [rng.choice(("", "<think>so</think>", "so ")), an_answer(rng, k)]
    return "".join(parts)


def mutate(rng, text):
    """`text` cut, repeated, spliced or sprinkled once."""
    at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    kind = rng.randrange(7)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + text[to:]
    if kind == 2:
        return text[:to] + text[at:]
    if kind == 3:
        return text[:at] + rng.choice(ODD) + text[at:]
    if kind == 4:
        return text[:at] + rng.choice(ODD) + text[to:]
    if kind == 5:
        return text[:at] + chr(rng.randrange(0x110000)) + text[at:]
    piece = (text[at:to] or rng.choice(ODD))[:2000]
    times = rng.choice((2, 9, 100)) if rng.random() < 0.98 else 10**6 // len(piece)
    return text[:at] + piece * times + text[to:]


def outputs(seed, first, n, titles, real, k=10):
    """`n` outputs; each depends on (seed, its number) only."""
    for i in range(first, first + n):
        rng = random.Random(seed * 10**9 + i)
        text = rng.choice(real) if rng.random() < 0.3 else dialogue(rng, titles, k)
        for _ in range(rng.choice((0, 0, 0, 1, 2, 4))):
            text = mutate(rng, text)
        yield text[: 1 << 20]


# --------------------------------------------------------------------------------------------- what it should come to


def outside_thoughts(turn):
    """The turn without its thoughts; None if one is never closed."""
    rest = re.sub(r"<think>.*?</think>", "", turn, flags=re.DOTALL)
    return None if "<think>" in re.sub(r"<think>.*?</think>", "\0", turn, flags=re.DOTALL) else rest  # fmt: skip


def sole(turn, tag):
    """What stands in the only <tag>, beside which nothing else is opened; None if that is not clear."""
    text = outside_thoughts(turn)
    if text is None or text.count(f"<{tag}>") != 1:
        return None
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    if not found:
        return None
    beside = f"{text[: found.start()]} {text[found.end() :]}"
    others = (f"<{name}>" in beside for name in ("tool_call", "observation", "answer"))
    return None if any(others) else found[1]


def reads_as_call(turn):
    """Whether the turn holds one call that follows its tool's schema."""
    try:
        written = json.loads(sole(turn, "tool_call") or "")
        tool = TOOLS[written["name"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        return False
    arguments = written.get("arguments", {})
    if not tool.argument:
        return arguments == {} and isinstance(arguments, dict)
    one = isinstance(arguments, dict) and list(arguments) == [tool.argument]
    return one and isinstance(arguments[tool.argument], str) and len(arguments[tool.argument]) <= 500  # fmt: skip


def judge(turns, end, task, k):
    """The reward of Eq. 1 (or of a pair's question) for these turns of a trajectory that ended for this reason."""
    asked, boxes = turns[:-1], re.findall(r"\\boxed\{([^{}]*)\}", sole(turns[-1], "answer") or "")  # fmt: skip
    if end not in ("answer", "invalid") or len(boxes) != 1 or not all(map(reads_as_call, asked)):  # fmt: skip
        return -1.0
    positive, box = task.sample.target + 1, boxes[0].strip()
    if task.pair:
        right = "AB"[(task.pair[0] == positive) != task.more]
        return float(box == right) if box in ("A", "B") else -1.0
    fields = [f.strip(" \t\n\r\f\v") for f in box[1:-1].split(",")]
    plain = all(f.isascii() and f.isdigit() for f in fields)
    numbers = [int(f) for f in fields] if plain and box[:1] + box[-1:] == "[]" else []
    if len(numbers) != k or set(numbers) - set(range(1, 21)) or len(set(numbers)) != k:
        return -1.0
    if positive not in numbers:
        return -0.5
    rank = numbers.index(positive) + 1
    return 1 / math.log2(1 + rank) + (0.1 if rank == 1 and asked else 0)


# ------------------------------------------------------------------------------------------------------------ the fuzz


class Timed:
    """A function that keeps the longest time of a call, and what it was called with."""

    def __init__(self, function):
        self.function, self.longest, self.slowest = function, 0.0, None

    def __call__(self, *args):
        began = time.thread_time()
        result = self.function(*args)
        took = time.thread_time() - began
        if took > self.longest:
            self.longest, self.slowest = took, args
        return result


class Scripts:
    """Stands in for RaggedBatch and the sampler: row after row writes the next script, then the end token for ever."""

    def __init__(self, scripts, end):
        self.scripts, self.end, self.rows = iter(scripts), end, {}

    def __call__(self, policy, slots, group):
        self.group = group
        return self

    def prefill(self, slots, prompts):
        for slot in slots:
            for g in range(self.group):
                self.rows[slot * self.group + g] = iter(next(self.scripts))

    def extend(self, rows, tokens):
        assert all(tokens), "an observation is fed whole"

    def decode(self, rows, tokens):
        return torch.tensor([next(self.rows[r], self.end) for r in rows])

    @staticmethod
    def sample(written, temperature, uniform, greedy):
        return written, torch.zeros(len(written))


def to_tokens(policy, text, rng):
    """Ids of a text: as the tokenizer has it, or its tags spelled in bytes, or simply any ids."""
    kind = rng.random()
    if kind < 0.05:
        return [rng.randrange(len(policy.tokenizer)) for _ in range(300)]
    text = text[:6000].encode(errors="replace").decode()
    if kind < 0.3:
        text = text.replace("<", "<\0")
    ids = policy.encode(text)
    zero = policy.encode("\0")
    return [i for i in ids if kind >= 0.3 or [i] != zero]


def turns_of(policy, t):
    """The text of each turn, and its ids: what lies between observations."""
    bounds = np.flatnonzero(np.diff([0, *t.action_mask, 0])).reshape(-1, 2)
    return [t.ids[a:b] for a, b in bounds]


def check(policy, t, limit, k):
    """One trajectory: a reason, a consistent record, no turn past its stop tag, the reward of Eq. 1."""
    assert t.end in ("answer", "invalid", "eos", "budget", "length")
    assert len(t.ids) == len(t.action_mask) == len(t.logprobs) <= limit
    assert (t.end == "answer") == (t.answer is not None)
    ids = turns_of(policy, t)
    for turn in ids:
        before = policy.decode(turn[:-1])
        assert not any(stop in before for stop in ("</answer>", "</tool_call>"))
    reward = pair_reward(t) if t.task.pair else list_reward(t, k)
    turns = [policy.decode(turn) for turn in ids]
    due = judge(turns, t.end, t.task, k)
    assert reward == pytest.approx(due), (reward, due, t.end, turns)
    return t.end, round(reward, 1)


def fuzz(monkeypatch, policy, ctx, n, seed=0, k=10, limit=1200):
    """Run `n` outputs; returns the slowest times and a count of (end, reward)."""
    samples, rng = ctx.ds.splits["test"], random.Random(seed)
    shown = [ctx.titles[c] for s in samples[:9] for c in s.candidates]
    titles = [*shown, "no such thing", "", "x" * 700, "</think>", "\ud800"]
    drawn, real = np.random.default_rng(seed), []
    for i in range(30):
        task = Task(samples[i % 9], (3, 5) if i % 2 else None)
        t = demonstrate(policy, ctx, task, k, drawn)
        real.append("".join(map(policy.decode, turns_of(policy, t))))
    timed_act, timed_parse, counts = Timed(act), Timed(parse_answer), Counter()
    monkeypatch.setattr(rollout_module, "act", timed_act)
    monkeypatch.setattr(rollout_module, "parse_answer", timed_parse)
    monkeypatch.setattr(rollout_module, "sample_tokens", Scripts.sample)
    for first in range(0, n, 256):
        texts = list(outputs(seed, first, 256, titles, real, k))
        tasks = [Task(samples[i % 9], (4, 1 + i % 3) if i % 4 == 3 else None, i % 8 == 3) for i in range(32)]  # fmt: skip
        for i, text in enumerate(texts):  # as text: everything, surrogates included
            t = Trajectory(tasks[i // 8], [0])
            timed_act(ctx, t, text, ALL_TOOLS)
            timed_act(ctx, t, f"<tool_call>{text}</tool_call>", ALL_TOOLS)
            timed_parse(text, t.task, k)
            timed_parse(f"<answer>{text}</answer>", t.task, k)
        scripts = [to_tokens(policy, text, rng) for text in texts]
        batch = Scripts(scripts, min(policy.eos))
        monkeypatch.setattr(rollout_module, "RaggedBatch", batch)
        groups = rollout(policy, ctx, tasks, group_size=8, k=k, max_new_tokens=limit, seed=(seed, first), slots=32)  # fmt: skip
        for t in (t for group in groups for t in group):
            counts[check(policy, t, limit, k)] += 1
    return timed_act, timed_parse, counts


@pytest.fixture
def agent():
    return load_policy(str(pathlib.Path(__file__).parent.parent / "assets" / "tiny-agent"))  # fmt: skip


def test_whatever_is_written_ends_soon_with_a_reason_and_its_reward(agent, ctx, monkeypatch):  # fmt: skip
    acted, parsed, counts = fuzz(monkeypatch, agent, ctx, 512)
    assert max(acted.longest, parsed.longest) < LIMIT
    ends, rewards = (Counter(x) for x in zip(*counts.elements()))
    assert set(ends) == {"answer", "invalid", "eos", "budget", "length"}
    assert rewards.keys() >= {-1.0, -0.5, 0.0, 1.0, 1.1}, "good ones are among them"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--outputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    ds = simulate_office(n_users=120)
    make_splits(ds)
    ctx = Context(ds, SASRec(len(ds.items)).eval())
    policy = load_policy(str(pathlib.Path(__file__).parent.parent / "assets" / "tiny-agent"))  # fmt: skip
    began = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        acted, parsed, counts = fuzz(patch, policy, ctx, args.outputs, args.seed)
    print(f"{counts.total():,} outputs in {time.process_time() - began:.0f} s of processor time")  # fmt: skip
    for name, timed in (("call", acted), ("parse", parsed)):
        print(f"slowest {name}: {1000 * timed.longest:.1f} ms")
    print(dict(Counter(end for end, _ in counts.elements())), counts.most_common(12))
    assert max(acted.longest, parsed.longest) < LIMIT


if __name__ == "__main__":
    main()
