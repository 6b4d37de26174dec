"""The seven recommendation tools: what each shows, its schema, and how one call is parsed and run (paper: tool suite).

A tool is a function `(context, sample, **arguments) -> Observation` and an entry in TOOLS; add one by writing both.
Besides its text, an observation rates every candidate from 0 to 9 where the evidence allows it ("8:9 3:7 ..."), so that
a ranking can be read off each tool and several can be combined.

Everything shown comes from interactions strictly before the sample's time and from statistics fitted before `fit_end`.
Deviation: "nearest in SASRec's embedding space" is read as the items nearest to SASRec's state after the named item
alone; that finds complements as well as look-alikes.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from data import Dataset, Item, Sample, history
from sasrec import SASRec

MAX_OBSERVATION = 900  # characters; longer text is cut and says so


class ToolError(ValueError):
    """A call that cannot be run: its message becomes the observation, and `malformed` costs the reward of Eq. 1."""

    def __init__(self, message: str, malformed: bool = True):
        super().__init__(message)
        self.malformed = malformed


@dataclass(frozen=True)
class Observation:
    """What the environment answers: text, and a score in [0, 1] for each of the 20 candidates where there is one."""

    text: str
    scores: np.ndarray | None = None

    def render(self) -> str:
        """The text, then `number:digit` for every candidate: best first, ties by number."""
        if self.scores is None:
            return self.text
        shown = digits(self.scores)
        order = np.argsort(-shown, kind="stable")
        return f"{self.text}\n" + " ".join(f"{i + 1}:{shown[i]}" for i in order)


def digits(scores: np.ndarray) -> np.ndarray:
    """Scores in [0, 1] as the digits 0 to 9 that an observation shows."""
    return np.clip((np.asarray(scores) * 10).astype(int), 0, 9)


def inert(text: str, limit: int = 60) -> str:
    """Text from data made harmless: no tag can open or close, one line, no control characters, at most `limit` long."""
    text = text[: 4 * limit].translate({60: "‹", 62: "›", 92: "/"})
    text = "".join(
        c if c.isprintable() and unicodedata.category(c)[0] != "C" else " "
        for c in text
    )
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rsplit(" ", 1)[0] + "…"


def log_rank(scores: np.ndarray) -> np.ndarray:
    """Scores over the catalogue to [0, 1] by logarithmic rank: the best item 1, the last 0, ties share the mean."""
    n = len(scores)
    _, inverse, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - counts + (counts - 1) / 2)[inverse]
    return 1 - np.log1p(rank) / np.log1p(n)


# ------------------------------------------------------------------------------------------------------------- context


@dataclass
class Context:
    """What the tools look things up in: the dataset, SASRec, and statistics fitted before `ds.fit_end`."""

    ds: Dataset
    sasrec: SASRec
    # sample id -> profile text written by a model beforehand, shown instead of the template
    profiles: dict[int, str] = field(default_factory=dict)
    title_limit: int = 60

    def __post_init__(self):
        ds = self.ds
        kinds = [item.category or item.store or "" for item in ds.items]
        names = sorted(set(kinds))
        self.kind = self._index(kinds, names)
        self.kind_names = names
        brand_names = sorted({i.store or "" for i in ds.items})
        self.brand = self._index([i.store or "" for i in ds.items], brand_names)
        self.log_price = np.array(
            [np.log(i.price) if i.price else np.nan for i in ds.items]
        )
        self.transitions = self._kind_transitions()
        self.states, self.state_key = self._all_states()
        self._memory: dict[tuple, Observation] = {}
        self._shown: dict[str, int] | None = None

    @staticmethod
    def _index(values: list[str], names: list[str]) -> np.ndarray:
        where = {n: i for i, n in enumerate(names)}
        return np.array([where[v] for v in values])

    def _kind_transitions(self) -> np.ndarray:
        """[kinds, kinds] smoothed lift of buying kind b soon after kind a, from interactions before fit_end."""
        n = len(self.kind_names)
        counts = np.zeros((n, n), np.float32)
        for u in range(len(self.ds.users)):
            seq = self.kind[self.ds.item[self.ds.before(u, self.ds.fit_end)]]
            for gap in (1, 2):
                np.add.at(counts, (seq[:-gap], seq[gap:]), 1.0)
        base = (counts.sum(0) + 1) / (counts.sum() + n)
        return (counts + 10 * base) / (counts.sum(1, keepdims=True) + 10) / base

    def _all_states(self) -> tuple[np.ndarray, np.ndarray]:
        """SASRec's unit state after each interaction, and a sortable key (user, time) an interaction."""
        ds = self.ds
        rows = np.concatenate(ds.by_user)
        parts = [ds.item[r[: j + 1][-32:]] for r in ds.by_user for j in range(len(r))]
        states = self.sasrec.states(parts).numpy()
        key = ds.user[rows].astype(np.int64) * 10**13 + ds.time[rows]
        return states / np.maximum(
            np.linalg.norm(states, axis=1, keepdims=True), 1e-9
        ), key

    def title(self, item: int) -> str:
        """An item's title as the agent sees it."""
        return inert(self.ds.items[item].title, self.title_limit)

    def find(self, sample: Sample, title: str) -> int | None:
        """The item shown under this title: among the sample's own first, then in the catalogue; None if none is."""
        if self._shown is None:
            self._shown = {}
            for i in range(len(self.ds.items)):
                self._shown.setdefault(self.title(i).casefold(), i)
        wanted = inert(title, self.title_limit).casefold()
        own = (*self.ds.item[history(self.ds, sample)][::-1], *sample.candidates)
        near = (int(i) for i in own if self.title(i).casefold() == wanted)
        return next(near, self._shown.get(wanted))


# --------------------------------------------------------------------------------------------------------------- tools


def shares(values: list[str], most: int = 2) -> str:
    """The most frequent values with their shares, e.g. `Norvik 40% Kallo 20%`."""
    known = [v for v in values if v]
    if not known:
        return "unknown"
    return " ".join(
        f"{inert(v, 24)} {100 * n // len(values)}%"
        for v, n in Counter(known).most_common(most)
    )


def dollars(price: float) -> str:
    return f"${price:.0f}" if price >= 1 else f"${price:.2f}"


def get_user_profile(ctx: Context, sample: Sample) -> Observation:
    """Long-term taste over the whole past; candidates score by how much of it went to their brand."""
    items = ctx.ds.item[history(ctx.ds, sample, None)]
    brands = ctx.brand[items]
    counts = np.bincount(brands, minlength=ctx.brand.max() + 1) / (len(items) + 1)
    cand = np.array(sample.candidates)
    known = np.array([ctx.ds.items[c].store is not None for c in cand])
    prices = np.exp(ctx.log_price[items][~np.isnan(ctx.log_price[items])])
    written = inert(ctx.profiles.get(sample.id, ""), 400)
    text = written or (
        f"brands {shares([ctx.ds.items[i].store for i in items])}; "
        f"categories {shares([ctx.ds.items[i].category for i in items])}; "
        f"price {dollars(np.median(prices)) if len(prices) else 'unknown'}"
    )
    return Observation(text, np.clip(1.5 * counts[ctx.brand[cand]], 0, 1) * known)


def get_session_behavior(ctx: Context, sample: Sample) -> Observation:
    """How interests moved lately; candidates score by how often their category follows the last three."""
    rows = history(ctx.ds, sample)
    kinds = ctx.kind[ctx.ds.item[rows]]
    recent = kinds[-3:][::-1]
    drift = sum(0.7**i * np.log(ctx.transitions[k]) for i, k in enumerate(recent))
    scores = 1 / (1 + np.exp(-1.5 * drift[ctx.kind[list(sample.candidates)]]))
    moved = " > ".join(inert(ctx.kind_names[k], 24) or "unknown" for k in kinds[-4:])
    return Observation(f"recent {moved}", scores)


def get_rating_behavior(ctx: Context, sample: Sample) -> Observation:
    """The user's items by rating; candidates score by how well their category was rated (0.5: not known)."""
    rows = history(ctx.ds, sample, None)
    kinds, ratings = ctx.kind[ctx.ds.item[rows]], ctx.ds.rating[rows]
    bands = {
        "high": ratings >= 4,
        "middle": (ratings > 2) & (ratings < 4),
        "low": ratings <= 2,
    }
    parts = []
    for name, mask in bands.items():
        names = [
            inert(ctx.kind_names[k], 24)
            for k, _ in Counter(kinds[mask].tolist()).most_common(3)
        ]
        parts.append(f"{name} {', '.join(n or 'unknown' for n in names) or 'none'}")
    n_kinds = len(ctx.kind_names)
    total = np.bincount(kinds, ratings - 3.4, minlength=n_kinds)
    count = np.bincount(kinds, minlength=n_kinds)
    scores = 0.5 + (total / (count + 1) / 2)[ctx.kind[list(sample.candidates)]]
    return Observation("; ".join(parts), np.clip(scores, 0, 1))


def candidates_analyze(ctx: Context, sample: Sample) -> Observation:
    """The candidates grouped by category and price band; scored by how usual their price is for this user."""
    groups: dict[str, list[int]] = {}
    for number, c in enumerate(sample.candidates, 1):
        item = ctx.ds.items[c]
        band = (
            ""
            if item.price is None
            else "$" * (1 + int(np.searchsorted([5, 12, 30], item.price)))
        )
        groups.setdefault(
            f"{inert(item.category or 'category unknown', 24)} {band}".strip(), []
        ).append(number)
    text = "; ".join(
        f"{name}: {' '.join(map(str, numbers))}"
        for name, numbers in sorted(groups.items())
    )
    paid = ctx.log_price[ctx.ds.item[history(ctx.ds, sample, None)]]
    offered = ctx.log_price[list(sample.candidates)]
    if np.isnan(paid).all() or np.isnan(offered).all():
        return Observation(f"{text}; prices unknown")
    gap = np.nan_to_num(offered - np.nanmedian(paid), nan=np.inf)
    return Observation(text, np.exp(-0.5 * (gap / 0.5) ** 2))


def get_similar_items(ctx: Context, sample: Sample, item_title: str) -> Observation:
    """Items nearest to the named one in SASRec's space; candidates score by logarithmic rank in the catalogue."""
    item = ctx.find(sample, item_title)
    if item is None:
        raise ToolError(f"no item is titled {inert(item_title)!r}", malformed=False)
    scores = ctx.sasrec.scores(ctx.sasrec.states([np.array([item])]))[0].numpy()
    scores[item] = -np.inf
    nearest = np.argpartition(-scores, 2)[:2]
    text = "near " + "; ".join(
        ctx.title(i) for i in nearest[np.argsort(-scores[nearest])]
    )
    return Observation(text, log_rank(scores)[list(sample.candidates)])


def get_similar_users(ctx: Context, sample: Sample) -> Observation:
    """Recent purchases of the 40 users with the nearest SASRec states; candidates score by rank among those."""
    ds = ctx.ds
    users = np.arange(len(ds.users), dtype=np.int64) * 10**13
    ends = np.searchsorted(
        ctx.state_key, users + sample.time
    )  # one past each user's last visible interaction
    starts = np.searchsorted(ctx.state_key, users)
    seen = np.flatnonzero((ends > starts) & (np.arange(len(users)) != sample.user))
    mine = ctx.states[ends[sample.user] - 1]
    if ends[sample.user] == starts[sample.user] or not len(seen):
        return Observation("no similar users yet")
    likeness = ctx.states[ends[seen] - 1] @ mine
    near = np.argsort(-likeness, kind="stable")[:40]
    weight = np.exp(6 * (likeness[near] - likeness[near[0]]))
    bought = popularity(ds, sample.time)
    bought *= 0.5 / max(1.0, bought.max())  # everyone's purchases are a weak prior
    for u, w in zip(seen[near], weight):
        np.add.at(bought, ds.item[ds.before(u, sample.time)[-6:]], w)
    top = np.argsort(-bought, kind="stable")[:2]
    return Observation(
        "bought " + "; ".join(ctx.title(i) for i in top),
        log_rank(bought)[list(sample.candidates)],
    )


def popularity(ds: Dataset, time: int) -> np.ndarray:
    """[items] purchases strictly before `time`."""
    return np.bincount(
        ds.item[: np.searchsorted(ds.time, time)], minlength=len(ds.items)
    ).astype(float)


def item_info_search(ctx: Context, sample: Sample, item_name: str) -> Observation:
    """Category, price, rating and popularity of one item; used as a ranking it is the candidates' popularity."""
    item = ctx.find(sample, item_name)
    if item is None:
        raise ToolError(f"no item is named {inert(item_name)!r}", malformed=False)
    found: Item = ctx.ds.items[item]
    counts = popularity(ctx.ds, sample.time)
    percent = int(100 * (counts <= counts[item]).mean())
    return Observation(
        f"{inert(found.category or 'category unknown', 24)}; "
        f"{'price unknown' if found.price is None else dollars(found.price)}; "
        f"{'rating unknown' if found.average_rating is None else f'rated {found.average_rating}'}; as popular as {percent}%"
    )


@dataclass(frozen=True)
class Tool:
    """A function the agent may call, and what the prompt says of it; `argument` is its only parameter, if any."""

    run: Callable[..., Observation]
    description: str
    argument: str | None = None

    @property
    def name(self) -> str:
        return self.run.__name__

    def schema(self) -> dict:
        """JSON schema in the form chat templates expect."""
        properties = {self.argument: {"type": "string"}} if self.argument else {}
        parameters = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
        }
        return {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
        }


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            get_user_profile,
            "The user's long-term taste: brands, categories, usual price.",
        ),
        Tool(
            item_info_search,
            "Category, price, rating and popularity of one item.",
            "item_name",
        ),
        Tool(
            candidates_analyze,
            "The candidates grouped by category and price band, and how usual their prices are.",
        ),
        Tool(get_session_behavior, "How the user's recent interests moved."),
        Tool(
            get_rating_behavior,
            "The user's past items grouped by high, middle and low rating.",
        ),
        Tool(get_similar_items, "Items that go with a given one.", "item_title"),
        Tool(get_similar_users, "What users with similar behaviour bought recently."),
    )
}


# ------------------------------------------------------------------------------------------------ parsing and running


@dataclass(frozen=True)
class Call:
    """One parsed tool call."""

    name: str
    arguments: dict[str, str]


def parse_call(text: str, allowed: tuple[str, ...]) -> Call:
    """Read the JSON between <tool_call> tags; ToolError says what is wrong with it."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as e:  # bad JSON, or a number of 5,000 digits
        raise ToolError(f"not a JSON object: {str(e)[:60]}") from e
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ToolError('expected {"name": ..., "arguments": {...}}')
    name, arguments = call["name"], call.get("arguments", {})
    if name not in allowed:
        raise ToolError(
            f"unknown tool {inert(name, 40)!r}; tools: {', '.join(allowed)}"
        )
    wanted = {TOOLS[name].argument} - {None}
    if not isinstance(arguments, dict) or set(arguments) != wanted:
        raise ToolError(f"{name} takes {' '.join(wanted) or 'no arguments'}")
    if not all(isinstance(v, str) and len(v) <= 500 for v in arguments.values()):
        raise ToolError(
            f"{name}: {' '.join(wanted)} must be a string of at most 500 characters"
        )
    return Call(name, arguments)


def run_call(ctx: Context, sample: Sample, call: Call) -> Observation:
    """Run one call; the same call for the same sample is answered from memory."""
    key = (call.name, sample.id, sample.candidates, *call.arguments.values())
    if key not in ctx._memory:
        if len(ctx._memory) > 100_000:
            ctx._memory.clear()
        ctx._memory[key] = TOOLS[call.name].run(ctx, sample, **call.arguments)
    return ctx._memory[key]


def tool_scores(ctx: Context, name: str, sample: Sample) -> np.ndarray:
    """[20] the tool's own rating of the candidates: for similar items of the last purchase, for info popularity."""
    if name == "item_info_search":
        counts = popularity(ctx.ds, sample.time)
        return np.searchsorted(
            np.sort(counts), counts[list(sample.candidates)], side="right"
        ) / len(counts)
    last = ctx.title(ctx.ds.item[history(ctx.ds, sample)[-1]])
    arguments = {TOOLS[name].argument: last} if TOOLS[name].argument else {}
    scores = run_call(ctx, sample, Call(name, arguments)).scores
    return np.zeros(len(sample.candidates)) if scores is None else scores


def clip_observation(text: str) -> str:
    """An observation cut to MAX_OBSERVATION characters."""
    return text if len(text) <= MAX_OBSERVATION else text[:MAX_OBSERVATION] + " (cut)"
