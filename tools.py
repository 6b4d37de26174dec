"""The seven recommendation tools: what each shows, its schema, and how one call is parsed and run (paper: tool suite).

A tool is a function `(context, sample[, argument]) -> Observation` and an entry in TOOLS; add one by writing both.
Besides its text, an observation rates every candidate from 0 to 9 where the evidence allows it ("8:9 3:7 ..."), so that
a ranking can be read off each tool and several can be combined.

Everything but the catalogue's own fields comes from interactions before the sample's time or was fitted before `fit_end`.
Deviation: "nearest in SASRec's embedding space" is read as the items nearest to SASRec's state after the named item
alone; that finds complements as well as look-alikes.
"""

import difflib
import json
import pathlib
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from os.path import commonprefix

import numpy as np

from data import Dataset, Sample, history, one_line, read_jsonl
from sasrec import SASRec, load_sasrec

MAX_OBSERVATION = 900  # characters; longer text is cut and says so
BEGINNING = 4  # letters by which a misquoted title is still recognised
PROFILES = "profiles.jsonl"  # in a run folder, if a model wrote them


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
        scores = " ".join(f"{i + 1}:{shown[i]}" for i in order)
        # a long text must not cost the scores
        return f"{clip_observation(self.text, MAX_OBSERVATION - 10 - len(scores))}\n{scores}"


def digits(scores: np.ndarray) -> np.ndarray:
    """Scores in [0, 1] as the digits 0 to 9 that an observation shows."""
    return np.clip((np.asarray(scores) * 10).astype(int), 0, 9)


def inert(text: str, limit: int = 60) -> str:
    """Text from data made harmless: no tag can open or close, one line, no control characters, at most `limit` long."""
    text = one_line(text[: 4 * limit].translate(str.maketrans("<>\\", "‹›/")))
    return text if len(text) <= limit else text[: limit - 1].rsplit(" ", 1)[0] + "…"


def log_rank(scores: np.ndarray, chosen: tuple[int, ...]) -> np.ndarray:
    """[0, 1] scores of the chosen items by logarithmic rank among all: the best 1, the last near 0, ties share the mean."""
    n, ascending = len(scores), np.sort(scores)
    mine = scores[list(chosen)]
    below = np.searchsorted(ascending, mine)
    upto = np.searchsorted(ascending, mine, side="right")
    rank = n - upto + (upto - below - 1) / 2
    return 1 - np.log1p(rank) / np.log1p(n)


def best(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n highest scores, best first, ties by index."""
    n = min(n, len(scores))
    near = np.flatnonzero(scores >= np.partition(scores, -n)[-n])
    return near[np.argsort(-scores[near], kind="stable")][:n]


# ------------------------------------------------------------------------------------------------------------- context


@dataclass
class Context:
    """What the tools look things up in: the dataset, SASRec, and statistics fitted before `ds.fit_end`."""

    ds: Dataset
    sasrec: SASRec
    # sample id -> profile text written by a model beforehand, shown instead of the template
    profiles: dict[int, str] = field(default_factory=dict)
    title_limit: int = 60
    unavailable: tuple[str, ...] = ()  # tools switched off, for eval.py's probes

    def __post_init__(self):
        ds = self.ds
        kinds = [i.category or i.store or "" for i in ds.items]
        # of objects: an array of text is as wide as its longest entry
        kinds = np.array(kinds, object)
        self.kind_names, self.kind = np.unique(kinds, return_inverse=True)
        self.kind_known = self.kind_names != ""  # items without a category share none
        self.kind_titles = [inert(name, 24) or "unknown" for name in self.kind_names]
        self.log_price = np.log([i.price or np.nan for i in ds.items])
        # as the agent sees them
        self.titles = [inert(i.title, self.title_limit) for i in ds.items]
        numbered = reversed([*enumerate(self.titles)])  # the first of equal titles wins
        self._by_title = {title.casefold(): i for i, title in numbered}
        self._fit_transitions()
        # SASRec's unit state after every interaction, users one after the other
        self.states = self.sasrec.all_states([ds.item[r] for r in ds.by_user]).numpy()
        norm = np.linalg.norm(self.states, axis=1, keepdims=True)
        self.states /= np.maximum(norm, 1e-9)
        self._place = np.concatenate(ds.by_user).argsort()  # in `states`
        self._memory: dict[tuple, Observation] = {}

    def _fit_transitions(self) -> None:
        """All times that kind b is bought soon after kind a, before fit_end, sorted, as a * kinds + b."""
        rows = np.concatenate(self.ds.by_user)  # a user's purchases side by side
        rows = rows[self.ds.time[rows] < self.ds.fit_end]
        user, kind = self.ds.user[rows], self.kind[self.ds.item[rows]]
        n, pairs = len(self.kind_names), []
        for gap in (1, 2):
            same = user[:-gap] == user[gap:]
            pairs.append((kind[:-gap] * n + kind[gap:])[same])
        self._pairs = np.sort(np.concatenate(pairs))
        after = np.bincount(self._pairs % n, minlength=n).astype(np.float32)
        self._kind_share = (after + 1) / (after.sum() + n)

    def lift(self, kind: int) -> np.ndarray:
        """[kinds] smoothed lift of buying each kind soon after this one, from interactions before fit_end."""
        n, share = len(self.kind_names), self._kind_share
        a, b = np.searchsorted(self._pairs, (kind * n, (kind + 1) * n))
        counts = np.bincount(self._pairs[a:b] - kind * n, minlength=n)
        counts = counts.astype(np.float32)
        return (counts + 10 * share) / (counts.sum() + 10) / share

    def as_of(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        """[items] purchases strictly before `time`; [users] the place in `states` of each user's last one, -1 for none."""
        end, last = np.searchsorted(self.ds.time, time), np.full(len(self.ds.users), -1)
        # where a user occurs twice, numpy keeps the later assignment
        last[self.ds.user[:end]] = self._place[:end]
        return np.bincount(self.ds.item[:end], minlength=len(self.ds.items)), last

    def find(self, sample: Sample, title: str) -> tuple[int, str]:
        """The item of this title: the sample's own first (recent purchases, then candidates), then the catalogue's.

        Language models misquote titles, so next comes the sample's item with the most similar title, then the one that
        shares the longest beginning, of at least BEGINNING letters; ToolError if nothing is near. Beside it a remark if
        it has another title or several items of the prompt have the same.
        """
        wanted = inert(title, self.title_limit).casefold()
        past = self.ds.item[history(self.ds, sample)][::-1]
        own = [*past.tolist(), *sample.candidates]
        titles = [self.titles[i].casefold() for i in own]
        shown = dict(zip(reversed(titles), reversed(own)))
        item = shown.get(wanted, self._by_title.get(wanted))
        if item is not None:
            n = len({i for i, x in zip(own, titles) if x == wanted})
            return item, f"first of {n} titled so: " if n > 1 else ""
        near = difflib.get_close_matches(wanted, shown, n=1, cutoff=0.6)
        alike = [len(commonprefix([wanted, x])) for x in titles]
        if not near and max(alike) < BEGINNING:
            raise ToolError(f"no item is titled {inert(title)!r}", malformed=False)
        item = shown[near[0]] if near else own[np.argmax(alike)]
        return item, f"{self.titles[item]}: "


def load_context(run: pathlib.Path, ds: Dataset, title_limit: int) -> Context:
    """What the tools of a run look things up in, the profiles included that a model has written."""
    sasrec = load_sasrec(run / "sasrec.safetensors", len(ds.items))
    profiles = {row["sample"]: row["text"] for row in read_jsonl(run / PROFILES)}
    return Context(ds, sasrec, profiles, title_limit)


# --------------------------------------------------------------------------------------------------------------- tools


def shares(values: list[str | None]) -> str:
    """The two most frequent values with their shares, e.g. `Norvik 40% Kallo 20%`."""
    top = Counter(filter(None, values)).most_common(2)
    shown = " ".join(f"{inert(v, 24)} {100 * n // len(values)}%" for v, n in top)
    return shown or "unknown"


def dollars(price: float) -> str:
    """A price in few tokens."""
    return f"${price:.0f}" if price >= 1 else f"${price:.2f}"


def get_user_profile(ctx: Context, sample: Sample) -> Observation:
    """Long-term taste over the whole past; candidates score by how much of it went to their brand, if any is known."""
    items = ctx.ds.item[history(ctx.ds, sample, None)]
    stores = [ctx.ds.items[i].store for i in items]
    bought = Counter(filter(None, stores))
    prices = np.exp(ctx.log_price[items][~np.isnan(ctx.log_price[items])])
    written = inert(ctx.profiles.get(sample.id, ""), 400)
    text = written or (
        f"brands {shares(stores)}; "
        f"categories {shares([ctx.ds.items[i].category for i in items])}; "
        f"price {dollars(np.median(prices)) if len(prices) else 'unknown'}"
    )
    scores = [bought[ctx.ds.items[c].store] for c in sample.candidates]
    scores = np.array(scores) / (len(items) + 1)
    return Observation(text, scores if bought else None)


def get_session_behavior(ctx: Context, sample: Sample) -> Observation:
    """How interests moved lately; candidates score by how often their category follows the last three (0.5: not known)."""
    rows = history(ctx.ds, sample)
    kinds = ctx.kind[ctx.ds.item[rows]]
    recent = kinds[-3:][::-1]
    moved = " > ".join(ctx.kind_titles[k] for k in kinds[-4:])
    if not ctx.kind_known[recent].any():
        return Observation(f"recent {moved}")
    # older ones count less; a lift of 1 is no evidence and scores 0.5
    drift = sum(
        0.7**i * np.log(ctx.lift(k)) for i, k in enumerate(recent) if ctx.kind_known[k]
    )
    drift = (drift * ctx.kind_known)[ctx.kind[list(sample.candidates)]]
    return Observation(f"recent {moved}", 1 / (1 + np.exp(-1.5 * drift)))


def get_rating_behavior(ctx: Context, sample: Sample) -> Observation:
    """How the user rated, by category; candidates score by how well their category was rated (0.5: not known)."""
    rows = history(ctx.ds, sample, None)
    kinds, ratings = ctx.kind[ctx.ds.item[rows]], ctx.ds.rating[rows]
    high, low, parts = ratings >= 4, ratings <= 2, []
    for band, mask in ("high", high), ("middle", ~high & ~low), ("low", low):
        top = Counter(kinds[mask].tolist()).most_common(3)
        names = ", ".join(ctx.kind_titles[k] for k, _ in top)
        parts.append(f"{band} {names or 'none'}")
    n_kinds = len(ctx.kind_names)
    # 3.4 counts as neutral, for most ratings are high; dividing by count + 1 steadies the mean of a few
    total = np.bincount(kinds, ratings - 3.4, minlength=n_kinds)
    count = np.bincount(kinds, minlength=n_kinds)
    liked = total / (count + 1) / 2 * ctx.kind_known
    scores = np.clip(0.5 + liked[ctx.kind[list(sample.candidates)]], 0, 1)
    known = ctx.kind_known[kinds].any()
    return Observation("; ".join(parts), scores if known else None)


def candidates_analyze(ctx: Context, sample: Sample) -> Observation:
    """The candidates grouped by category and price band; scored by how usual their price is for this user."""
    groups: dict[str, list[str]] = defaultdict(list)
    for number, c in enumerate(sample.candidates, 1):
        item = ctx.ds.items[c]
        category, price = inert(item.category or "category unknown", 24), item.price
        band = "" if price is None else "$" * (1 + bisect_left((5, 12, 30), price))
        groups[f"{category} {band}".strip()].append(str(number))
    text = "; ".join(f"{name}: {' '.join(ns)}" for name, ns in sorted(groups.items()))
    paid = ctx.log_price[ctx.ds.item[history(ctx.ds, sample, None)]]
    offered = ctx.log_price[list(sample.candidates)]
    if np.isnan(paid).all() or np.isnan(offered).all():
        return Observation(f"{text}; prices unknown")
    usual = np.exp(-0.5 * ((offered - np.nanmedian(paid)) / 0.5) ** 2)
    return Observation(text, np.nan_to_num(usual, nan=0.5))


def get_similar_items(ctx: Context, sample: Sample, item_title: str) -> Observation:
    """Items nearest to the named one in SASRec's space; candidates score by logarithmic rank in the catalogue."""
    item, remark = ctx.find(sample, item_title)
    scores = ctx.sasrec.scores(ctx.sasrec.states([np.array([item])]))[0].numpy()
    scores[item] = -np.inf
    near = "; ".join(ctx.titles[i] for i in best(scores, 2))
    return Observation(f"{remark}near {near}", log_rank(scores, sample.candidates))


def get_similar_users(ctx: Context, sample: Sample) -> Observation:
    """Recent purchases of the 40 users with the nearest SASRec states; candidates score by rank among those and, weakly, everyone's."""
    ds = ctx.ds
    counts, last = ctx.as_of(sample.time)
    seen = np.flatnonzero((last >= 0) & (np.arange(len(last)) != sample.user))
    if last[sample.user] < 0 or not len(seen):
        return Observation("no similar users yet")
    # take: the same as states[last[seen]], 2.5 times faster
    likeness = ctx.states.take(last[seen], 0) @ ctx.states[last[sample.user]]
    near = best(likeness, 40)
    weight = np.exp(6 * (likeness[near] - likeness[near[0]]))  # the nearest: 1
    # everyone's purchases are a weak prior
    bought = counts * (0.5 / max(1.0, counts.max()))
    for u, w in zip(seen[near], weight):
        np.add.at(bought, ds.item[ds.before(u, sample.time)[-6:]], w)
    top = best(bought, 2)
    text = "bought " + "; ".join(ctx.titles[i] for i in top)
    return Observation(text, log_rank(bought, sample.candidates))


def item_info_search(ctx: Context, sample: Sample, item_name: str) -> Observation:
    """Category, price, rating and popularity of one item; used as a ranking it is the candidates' popularity."""
    item, remark = ctx.find(sample, item_name)
    found = ctx.ds.items[item]
    category = inert(found.category or "category unknown", 24)
    price = "price unknown" if found.price is None else dollars(found.price)
    stars = found.average_rating
    rated = "rating unknown" if stars is None else f"rated {stars}"
    counts, _ = ctx.as_of(sample.time)
    percent = int(100 * (counts <= counts[item]).mean())
    return Observation(
        f"{remark}{category}; {price}; {rated}; as popular as {percent}%"
    )


@dataclass(frozen=True)
class Tool:
    """A function the agent may call, and what the prompt says of it; `argument` is its only parameter, if any."""

    run: Callable[..., Observation]
    description: str
    argument: str | None = None

    def schema(self) -> dict:
        """JSON schema in the form chat templates expect."""
        takes = {self.argument: {"type": "string"}} if self.argument else {}
        parameters = {"type": "object", "properties": takes, "required": list(takes)}
        named = {"name": self.run.__name__, "description": self.description}
        return named | {"parameters": parameters}


TOOLS = {tool.run.__name__: tool for tool in (
    Tool(get_user_profile, "The user's long-term taste: brands, categories, usual price."),
    Tool(item_info_search, "Category, price, rating and popularity of one item.", "item_name"),
    Tool(candidates_analyze, "The candidates grouped by category and price band, and how usual their prices are."),
    Tool(get_session_behavior, "How the user's recent interests moved."),
    Tool(get_rating_behavior, "What the user rated high, middle and low, by category."),
    Tool(get_similar_items, "Items that go with a given one.", "item_title"),
    Tool(get_similar_users, "What users with similar behaviour bought recently."),
)}  # fmt: skip


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
        known = ", ".join(allowed)
        raise ToolError(f"unknown tool {inert(name, 40)!r}; tools: {known}")
    wanted = TOOLS[name].argument
    if not isinstance(arguments, dict) or set(arguments) != {wanted} - {None}:
        raise ToolError(f"{name} takes {wanted or 'no arguments'}")
    if not all(isinstance(v, str) and len(v) <= 500 for v in arguments.values()):
        raise ToolError(f"{name}: {wanted} must be a string of at most 500 characters")
    return Call(name, arguments)


def run_call(ctx: Context, sample: Sample, call: Call) -> Observation:
    """Run one call; the same call for the same sample is answered from memory."""
    if call.name in ctx.unavailable:
        # equal scores change no sum; where a tool's scores are missing an agent may ask again to the end
        return Observation("not available now", np.zeros(len(sample.candidates)))
    key = (call.name, sample.id, sample.candidates, *call.arguments.values())
    if key not in ctx._memory:
        if len(ctx._memory) > 100_000:
            ctx._memory.clear()
        found = TOOLS[call.name].run(ctx, sample, **call.arguments)
        if found.scores is not None:
            n, scores = len(sample.candidates), np.asarray(found.scores)
            # a NaN, which is not in [0, 1] either, would spread through what adds up
            fits = scores.shape == (n,) and ((scores >= 0) & (scores <= 1)).all()
            assert fits, f"{call.name}: scores must be {n} numbers in [0, 1], or None"
        ctx._memory[key] = found
    return ctx._memory[key]


def tool_scores(ctx: Context, name: str, sample: Sample) -> np.ndarray:
    """[20] the tool's own rating of the candidates; similar items are the last purchase's, item info goes by popularity."""
    if name == "item_info_search":
        counts, _ = ctx.as_of(sample.time)
        mine = counts[list(sample.candidates)]
        return np.searchsorted(np.sort(counts), mine, side="right") / len(counts)
    last = ctx.titles[ctx.ds.item[history(ctx.ds, sample)[-1]]]
    arguments = {TOOLS[name].argument: last} if TOOLS[name].argument else {}
    try:
        scores = run_call(ctx, sample, Call(name, arguments)).scores
    except ToolError:  # it takes something other than a title
        scores = None
    return np.zeros(len(sample.candidates)) if scores is None else scores


def clip_observation(text: str, limit: int = MAX_OBSERVATION) -> str:
    """An observation cut to `limit` characters, which it says."""
    return text if len(text) <= limit else text[:limit] + " (cut)"
