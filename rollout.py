"""The ReAct loop: prompt, turns of think / call / observation, and the parsed answer (paper: tool-integrated reasoning).

`rollout` samples G trajectories for each task and serves training and evaluation alike. Token in, token out: ids are
never decoded and re-encoded to rebuild a sequence, and the action mask is written as tokens are appended: 1 for every
sampled token (stop tags and EOS included), 0 for observations.

One trajectory: <think>...</think><tool_call>{"name": ..., "arguments": {...}}</tool_call><observation>...</observation>
... <answer>\\boxed{[8,3,15,...]}</answer>, or \\boxed{A} / \\boxed{B} for a pair of stage 2.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from data import N_CANDIDATES, Sample, history
from model import ModelError, Policy, RaggedBatch, sample_tokens
from tools import (
    MAX_OBSERVATION,
    TOOLS,
    Call,
    Context,
    Observation,
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

    @property
    def asked(self) -> str:
        """The direction's name in the question and in demonstrated answers."""
        return "MORE" if self.more else "LESS"


@dataclass
class Trajectory:
    """One sampled answer: token ids after the prompt, which of them are actions, and what came of it."""

    task: Task
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    action_mask: list[int] = field(default_factory=list)  # 1: written by the policy
    logprobs: list[float] = field(default_factory=list)  # when sampled, else 0
    # 1: drawn at random; a token that is always the likeliest has no policy gradient
    sampled_mask: list[int] = field(default_factory=list)
    ending: int = 0  # tokens of a demonstration's answer
    calls: list[Call] = field(default_factory=list)
    # ranked candidate numbers, or "A" / "B"; None: no valid answer
    answer: list[int] | str | None = None
    malformed: bool = False  # a call that could not be read, or an unknown tool
    end: str = ""  # answer, invalid, eos, budget, length
    reward: float = 0.0
    tool_seconds: float = 0.0  # spent in the tools, for eval.py

    @property
    def valid(self) -> bool:
        """Eq. 1's precondition: an answer in the right form, no malformed call, within all limits."""
        return self.answer is not None and not self.malformed


# -------------------------------------------------------------------------------------------------------------- prompt


def trained_tools(flags: dict) -> tuple[str, ...]:
    """The tools that a run's flags leave to the agent, in training and in its evaluation."""
    off = ALL_TOOLS if flags.get("no_tools") else flags.get("without_tool") or ()
    return tuple(name for name in ALL_TOOLS if name not in off)


HOW = {  # what each strategy's system prompt says of the way to the answer
    "react": f"""First think inside <think></think>. You may then call one tool with
<tool_call>{{"name": "...", "arguments": {{...}}}}</tool_call> and will read its <observation></observation>;
repeat as needed, at most {MAX_CALLS} calls. Most tools end with every candidate's score as number:score, 0 to 9.""",
    "plan-first": """First plan all the calls that help, each tool at most once, as one list (the input is "" if a tool takes none):
<tool_call>[{"tool_name": "...", "input": "..."}, ...]</tool_call>. Tools run in the order shown below, each shortens
or sorts the list of candidates, and you read the <observation></observation>. After your ranking you are its critic:
write <answer>Yes</answer> if it fits the user, or <answer>No, because ...</answer>; then you plan again.""",
}
HOW["self-inspiring"] = f"""{HOW["react"]}
After a step you are asked for another thought on it: write that and its call, or <answer>No</answer>. Both stay."""


def system_prompt(tools: tuple[str, ...], k: int, strategy: str = "react") -> str:
    """Task, format and tool schemas, for chat models (the tiny agent's template leaves it out)."""
    # a new strategy need not have a text of its own
    how = HOW.get(strategy, HOW["react"])
    lines = [
        "You are a recommender. Given a user's purchases, latest first, and numbered candidates, find what the user buys next.",
        how if tools else "First think inside <think></think>.",
        f"Finish with the {k} best candidates, best first: <answer>\\boxed{{[8,3,15,...]}}</answer>, or, if asked about",
        "two options, with <answer>\\boxed{A}</answer> or <answer>\\boxed{B}</answer>.",
    ]
    schemas = [json.dumps(TOOLS[name].schema()) for name in tools]
    lines += ["Tools:", *schemas] if schemas else []
    return "\n".join(lines)


def user_prompt(ctx: Context, task: Task, tools: tuple[str, ...]) -> str:
    """History with ratings, latest first, the numbered candidates, and the question."""
    lines = ["History:", *rated(ctx, history(ctx.ds, task.sample)[::-1]), "Candidates:"]
    lines += [f"{ctx.titles[c]} = {n}" for n, c in enumerate(task.sample.candidates, 1)]
    if not tools:
        lines.append("No tools.")
    if task.pair:
        a, b = task.pair
        lines += [f"Which is {task.asked} likely?", f"A={a}", f"B={b}"]
    else:
        lines.append("Rank.")
    return "\n".join(lines)


def rated(ctx: Context, rows: np.ndarray) -> list[str]:
    """Titles and ratings of these interactions."""
    ds = ctx.ds
    return [f"{ctx.titles[ds.item[r]]} ({ds.rating[r]:.3g})" for r in rows]


def chat_ids(policy: Policy, turns: dict[str, str], **more) -> list[int]:
    """Ids of what each role says, through the model's own chat template, and of what opens the answer."""
    chat = [{"role": role, "content": text} for role, text in turns.items()]
    more |= {"tokenize": False, "add_generation_prompt": True}
    return policy.encode(policy.tokenizer.apply_chat_template(chat, **more))


def build_prompt(
    policy: Policy, ctx: Context, task: Task, tools: tuple, k: int, strategy="react"
) -> list[int]:
    """Prompt ids through the model's own chat template; a template without a system role gets it in the user turn."""
    system = system_prompt(tools, k, strategy)
    user = policy.defuse(user_prompt(ctx, task, tools))
    try:
        return chat_ids(policy, {"system": system, "user": user})
    except Exception as e:  # jinja2.TemplateError: this template has no system role
        if "role" not in str(e).lower():
            raise
        return chat_ids(policy, {"user": f"{system}\n\n{user}"})


REQUEST = (
    "These are a user's purchases, oldest first, each with its rating from 1 to 5. Describe the user's "
    "long-term taste in two short sentences: brands, categories, price. Write nothing else."
)


def profile_prompt(policy: Policy, ctx: Context, sample: Sample) -> list[int]:
    """Ids of the request with the user's last 50 interactions before the sample."""
    lines = [REQUEST, *rated(ctx, history(ctx.ds, sample, 50))]
    content = policy.defuse("\n".join(lines))
    return chat_ids(policy, {"user": content}, enable_thinking=False)


# ------------------------------------------------------------------------------------------------- reading what it wrote


# captures "" if never closed
_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_OPENED = re.compile("<(tool_call|observation|answer)>")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def between(turn: str, tag: str) -> str | None:
    """The inside of the only <tag>...</tag> outside a turn's thoughts (linear time); None if there is none, if a second
    one, or a call, observation or answer, is opened beside it, or if a thought is never closed."""
    if not all(_THOUGHT.findall(turn)):
        return None
    before, opened, rest = _THOUGHT.sub("", turn).partition(f"<{tag}>")
    inside, closed, after = rest.partition(f"</{tag}>")
    if f"<{tag}>" in inside or _OPENED.search(f"{before} {after}"):
        return None
    return inside if opened and closed else None


def parse_answer(turn: str, task: Task, k: int) -> list[int] | str | None:
    """The ranking (k different candidate numbers) or the letter in a turn's only boxed answer; None if invalid."""
    boxed = _BOXED.findall(between(turn, "answer") or "")
    if len(boxed) != 1:
        return None
    content = boxed[0].strip()
    if task.pair:
        return content if content in ("A", "B") else None
    if not re.fullmatch(r"\[\s*\d{1,3}(\s*,\s*\d{1,3}){0,99}\s*\]", content, re.ASCII):
        return None
    numbers = [int(n) for n in content[1:-1].split(",")]
    named = set(numbers) & set(range(1, len(task.sample.candidates) + 1))
    return numbers if len(numbers) == len(named) == k else None


def call_text(turn: str) -> str:
    """The inside of a turn's only tool call outside its thoughts; ToolError if there is none."""
    inside = between(turn, "tool_call")
    if inside is None:
        form = "<think>...</think> and then one <tool_call>{...}</tool_call>"
        raise ToolError(f"write {form}")
    return inside


def run(ctx: Context, t: Trajectory, call: Call) -> Observation:
    """Run a call and note it; a tool that fails says why."""
    t.calls.append(call)
    began = time.perf_counter()
    try:
        found = run_call(ctx, t.task.sample, call)
    except ToolError as e:
        t.malformed |= e.malformed
        found = Observation(f"error: {e}")
    t.tool_seconds += time.perf_counter() - began
    return found


def act(ctx: Context, trajectory: Trajectory, turn: str, tools: tuple[str, ...]) -> str:
    """Run the call in a turn that ended with </tool_call> and return what is observed."""
    try:
        call = parse_call(call_text(turn), tools)
    except ToolError as e:
        trajectory.malformed |= e.malformed
        return f"error: {e}"
    return run(ctx, trajectory, call).render()


# ---------------------------------------------------------------------------------------------------------- strategies
#
# A strategy reads a turn that ended with a stop tag and returns what the environment writes next, or None once it has
# set why the trajectory ends. All but `react` are prompted, not trained (the paper's training-free agents).

MAX_REFLECTIONS = 3
RANKERS = ("get_similar_items", "get_similar_users")  # other tools are filters
CRITIC = "Critic: does this ranking fit the user? Answer Yes, or No, because ..."
ANOTHER = "Would another thought help here? Write it with its call, or answer No."
GO_ON = "Go on with the next step, or finish."


def react(ctx, row, stop: str, turn: str, tools: tuple, k: int) -> str | None:
    """Think, call, observe; the first answer is final."""
    t = row.trajectory
    if stop == "</tool_call>":
        return act(ctx, t, turn, tools)
    t.answer = parse_answer(turn, t.task, k)
    t.end = "answer" if t.answer is not None else "invalid"
    return None


def self_inspiring(ctx, row, stop, turn, tools, k) -> str | None:
    """RecMind: after each step the model is asked for another thought on it; that branch runs too, and both stay."""
    branch, row.stage = row.stage == "branch", ""
    ranked = parse_answer(turn, row.trajectory.task, k) is not None
    if branch and stop == "</answer>" and not ranked:  # "No": no other thought
        return GO_ON
    text = react(ctx, row, stop, turn, tools, k)
    if text is None:
        return None
    row.stage = "" if branch else "branch"
    question = f"Both ways stay. {GO_ON}" if branch else ANOTHER
    return f"{text[: MAX_OBSERVATION - len(question) - 1]}\n{question}"


def plan_first(ctx, row, stop, turn, tools, k) -> str | None:
    """InteRecAgent: a whole plan is run over the candidate buffer, then a ranking, then a critic: "No" asks for another
    try, at most MAX_REFLECTIONS times; anything else lets the ranking stand."""
    t = row.trajectory
    if row.stage == "critic":
        reply = between(turn, "answer") or ""
        if not reply.strip().casefold().startswith("no"):
            t.end = "answer"
            return None
        row.stage, row.reflections = "", row.reflections + 1
        return f"Reflection {row.reflections} of {MAX_REFLECTIONS}: plan again."
    if stop == "</tool_call>" and row.stage == "ranking":
        return "The plan has run: rank now."
    if stop == "</tool_call>":
        return follow_plan(ctx, row, turn, tools, k)
    react(ctx, row, stop, turn, tools, k)
    if t.end == "answer" and row.reflections < MAX_REFLECTIONS:
        t.end, row.stage = "", "critic"
        return CRITIC
    return None


def follow_plan(ctx, row, turn, tools, k) -> str:
    """Run a plan over a buffer of all candidates: rankers sort it by their scores, other tools that rate candidates
    drop the lowest quarter as long as k remain. Observed: what each tool says, and the buffer that is left."""
    t = row.trajectory
    try:
        plan = parse_plan(call_text(turn), tools)
    except ToolError as e:
        t.malformed |= e.malformed
        return f"error: {e}"
    row.stage = "ranking"
    buffer = np.array(t.task.pair or range(1, len(t.task.sample.candidates) + 1))
    lines = []
    for call in plan[: max(0, MAX_CALLS - len(t.calls))]:
        found = run(ctx, t, call)
        if found.scores is not None:
            order = np.argsort(-digits(found.scores)[buffer - 1], kind="stable")
            if call.name not in RANKERS:
                order = np.sort(order[: max(k, len(order) * 3 // 4)])
            buffer = buffer[order]
        lines.append(f"{call.name}, {len(buffer)} left: {found.text[:70]}")
    left = " ".join(map(str, buffer))
    return "\n".join([*lines, f"Candidates left: {left}", "Rank these now."])


def parse_plan(text: str, tools: tuple[str, ...]) -> list[Call]:
    """The calls of [{"tool_name": ..., "input": ...}, ...] in the tools' own order; ToolError says what is wrong."""
    try:
        steps = [(step["tool_name"], step.get("input")) for step in json.loads(text)]
    except (ValueError, RecursionError, TypeError, KeyError) as e:
        raise ToolError('a plan is [{"tool_name": ..., "input": ...}, ...]') from e
    calls = {}
    for name, given in steps:
        if name not in tools or name in calls:
            raise ToolError(f"plan each tool at most once, of {', '.join(tools)}")
        argument = TOOLS[name].argument
        arguments = {argument: given if isinstance(given, str) else None}
        call = {"name": name, "arguments": arguments if argument else {}}
        calls[name] = parse_call(json.dumps(call), tools)
    return [calls[name] for name in tools if name in calls]


STRATEGIES = {
    "react": react,
    "plan-first": plan_first,
    "self-inspiring": self_inspiring,
}


# ------------------------------------------------------------------------------------------------------------- rollout


@dataclass
class Row:
    """Live state of one trajectory in the batch."""

    trajectory: Trajectory
    pending: list[int]  # tokens not yet fed to the model; decoding needs exactly one
    uniform: np.ndarray  # one number in [0, 1) a sampled token
    opening: str = ""  # "<think>" if the chat template has written it
    tail: str = ""  # the last characters of this turn, to look for stop tags in
    turn_start: int = 0  # where this turn's ids begin
    attempts: int = 0  # calls asked for, malformed ones included
    greedy: bool = False  # this turn's answer is open and takes the likeliest tokens
    stage: str = ""  # what a strategy other than react expects next
    reflections: int = 0  # of plan-first's critic


@dataclass
class Rollout:
    """Live state of one rollout. Row r sits in slot r // group_size."""

    policy: Policy
    ctx: Context
    tasks: list[Task]
    _: KW_ONLY
    group_size: int
    k: int = 10
    temperature: float = 1.0  # 0: greedy
    greedy_answer: bool = False  # what follows <answer> always is
    max_new_tokens: int = 512  # of a whole trajectory, observations included
    seed: tuple[int, ...] = (0,)  # of a row: (*seed, *task.key, index in the group)
    tools: tuple[str, ...] = ALL_TOOLS
    slots: int = 16  # prompts in flight
    progress: Callable[[list[Trajectory]], None] | None = None  # told of each group
    strategy: str = "react"  # one of STRATEGIES

    def __post_init__(self):
        self.slots = min(self.slots, len(self.tasks))
        self.batch = RaggedBatch(self.policy, self.slots, self.group_size)
        self.rows: list[Row | None] = [None] * (self.slots * self.group_size)
        self.done: list[list[Trajectory]] = [[] for _ in self.tasks]
        self.waiting = iter(range(len(self.tasks)))  # tasks without a slot
        self.slot_task: list[int | None] = [None] * self.slots

    def run(self) -> list[list[Trajectory]]:
        """Refill slots, feed observations once a quarter of the rows wait for one, else decode a token; until done."""
        while True:
            self.refill()
            alive = [i for i, r in enumerate(self.rows) if r and not r.trajectory.end]
            if not alive:
                return self.done
            observing = [i for i in alive if len(self.rows[i].pending) > 1]
            if 4 * len(observing) >= len(alive):
                rows = [self.rows[i] for i in observing]
                self.batch.extend(observing, [row.pending[:-1] for row in rows])
                for row in rows:
                    row.pending = row.pending[-1:]
            else:
                self.decode([i for i in alive if len(self.rows[i].pending) == 1])

    def refill(self) -> None:
        """Move finished groups to `done` and put waiting tasks into their slots."""
        G, free = self.group_size, []
        for slot, task in enumerate(self.slot_task):
            group = self.rows[slot * G : (slot + 1) * G]
            if any(row and not row.trajectory.end for row in group):
                continue
            if task is not None:
                self.done[task] = [row.trajectory for row in group]
                if self.progress:
                    self.progress(self.done[task])
            self.slot_task[slot] = task = next(self.waiting, None)
            if task is not None:
                self.rows[slot * G : (slot + 1) * G] = self.begin(self.tasks[task])
                free.append(slot)
        if free:
            prompts = [self.rows[slot * G].trajectory.prompt for slot in free]
            self.batch.prefill(free, prompts)

    def begin(self, task: Task) -> list[Row]:
        """A group's rows with the prompt before them; ModelError if it does not fit."""
        policy, new = self.policy, self.max_new_tokens
        prompt = build_prompt(policy, self.ctx, task, self.tools, self.k, self.strategy)
        check_context(policy, len(prompt), new)
        seeds = [[*self.seed, *task.key, g] for g in range(self.group_size)]
        drawn = [np.random.default_rng(seed).random(new) for seed in seeds]
        # some chat templates open the first thought themselves
        opened = policy.decode(prompt[-16:]).rstrip().endswith("<think>")
        opening = "<think>" if opened else ""
        return [Row(Trajectory(task, prompt), prompt[-1:], x, opening) for x in drawn]

    def decode(self, ready: list[int]) -> None:
        """Sample one token for each row in `ready`."""
        live = [self.rows[i] for i in ready]
        logits = self.batch.decode(ready, [row.pending[0] for row in live])
        drawn = [row.uniform[len(row.trajectory.ids)] for row in live]
        uniform = torch.tensor(drawn, dtype=torch.float32, device=logits.device)
        greedy = torch.tensor([row.greedy for row in live], device=logits.device)
        sampled, logprobs = sample_tokens(logits, self.temperature, uniform, greedy)
        for row, token, logprob in zip(live, sampled.tolist(), logprobs.tolist()):
            self.take(row, token, logprob)

    def take(self, row: Row, token: int, logprob: float) -> None:
        """Append one sampled token; at a stop tag run the call or read the answer."""
        t = row.trajectory
        t.ids.append(token)
        t.action_mask.append(1)
        t.sampled_mask.append(int(not row.greedy))
        t.logprobs.append(logprob)
        row.pending = [token]
        row.tail = (row.tail + self.policy.piece(token))[-32:]
        row.greedy |= self.greedy_answer and "<answer>" in row.tail
        stop = next((s for s in STOPS if s in row.tail), None)
        if stop:
            self.respond(row, stop)
        elif token in self.policy.eos:
            t.end = "eos"
        if not t.end and len(t.ids) >= self.max_new_tokens:
            t.end = "length"
        if t.end and t.answer is not None:
            t.end = "answer"  # even if a critic still had the word

    def respond(self, row: Row, stop: str) -> None:
        """Let the strategy read the turn that `stop` ended; queue what it writes, within the budget and the length limit."""
        t = row.trajectory
        row.attempts += stop == "</tool_call>"
        if row.attempts > MAX_CALLS:
            t.end = "budget"
            return
        turn = self.policy.decode(t.ids[row.turn_start :])
        turn = turn if row.turn_start else row.opening + turn
        text = STRATEGIES[self.strategy](self.ctx, row, stop, turn, self.tools, self.k)
        if text is None:
            return
        observation = observe(self.policy, text)
        if len(t.ids) + len(observation) >= self.max_new_tokens:
            t.end = "length"
            return
        append(t, observation)
        row.pending += observation
        row.tail, row.turn_start, row.greedy = "", len(t.ids), False


def rollout(
    policy: Policy, ctx: Context, tasks: list[Task], **settings
) -> list[list[Trajectory]]:
    """Sample `group_size` trajectories for each task, in the tasks' order; `settings` are the fields of Rollout.

    Groups wait for one of `slots` places; rows go at their own pace, and a finished group's place is refilled at once.
    Each row has a generator of its own: its neighbours in the batch change its tokens by rounding only. ModelError if a
    prompt does not fit the model's context.
    """
    return Rollout(policy, ctx, tasks, **settings).run()


def check_context(policy: Policy, prompt: int, new: int) -> None:
    """ModelError if prompt + new tokens exceed the model's context window."""
    context = getattr(policy.model.config, "max_position_embeddings", None) or 10**9
    window = min(context, policy.window or context)
    if prompt + new > window:
        kind = "context" if window == context else "sliding attention window"
        raise ModelError(
            f"a prompt of {prompt} tokens and --max-new-tokens {new} exceed the model's "
            f"{kind} of {window} by {prompt + new - window}"
        )


def observe(policy: Policy, text: str) -> list[int]:
    """Ids of an observation; its text can neither close the tag nor form a special token."""
    inside = policy.defuse(clip_observation(text))
    return policy.encode(f"<observation>{inside}</observation>")


def append(t: Trajectory, ids: list[int], action: int = 0) -> None:
    """Append tokens that were not sampled: an observation's, or a demonstration's own (`action` 1)."""
    t.ids += ids
    t.action_mask += [action] * len(ids)
    t.sampled_mask += [action] * len(ids)
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
SERIES = "Series"  # the thought that reads the titles themselves; no tool does


def draw_evidence(choices: list[str], rng, n: int, ask_again: float) -> list[str]:
    """n of the choices in random order, now and then with repeats; in a share `ask_again` tools come once more."""
    names = rng.permutation(choices)[:n]
    if rng.random() < 0.1:
        names = rng.choice(choices, len(names))
    if ask_again and rng.random() < ask_again:
        more = [x for x in names if x != SERIES and rng.random() < 0.5]
        names = rng.permutation([*names, *more])
    return [str(name) for name in names]


def demonstrate(
    policy: Policy,
    ctx: Context,
    task: Task,
    k: int,
    rng: np.random.Generator,
    max_steps: int = 4,
    hasty: bool = False,
    allowed: tuple[str, ...] = ALL_TOOLS,
    ask_again: float = 0.0,
) -> Trajectory:
    """A scripted trajectory for the warm-up: random evidence, and the answer that follows from it.

    Evidence is what one of the `allowed` tools shows, or a thought that finds the candidates of the last purchase's
    series (`read_titles`). The answer adds up each candidate's scores, twice what was asked for twice, and sorts by the
    sums. There are 0 to `max_steps` pieces, at least one for a pair; half of the `hasty` rankings have none, the others
    0 to `max_steps` - 1. In a share `ask_again` of all, each tool is asked for again with a chance of one half. What
    follows from these choices is fixed: chance there would be noise to learn. If no tool is allowed, ties are broken at
    random. Which evidence pays is left to reinforcement learning.
    """
    tools = () if rng.random() < 0.04 and not task.pair else allowed
    t = Trajectory(task, build_prompt(policy, ctx, task, tools, k))
    n_steps = rng.integers(bool(task.pair), max_steps + 1)
    if hasty and not task.pair:
        n_steps = rng.integers(2) * rng.integers(max_steps)
    total = np.zeros(len(task.sample.candidates), int)
    for name in draw_evidence([*tools, SERIES], rng, n_steps, ask_again):
        if name == SERIES:
            thought, shown = read_titles(ctx, task.sample)
            append(t, policy.encode(thought), action=1)
            total += shown
            continue
        call = scripted_call(ctx, task.sample, name, rng)
        # titles as the prompt has them
        spoken = json.dumps(vars(call), ensure_ascii=False)
        thought = f"<think>{TOPIC.get(name, name)}</think>"
        text = f"{thought}<tool_call>{spoken}</tool_call>"
        append(t, policy.encode(text), action=1)
        found = run(ctx, t, call)
        append(t, observe(policy, found.render()))
        if found.scores is not None:
            total += digits(found.scores)
    first = np.arange(len(total)) if allowed else rng.permutation(len(total))
    conclude(policy, t, total, first, k)
    return t


def series_of(title: str) -> str:
    """The word after the brand, by which shops name a series or model; "" in a title of fewer than three words."""
    words = title.split()
    return words[1] if len(words) > 2 else ""


def all_series(ctx: Context, sample: Sample) -> tuple[str, list[str]]:
    """The series of the last purchase and of each candidate."""
    last = ctx.ds.item[history(ctx.ds, sample)[-1]]
    own, *names = (series_of(ctx.titles[i]) for i in (last, *sample.candidates))
    return own, names


def read_titles(ctx: Context, sample: Sample) -> tuple[str, np.ndarray]:
    """A thought that lists the candidates of the last purchase's series, and [20] 9 for each of them; "" if it has none."""
    series, names = all_series(ctx, sample)
    same = [x == series != "" for x in names]
    return series_thought(series, np.flatnonzero(same) + 1), 9 * np.array(same)


def series_thought(series: str, numbers) -> str:
    """E.g. `Series Bold 3 Bold 20`: the word before each number that it finds, then the numbers' scores as tools show them."""
    if not series:
        return ""
    found = f" {series}".join(f" {n}" for n in numbers) or " none"
    scores = " ".join(f"{n}:9" for n in numbers)
    return f"<think>{SERIES} {series}{found}\n{scores}</think>"


def scripted_call(ctx: Context, sample: Sample, name: str, rng) -> Call:
    """A call about the last purchase; now and then a slip, so that errors are nothing new."""
    past = ctx.ds.item[history(ctx.ds, sample)]
    argument, title = TOOLS[name].argument, ctx.titles[past[-1]]
    if rng.random() < 0.04:  # its first word, then another title's
        title = " ".join([*title.split()[:1], *ctx.titles[past[0]].split()[1:]])
    return Call(name, {argument: title} if argument else {})


def conclude(
    policy: Policy, t: Trajectory, total: np.ndarray, first: np.ndarray, k: int
) -> None:
    """Write the answer that follows from all candidates' [20] sums, ties in the order `first`: the top k, or a letter.

    One step at a time, since a small agent that has to rank or to name the letter at once never learns to: the sums,
    which candidate of a pair is ahead, which is asked for.
    """
    task, best = t.task, np.argsort(-total[first], kind="stable")
    ranking = (first[best] + 1).tolist()
    if task.pair:
        x, y = "AB" if min(task.pair, key=ranking.index) == task.pair[0] else "BA"
        t.answer = boxed = x if task.more else y
        scores = " ".join(f"{n}:{total[n - 1]}" for n in task.pair)
        reasons = f"{scores} {x}>{y}; {task.asked}={t.answer} "
    else:
        t.answer = ranking[:k]
        boxed = f"[{','.join(map(str, t.answer))}]"
        sums = "".join(f"{n}:{x} " for n, x in enumerate(total, 1))
        reasons = sums if total.any() else ""  # without evidence nothing to add up
    before = len(t.ids)
    text = f"<answer>{reasons}\\boxed{{{boxed}}}</answer>"
    append(t, policy.encode(text), action=1)
    t.end, t.ending = "answer", len(t.ids) - before


def exercises(
    policy: Policy, ctx: Context, pool, rng, n: int, lists: int, k: int
) -> list:
    """n rows that practise one thing at a time: adding up at most so many lists, or finding the titles of a series.

    Demonstrations are too sparse to teach a new model to look things up; such rows do, as nearly all of their tokens
    depend on a look-up. Where titles have no series there is nothing to find.
    """
    found = [add_up(policy, rng, rng.integers(1, lists + 1), k) for _ in range(n // 2)]
    for _ in range(n - len(found)):
        sample, other = (pool[rng.integers(len(pool))] for _ in range(2))
        given = build_prompt(policy, ctx, Task(sample), ALL_TOOLS, k)
        t = Trajectory(Task(sample), given)
        find_series(policy, ctx, t, rng, other.candidates)
        found.append(t if t.ids else add_up(policy, rng, lists, k))
    return found


def add_up(policy: Policy, rng, lists: int, k: int) -> Trajectory:
    """Lists of scores as tools show them, then the answer that adds them up; its tokens are the actions."""
    n, t = N_CANDIDATES, Trajectory(Task(None), policy.encode("Again:"))
    total = np.zeros(n, int)
    for _ in range(lists):
        scores = rng.integers(10, size=n) * (rng.random(n) < rng.uniform(0.2, 1.2))
        text = f"<observation>{Observation('', scores / 10).render()}</observation>"
        if rng.random() < 0.2:
            numbers = np.flatnonzero(rng.random(n) < 0.1) + 1
            scores, text = np.zeros(n, int), series_thought("Duo", numbers)
            scores[numbers - 1] = 9
        append(t, policy.encode(text))
        total += scores
    conclude(policy, t, total, np.arange(n), k)
    return t


def find_series(policy: Policy, ctx: Context, t: Trajectory, rng, others) -> None:
    """Which of the prompt's candidates are of a series? Asked for their own series, other items' and last the last purchase's."""
    own, names = all_series(ctx, t.task.sample)
    others = (*others, *ctx.ds.item[history(ctx.ds, t.task.sample)])
    asked = {*names, *(series_of(ctx.titles[i]) for i in others)} - {"", own}
    for name in map(str, [*rng.permutation(sorted(asked)), own]):
        thought = series_thought(name, [i for i, x in enumerate(names, 1) if x == name])
        given = f"<think>{SERIES} {name}" if name != own else ""
        append(t, policy.encode(given))
        append(t, policy.encode(thought.removeprefix(given)), action=1)


def demonstration_texts(ctx: Context, samples: list[Sample], k: int) -> list[str]:
    """Prompts, actions and observations of one demonstration a sample, every fourth about a pair: for a tokenizer."""
    texts, rng, collector = [], np.random.default_rng(0), SimpleNamespace(defuse=str)
    collector.encode = lambda text: texts.append(text) or []  # stands in for a Policy
    collector.tokenizer = collector
    collector.apply_chat_template = lambda chat, **_: chat[-1]["content"]
    for i, sample in enumerate(samples):
        task = Task(sample, (3, 5) if i % 4 == 0 else None, i % 8 == 0)
        demonstrate(collector, ctx, task, k, rng, max_steps=6)
    return texts
