"""The ReAct loop: prompt, turns of think / call / observation, and the parsed answer (paper: tool-integrated reasoning).

`rollout` samples G trajectories for each task and serves training and evaluation alike. Token in, token out: ids are
never decoded and re-encoded to rebuild a sequence, and the action mask is written as tokens are appended: 1 for every
sampled token (stop tags and EOS included), 0 for observations.

One trajectory: <think>...</think><tool_call>{"name": ..., "arguments": {...}}</tool_call><observation>...</observation>
... <answer>\\boxed{[8,3,15,...]}</answer>, or \\boxed{A} / \\boxed{B} for a pair of stage 2.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from data import Sample, history
from model import ModelError, Policy, RaggedBatch, sample_tokens
from tools import (
    TOOLS,
    Call,
    Context,
    ToolError,
    clip_observation,
    digits,
    parse_call,
    run_call,
)

MAX_CALLS = 10
STOPS = ("</tool_call>", "</answer>")
ALL_TOOLS = tuple(TOOLS)


@dataclass(frozen=True)
class Task:
    """What is asked: rank the sample's candidates, or (stage 2) which of `pair` the user is more or less likely to take.

    `pair` holds two candidate numbers (1 to 20), the first shown as A; `more` is the direction of the question.
    """

    sample: Sample
    pair: tuple[int, int] | None = None
    more: bool = True

    @property
    def key(self) -> tuple[int, ...]:
        """Integers that tell this task from all others, to seed its sampling with."""
        return (self.sample.id, *(self.pair or (0, 0)), int(self.more))


@dataclass
class Trajectory:
    """One sampled answer: token ids after the prompt, which of them are actions, and what came of it."""

    task: Task
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    action_mask: list[int] = field(default_factory=list)  # 1: sampled by the policy
    logprobs: list[float] = field(
        default_factory=list
    )  # of sampled tokens when sampled, 0 elsewhere
    calls: list[Call] = field(default_factory=list)
    answer: list[int] | str | None = (
        None  # ranked candidate numbers, or "A" / "B"; None: no valid answer
    )
    malformed: bool = False  # a call that could not be read, or an unknown tool
    end: str = ""  # answer, invalid, eos, budget, length
    reward: float = 0.0

    @property
    def valid(self) -> bool:
        """Eq. 1's precondition: an answer in the right form, no malformed call, within all limits."""
        return self.answer is not None and not self.malformed


# -------------------------------------------------------------------------------------------------------------- prompt


def system_prompt(tools: tuple[str, ...], k: int) -> str:
    """Task, format and tool schemas, for chat models (the tiny agent's template leaves it out)."""
    lines = [
        "You are a recommender. Given a user's recent purchases and 20 numbered candidates, find what the user buys next.",
        "First think inside <think></think>. You may then call one tool with",
        '<tool_call>{"name": "...", "arguments": {...}}</tool_call> and will read its <observation></observation>;',
        f"repeat as needed, at most {MAX_CALLS} calls. Tools end with every candidate's score as number:score, 0 to 9.",
        f"Finish with the {k} best candidates, best first: <answer>\\boxed{{[8,3,15,...]}}</answer>, or, if asked about",
        "two options, with <answer>\\boxed{A}</answer> or <answer>\\boxed{B}</answer>.",
    ]
    schemas = [json.dumps(TOOLS[name].schema()) for name in tools]
    return "\n".join(
        lines
        + (
            ["Tools:", *schemas]
            if schemas
            else ["There are no tools: think, then answer."]
        )
    )


def user_prompt(ctx: Context, task: Task, tools: tuple[str, ...]) -> str:
    """History with ratings, oldest first, the numbered candidates, and the question."""
    rows = history(ctx.ds, task.sample)
    lines = ["History:"]
    lines += [f"{ctx.title(ctx.ds.item[r])} ({ctx.ds.rating[r]:.0f})" for r in rows]
    lines += ["Candidates:"]
    lines += [f"{n}. {ctx.title(c)}" for n, c in enumerate(task.sample.candidates, 1)]
    if not tools:
        lines.append("No tools.")
    if task.pair:
        a, b = task.pair
        lines.append(
            f"Which is {'MORE' if task.more else 'LESS'} likely, A: {a} or B: {b}?"
        )
    else:
        lines.append("Rank.")
    return "\n".join(lines)


def build_prompt(
    policy: Policy, ctx: Context, task: Task, tools: tuple[str, ...], k: int
) -> list[int]:
    """Prompt ids through the model's own chat template; a template without a system role gets it in the user turn."""
    system, user = system_prompt(tools, k), policy.defuse(user_prompt(ctx, task, tools))
    apply = policy.tokenizer.apply_chat_template
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
    ]
    try:
        text = apply(messages, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # jinja2.TemplateError: this template has no system role
        if "role" not in str(e).lower():
            raise
        text = apply(
            [{"role": "user", "content": f"{system}\n\n{user}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
    return policy.encode(text)


# ------------------------------------------------------------------------------------------------- reading what it wrote


def without_thoughts(text: str) -> str | None:
    """The text outside <think>...</think>; None if a thought is never closed (linear time)."""
    parts, at = [], 0
    while (start := text.find("<think>", at)) >= 0:
        end = text.find("</think>", start)
        if end < 0:
            return None
        parts.append(text[at:start])
        at = end + len("</think>")
    return "".join(parts) + text[at:]


def between(text: str, tag: str) -> str | None:
    """The inside of the only <tag>...</tag> in `text`; None if there is none or more than one opening."""
    _, opened, rest = text.partition(f"<{tag}>")
    inside, closed, _ = rest.partition(f"</{tag}>")
    return inside if opened and closed and f"<{tag}>" not in rest else None


_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def parse_answer(turn: str, task: Task, k: int) -> list[int] | str | None:
    """The ranking (k different candidate numbers) or the letter in a turn's only boxed answer; None if invalid."""
    outside = without_thoughts(turn)
    inside = between(outside, "answer") if outside is not None else None
    boxed = _BOXED.findall(inside) if inside is not None else []
    if len(boxed) != 1:
        return None
    content = boxed[0].strip()
    if task.pair:
        return content if content in ("A", "B") else None
    if not re.fullmatch(r"\[\s*\d{1,3}(\s*,\s*\d{1,3}){0,99}\s*\]", content, re.ASCII):
        return None
    numbers = [int(n) for n in content[1:-1].split(",")]
    n_candidates = len(task.sample.candidates)
    ok = len(numbers) == k == len(set(numbers)) and all(
        1 <= n <= n_candidates for n in numbers
    )
    return numbers if ok else None


def act(ctx: Context, trajectory: Trajectory, turn: str, tools: tuple[str, ...]) -> str:
    """Run the call in a turn that ended with </tool_call> and return what is observed."""
    try:
        outside = without_thoughts(turn)
        inside = between(outside, "tool_call") if outside is not None else None
        if inside is None:
            raise ToolError(
                "write <think>...</think> and then one <tool_call>{...}</tool_call>"
            )
        call = parse_call(inside, tools)
        trajectory.calls.append(call)
        text = run_call(ctx, trajectory.task.sample, call).render()
    except ToolError as e:
        trajectory.malformed |= e.malformed
        text = f"error: {e}"
    return text


# ------------------------------------------------------------------------------------------------------------- rollout


@dataclass
class Row:
    """Live state of one trajectory in the batch."""

    trajectory: Trajectory
    pending: list[int]  # tokens not yet fed to the model; decoding needs exactly one
    uniform: np.ndarray  # one number in [0, 1) a sampled token
    tail: str = ""  # the last characters of this turn, to look for stop tags in
    turn_start: int = 0  # where this turn's ids begin
    attempts: int = 0  # calls asked for, malformed ones included


@dataclass
class Rollout:
    """Live state of one rollout; `rollout` below documents the fields. Row r sits in slot r // group_size."""

    policy: Policy
    ctx: Context
    tasks: list[Task]
    group_size: int
    k: int
    temperature: float
    max_new_tokens: int
    seed: tuple[int, ...]
    tools: tuple[str, ...]
    slots: int
    progress: Callable[[list[Trajectory]], None] | None

    def __post_init__(self):
        self.slots = min(self.slots, len(self.tasks))
        self.batch = RaggedBatch(self.policy, self.slots, self.group_size)
        self.rows: list[Row | None] = [None] * (self.slots * self.group_size)
        self.done: list[list[Trajectory]] = [[] for _ in self.tasks]
        self.waiting = list(range(len(self.tasks)))[
            ::-1
        ]  # tasks without a slot, the next one last
        self.slot_task: list[int | None] = [None] * self.slots

    def run(self) -> list[list[Trajectory]]:
        """Refill slots, feed observations once half of the rows wait for one, else decode a token; until done."""
        while True:
            self.refill()
            alive = [
                i for i, row in enumerate(self.rows) if row and not row.trajectory.end
            ]
            if not alive:
                return self.done
            observing = [i for i in alive if len(self.rows[i].pending) > 1]
            if 2 * len(observing) >= len(alive):
                self.batch.extend(
                    observing, [self.rows[i].pending[:-1] for i in observing]
                )
                for i in observing:
                    self.rows[i].pending = self.rows[i].pending[-1:]
            else:
                self.decode([i for i in alive if len(self.rows[i].pending) == 1])

    def refill(self) -> None:
        """Move finished groups to `done` and put waiting tasks into their slots."""
        G, free, prompts = self.group_size, [], []
        for slot, task in enumerate(self.slot_task):
            group = self.rows[slot * G : (slot + 1) * G]
            if any(row and not row.trajectory.end for row in group):
                continue
            if task is not None:
                self.done[task] = [row.trajectory for row in group]
                self.slot_task[slot] = None
                self.rows[slot * G : (slot + 1) * G] = [None] * G
                if self.progress:
                    self.progress(self.done[task])
            if self.waiting:
                free.append(slot)
                self.slot_task[slot] = self.waiting.pop()
        for slot in free:
            task = self.tasks[self.slot_task[slot]]
            prompt = build_prompt(self.policy, self.ctx, task, self.tools, self.k)
            check_context(self.policy, len(prompt), self.max_new_tokens)
            prompts.append(prompt)
            for g in range(G):
                rng = np.random.default_rng([*self.seed, *task.key, g])
                uniform = rng.random(self.max_new_tokens)
                self.rows[slot * G + g] = Row(
                    Trajectory(task, prompt), prompt[-1:], uniform
                )
        if free:
            self.batch.prefill(free, prompts)

    def decode(self, ready: list[int]) -> None:
        """Sample one token for each row in `ready`."""
        tokens = torch.zeros(len(self.rows), dtype=torch.long)
        uniform, active = (
            torch.zeros(len(self.rows)),
            torch.zeros(len(self.rows), dtype=torch.bool),
        )
        tokens[ready] = torch.tensor([self.rows[i].pending[0] for i in ready])
        drawn = [self.rows[i].uniform[len(self.rows[i].trajectory.ids)] for i in ready]
        uniform[ready], active[ready] = (
            torch.tensor(np.array(drawn), dtype=torch.float32),
            True,
        )
        device = self.policy.device
        logits = self.batch.decode(tokens.to(device), active.to(device))
        sampled, logprobs = sample_tokens(logits, self.temperature, uniform.to(device))
        sampled, logprobs = sampled.tolist(), logprobs.tolist()
        for i in ready:
            self.take(self.rows[i], sampled[i], logprobs[i])

    def take(self, row: Row, token: int, logprob: float) -> None:
        """Append one sampled token; at a stop tag run the call or read the answer."""
        t = row.trajectory
        t.ids.append(token)
        t.action_mask.append(1)
        t.logprobs.append(logprob)
        row.pending = [token]
        row.tail = (row.tail + self.policy.piece(token))[-32:]
        stop = next((s for s in STOPS if s in row.tail), None)
        if stop == "</answer>":
            t.answer = parse_answer(
                self.policy.decode(t.ids[row.turn_start :]), t.task, self.k
            )
            t.end = "answer" if t.answer is not None else "invalid"
        elif stop:
            self.call(row)
        elif token in self.policy.eos:
            t.end = "eos"
        if not t.end and len(t.ids) >= self.max_new_tokens:
            t.end = "length"

    def call(self, row: Row) -> None:
        """Run the call that a turn ended with and queue its observation, within the budget and the length limit."""
        t = row.trajectory
        row.attempts += 1
        if row.attempts > MAX_CALLS:
            t.end = "budget"
            return
        turn = self.policy.decode(t.ids[row.turn_start :])
        observation = observe(self.policy, act(self.ctx, t, turn, self.tools))
        if len(t.ids) + len(observation) >= self.max_new_tokens:
            t.end = "length"
            return
        append_observation(t, observation)
        row.pending += observation
        row.tail, row.turn_start = "", len(t.ids)


def rollout(
    policy: Policy,
    ctx: Context,
    tasks: list[Task],
    *,
    group_size: int,
    k: int = 10,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    seed: tuple[int, ...] = (0,),
    tools: tuple[str, ...] = ALL_TOOLS,
    slots: int = 16,
    progress: Callable[[list[Trajectory]], None] | None = None,
) -> list[list[Trajectory]]:
    """Sample `group_size` trajectories for each task; the result has a list for each task, in order.

    Groups wait for one of `slots` places; rows go at their own pace, and a finished group's place is refilled at
    once (`progress` is told of it). Each row draws from a generator seeded with (*seed, *task.key, index in the
    group): its tokens do not depend on who shares the batch. `temperature` 0 is greedy. `max_new_tokens` bounds a
    whole trajectory, observations included. ModelError if a prompt does not fit the model's context.
    """
    limits = (group_size, k, temperature, max_new_tokens, seed, tools, slots, progress)
    return Rollout(policy, ctx, tasks, *limits).run()


def check_context(policy: Policy, prompt: int, new: int) -> None:
    """ModelError if prompt + new tokens exceed the model's context window."""
    window = getattr(policy.model.config, "max_position_embeddings", None)
    window = min(w for w in (window, policy.window, 10**9) if w)
    if prompt + new > window:
        raise ModelError(
            f"a prompt of {prompt} tokens and --max-new-tokens {new} exceed the model's "
            f"context of {window} by {prompt + new - window}"
        )


def observe(policy: Policy, text: str) -> list[int]:
    """Ids of an observation; its text can neither close the tag nor form a special token."""
    return policy.encode(
        f"<observation>{policy.defuse(clip_observation(text))}</observation>"
    )


def append_observation(t: Trajectory, ids: list[int]) -> None:
    """Append tokens written by the environment: no action, no log-probability."""
    t.ids += ids
    t.action_mask += [0] * len(ids)
    t.logprobs += [0.0] * len(ids)


# ---------------------------------------------------------------------------------------------- scripted demonstrations

TOPIC = {  # what a demonstration's thought calls each tool
    "get_user_profile": "Long-term taste",
    "item_info_search": "Details",
    "candidates_analyze": "Prices",
    "get_session_behavior": "Recent interests",
    "get_rating_behavior": "Ratings",
    "get_similar_items": "What goes with it",
    "get_similar_users": "Similar users",
}
TRUST = {"low": 1, "medium": 2, "high": 4}


def demonstrate(
    policy: Policy,
    ctx: Context,
    task: Task,
    k: int,
    rng: np.random.Generator,
    max_calls: int = 4,
) -> Trajectory:
    """A scripted trajectory for the warm-up: random tools, random trust in each, an answer that follows exactly.

    The thought before a call states how much its scores will count; the answer sorts the candidates by the sum of
    trust x digit over the observations. Which tools and how much trust pay is left to learning.
    """
    tools = () if rng.random() < 0.04 and not task.pair else ALL_TOOLS
    t = Trajectory(task, build_prompt(policy, ctx, task, tools, k))
    names = rng.permutation(
        [n for n in ALL_TOOLS if rng.random() < 0.15 or n != "item_info_search"]
    )
    past = ctx.ds.item[history(ctx.ds, task.sample)]
    total = np.zeros(len(task.sample.candidates))
    for name in names[: rng.integers(1, max_calls + 1) if tools else 0]:
        trust = str(rng.choice(list(TRUST)))
        item = (
            rng.choice(task.sample.candidates)
            if name == "item_info_search"
            else past[-1]
        )
        if rng.random() < 0.15 and name == "get_similar_items":
            item = rng.choice(past)
        argument = TOOLS[name].argument
        call = Call(str(name), {argument: ctx.title(int(item))} if argument else {})
        thought = TOPIC[name] + (f": {trust}" if name != "item_info_search" else "")
        write(
            policy,
            t,
            f"<think>{thought}</think><tool_call>{json.dumps(call.__dict__)}</tool_call>",
        )
        t.calls.append(call)
        observation = run_call(ctx, task.sample, call)
        append_observation(t, observe(policy, observation.render()))
        if observation.scores is not None:
            total += TRUST[trust] * digits(observation.scores)
    if len(t.calls) != 1:  # one list is copied in its order; otherwise ties are random
        total = total + 0.5 * rng.random(len(total))
    ranking = (np.argsort(-total, kind="stable") + 1).tolist()
    if task.pair:
        first = min(task.pair, key=ranking.index)
        second = task.pair[0] + task.pair[1] - first
        letter = "AB"[task.pair.index(first if task.more else second)]
        write(
            policy,
            t,
            f"<think>{first} over {second}</think><answer>\\boxed{{{letter}}}</answer>",
        )
        t.answer = letter
    else:
        t.answer = ranking[:k]
        write(
            policy, t, f"<answer>\\boxed{{[{','.join(map(str, t.answer))}]}}</answer>"
        )
    t.end = "answer"
    return t


def write(policy: Policy, t: Trajectory, text: str) -> None:
    """Append an action's tokens to a demonstration."""
    ids = policy.encode(text)
    t.ids += ids
    t.action_mask += [1] * len(ids)
    t.logprobs += [0.0] * len(ids)
