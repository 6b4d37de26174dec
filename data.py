"""What is ranked: a catalogue, time-stamped interactions, and samples of 20 candidates (paper: task definition, data).

A dataset is a folder with `items.jsonl` and `interactions.csv` in Amazon Reviews 2023's field names (see `read_folder`),
or the bundled world `office-sim`, a simulated office-supplies shop (see `simulate_office`). `office` means the folder
data/office where it exists and the bundled world otherwise. `python data.py office` (or cds, instruments, games) makes
that folder from Amazon Reviews 2023.

Deviations: 1. a user's interactions of the same time (day-granular data) are ordered as in the file, 1 ms apart;
2. tools and SASRec are fitted on the first 7/8 of the train split and the agent learns on the last eighth, so that
nothing fitted has seen the future of a sample that the agent learns from.
"""

import argparse
import csv
import datetime
import difflib
import gzip
import hashlib
import html
import json
import math
import os
import pathlib
import re
import shutil
import ssl
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from operator import itemgetter
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from numpy.random import Generator
from tqdm import tqdm

N_CANDIDATES = 20
N_HISTORY = 10
KNOWN = ("office", "office-sim", "cds", "instruments", "games")
HOME = pathlib.Path(__file__).parent / "data"  # of the datasets
HEADER = ["user_id", "parent_asin", "rating", "timestamp"]  # of interactions.csv
OPTIONAL = {  # fields an item may lack, with their types (a price may be of any)
    "store": (str, "text"),
    "main_category": (str, "text"),
    "categories": (list, "a list of text"),
    "average_rating": ((int, float), "a number"),
    "rating_number": ((int, float), "a number"),
}
MAX_LINE = 1 << 22  # bytes; no real product or interaction has a longer line


class DatasetError(ValueError):
    """A dataset that cannot be used: one line with file, line, field and what to do."""


def run_main(main: Callable[[], None], stopped: str, *errors: type) -> None:
    """Run a script; Ctrl-C, or an error that its user can fix, ends it with one line, not a traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (DatasetError, *errors) as error:
        reason = str(error)
    except OSError as error:  # a full disk, a folder without write permission
        reason = first_line(error)
        if error.strerror:
            where = error.filename or "the run folder"
            reason = f"{where}: cannot be read or written ({error.strerror})"
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def first_line(error: Exception) -> str:
    """The first line of what an error says, its kind if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """DatasetError that names `path`, whatever fails inside: each library has errors of its own for a damaged file."""
    try:
        yield
    except Exception as e:
        hint = "restore it, or start a new run"
        raise DatasetError(f"{path}: cannot be read ({first_line(e)}); {hint}") from e


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """The objects in a .jsonl file, without lines cut off by an interruption; none if there is no such file."""
    found = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(text))
    return found


def one_line(text: str) -> str:
    """Text on one line, single-spaced, without unprintable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@dataclass(frozen=True)
class Item:
    """One product; everything but id and title may be None (unknown)."""

    id: str
    title: str
    store: str | None = None
    category: str | None = None
    price: float | None = None
    average_rating: float | None = None
    rating_number: int | None = None


@dataclass(frozen=True)
class Sample:
    """One ranking task, e.g. user 17 at time t with 20 catalogue indices of which `candidates[target]` was bought.

    Candidates are shown to the agent as numbers 1 to 20, so the positive's number is `target + 1`.
    """

    id: int  # index of the interaction that holds the positive
    user: int
    time: int  # ms; only interactions strictly before it may be seen
    candidates: tuple[int, ...]
    target: int


@dataclass
class Dataset:
    """A catalogue and its interactions, ordered by (time, row); arrays have one entry an interaction."""

    name: str
    items: list[Item]
    users: list[str]
    user: np.ndarray  # [N] index into users
    item: np.ndarray  # [N] index into items
    rating: np.ndarray  # [N] 1 to 5
    time: np.ndarray  # [N] ms
    simulated: bool = False
    utility: np.ndarray | None = None  # [N, items] true, at each choice (oracle only)
    notes: list[str] = field(default_factory=list)  # what was skipped while reading
    splits: dict[str, "Samples"] = field(default_factory=dict)

    def __post_init__(self):
        order = np.argsort(self.user, kind="stable")
        starts = np.searchsorted(self.user[order], np.arange(len(self.users) + 1))
        self.by_user: list[np.ndarray] = np.split(order, starts[1:-1])

    def before(self, user: int, time: int) -> np.ndarray:
        """Interaction indices of `user` strictly before `time`, oldest first."""
        rows = self.by_user[user]
        return rows[: np.searchsorted(self.time[rows], time, side="left")]

    @property
    def fit_end(self) -> int:
        """Time (ms) before which interactions may be used to fit SASRec and the tools' statistics."""
        return self.splits["train"][0].time

    @property
    def train_end(self) -> int:
        """Time (ms) of the first validation sample."""
        return self.splits["valid"][0].time

    def describe(self) -> str:
        """The first line of every run."""
        kind = "real interactions"
        if self.simulated:
            kind = "SIMULATED office-supplies shop (bundled, not real people)"
        counts = ", ".join(f"{name} {len(s):,}" for name, s in self.splits.items())
        return (
            f"dataset {self.name}: {kind}; {len(self.users):,} users, {len(self.items):,} items, "
            f"{len(self.item):,} interactions; samples: {counts}"
        )

    def fingerprint(self) -> str:
        """Hash of everything that samples are made of."""
        h = hashlib.sha256()
        for array in (self.user, self.item, self.rating, self.time):
            h.update(array.tobytes())
        h.update(json.dumps([vars(i) for i in self.items]).encode())
        return h.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ samples and the split


@dataclass(eq=False, repr=False)
class Samples(Sequence):
    """The samples of some interactions, each drawn when asked for: a million cost nothing until then."""

    ds: Dataset
    rows: np.ndarray  # the interactions that hold the positives
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Samples(self.ds, self.rows[i], self.seed)
        return self.of(int(self.rows[i]))

    def of(self, row: int) -> Sample:
        """The sample whose positive is interaction `row`, which is its id."""
        return draw_sample(self.ds, row, self.seed)

    def __add__(self, other: "Samples") -> "Samples":
        return Samples(self.ds, np.append(self.rows, other.rows), self.seed)


def draw_sample(ds: Dataset, row: int, seed: int) -> Sample:
    """The positive of interaction `row` and 19 random items its user never interacted with, shuffled.

    The draw has its own seed: it depends on the dataset, `seed` and `row` only.
    """
    rng, user = np.random.default_rng([seed, row]), int(ds.user[row])
    taken = set(ds.item[ds.by_user[user]].tolist())
    candidates: list[int] = []
    while missing := N_CANDIDATES - 1 - len(candidates):
        for i in rng.integers(len(ds.items), size=missing).tolist():
            if i not in taken:
                taken.add(i)
                candidates.append(i)
    target = int(rng.integers(N_CANDIDATES))
    candidates.insert(target, int(ds.item[row]))
    return Sample(row, user, int(ds.time[row]), tuple(candidates), target)


def make_splits(ds: Dataset, seed: int = 0) -> None:
    """Cut the samples 80/10/10 by time into fit + train, valid and test.

    Every interaction but a user's first is a sample. The 80% are cut once more: their first seven eighths ("fit") only
    fit SASRec and the tools' statistics (and occur in the warm-up's demonstrations, which look at no positive), the
    last eighth trains the agent.
    """
    rows = np.sort(np.concatenate([rows[1:] for rows in ds.by_user]))
    n = len(rows)
    if n < 40:
        few = f"only {n} samples have a history; add interactions (40 are needed)"
        raise DatasetError(f"{ds.name}: {few}")
    negatives = N_CANDIDATES - 1
    most = max(len(set(ds.item[r].tolist())) for r in ds.by_user)
    if (n_items := len(ds.items)) < most + negatives:
        need = f"{negatives} negatives beside a user's {most} items need {most + negatives}"
        raise DatasetError(f"{ds.name}: {n_items} items are too few: {need}")
    cuts = [0, int(0.7 * n), int(0.8 * n), int(0.9 * n), n]
    for name, a, b in zip(("fit", "train", "valid", "test"), cuts, cuts[1:]):
        ds.splits[name] = Samples(ds, rows[a:b], seed)


# ------------------------------------------------------------------------------------------------- the bundled office

SHOP = """\
desk    Staplers  Stapler Staples Remover
desk    Pens      Ballpoint Gelpen Fineliner
desk    Clips     Binder Clip Pin
mail    Envelopes Envelope Mailer Pouch
mail    Labels    Label Stamp Sticker
mail    Tape      Tape Dispenser Glue
archive Folders   Folder Sleeve Divider
archive Boxes     Box Crate Drawer
archive Shelves   Shelf Rack Tray
print   Paper     Paper Cardstock Roll
print   Ink       Ink Toner Ribbon
print   Printers  Printer Scanner Laminator
study   Notebooks Notebook Journal Pad
study   Planners  Planner Calendar Diary
study   Boards    Board Easel Chart
art     Markers   Marker Crayon Chalk
art     Scissors  Scissors Cutter Knife
art     Paint     Paint Brush Canvas
"""  # a project (what a buyer is busy with for a while), a category of it, its products
SHELVES = [line.split() for line in SHOP.splitlines()]
KINDS = [(p, c, noun) for p, c, *nouns in SHELVES for noun in nouns]
PROJECTS = list(dict.fromkeys(project for project, *_ in SHELVES))
CATEGORIES = list(dict.fromkeys(category for _, category, *_ in SHELVES))
BRANDS = "Norvik Kallo Bexley Tamaro Ostia Quill Merino Zephyr Halden Ivory Jasper Lumen Pavo Rivet Sable Umber"
ADJECTIVES = "Fine Bold Mini Grand Classic Matte Clear Blue Red Green Grey Slim Heavy Eco Pro Soft Quick Duo Prime Basic"
STYLES, BANDS = 8, 4  # hidden styles of items; price bands
# what can drive a simulated user; the utility of a full match; how often it is the main driver
EVIDENCE = "brand", "project", "price", "series", "taste", "rating"
STRENGTH = np.array([7.0, 6.5, 5.5, 7.0, 5.5, 6.5])
FREQUENCY = np.array([0.36, 0.20, 0.03, 0.25, 0.04, 0.12])
DAY = 86_400_000
LENGTH = (8, 16)


def make_catalogue(rng: Generator, n_items: int = 1800) -> tuple[list[Item], dict]:
    """Items of the simulated shop and their hidden properties, arrays with one entry an item."""
    brands, adjectives = BRANDS.split(), ADJECTIVES.split()
    base = rng.uniform(0, 1.0, len(KINDS))
    items, titles, hidden = [], {""}, []
    for i in range(n_items):
        project, category, noun = KINDS[i % len(KINDS)]
        title = ""
        while title in titles:
            b, a = rng.integers(len(brands)), rng.integers(len(adjectives))
            title = f"{brands[b]} {adjectives[a]} {noun}"
        titles.add(title)
        band = rng.integers(BANDS)
        level = 1.2 + 0.9 * band + 0.3 * base[i % len(KINDS)] + 0.25 * rng.normal()
        price = round(float(np.exp(level)), 2)
        stars = round(float(rng.uniform(3.4, 4.9)), 1)
        items.append(Item(f"SIM{i:04d}", title, brands[b], category, price, stars))
        places = PROJECTS.index(project), CATEGORIES.index(category)
        hidden.append((b, a, *places, band, rng.integers(STYLES)))
    names = "brand", "series", "project", "category", "band", "style"
    prop = dict(zip(names, np.array(hidden).T))
    prop["appeal"] = 0.2 * rng.normal(size=n_items)
    number = np.exp(4 + prop["appeal"] * 4 + 0.3 * rng.normal(size=n_items))
    return [replace(i, rating_number=int(n)) for i, n in zip(items, number)], prop


def simulate_office(n_users: int = 2000, seed: int = 7) -> Dataset:
    """A shop whose users differ in which evidence predicts them; generated in about 2 s.

    Each user has one main and two lesser drivers among EVIDENCE, hidden tastes (favourite brand, price band, style,
    loved and hated categories) and a project that changes now and then. An item's utility is the weighted sum of
    the six matches plus its general appeal; the next purchase is drawn from the softmax over items not yet owned.
    """
    rng = np.random.default_rng(seed)
    items, prop = make_catalogue(rng)
    users = draw_users(rng, prop, n_users)
    user, item, rating, time, utility = purchases(rng, prop, users)
    o = np.argsort(time, kind="stable")
    names = [f"U{u:04d}" for u in range(n_users)]
    columns = user[o], item[o], rating[o], time[o]
    return Dataset("office-sim", items, names, *columns, True, utility[o])


def draw_users(rng: Generator, prop: dict, n: int) -> tuple[np.ndarray, ...]:
    """What drives n users: drive [users, evidence], the utility of a full match; project [users], their first; love
    [users, categories], 1 for three loved and -1 for six hated ones; lasting [users, items], the utility that no
    purchase changes."""
    drive = np.full((n, len(EVIDENCE)), 0.10)  # a little of everything
    drivers = np.argsort(-(rng.gumbel(size=drive.shape) + np.log(FREQUENCY)), axis=1)
    np.put_along_axis(drive, drivers[:, :3], np.array([[1.0, 0.7, 0.35]]), axis=1)
    drive *= STRENGTH
    sizes = len(BRANDS.split()), BANDS, STYLES, len(PROJECTS)
    brand, band, style, project = (rng.integers(size, size=n) for size in sizes)
    love = np.zeros((n, len(CATEGORIES)))
    order = np.argsort(rng.random(love.shape), axis=1)
    np.put_along_axis(love, order[:, :3], 1.0, axis=1)
    np.put_along_axis(love, order[:, 3:9], -1.0, axis=1)
    far = np.abs(prop["band"] - band[:, None]).clip(0, 2)
    lasting = drive[:, [0]] * (prop["brand"] == brand[:, None])
    lasting += drive[:, [2]] * (1 - 0.8 * far)
    lasting += drive[:, [4]] * (prop["style"] == style[:, None])
    lasting += drive[:, [5]] * love[:, prop["category"]] + prop["appeal"]
    return drive, project, love, lasting


def purchases(rng: Generator, prop: dict, users: tuple) -> list[np.ndarray]:
    """user, item, rating, time and utility ([N, items]) of every purchase of the users drawn."""
    drive, project, love, lasting = users
    n_users = len(lasting)
    everyone = np.arange(n_users)
    length = rng.integers(*LENGTH, size=n_users)
    start = rng.uniform(0, 0.25, size=n_users)
    owned, goes = np.zeros(lasting.shape, bool), np.zeros(lasting.shape, bool)
    steps: list[tuple[np.ndarray, ...]] = []
    for step in range(length.max()):
        moves = rng.random(n_users) < 0.15
        project = np.where(moves, rng.integers(len(PROJECTS), size=n_users), project)
        busy = prop["project"] == project[:, None]
        utility = lasting + drive[:, [1]] * busy + drive[:, [3]] * goes
        noisy = utility + rng.gumbel(size=utility.shape)
        item = np.where(owned, -np.inf, noisy).argmax(1)
        owned[everyone, item] = True
        goes = prop["series"] == prop["series"][item][:, None]
        liked = love[everyone, prop["category"][item]]
        rating = 3.6 + 1.2 * liked + 0.7 * rng.normal(size=n_users)
        done = (1 - start) * (step + rng.uniform(0.1, 0.9, n_users)) / length
        time = milliseconds("2022-10-01") + (start + done) * 365 * DAY
        columns = everyone, item, rating.round().clip(1, 5), time.astype(np.int64)
        now = step < length
        steps.append(tuple(c[now] for c in (*columns, utility.astype(np.float32))))
    return [np.concatenate(column) for column in zip(*steps)]


# --------------------------------------------------------------------------------------------------- reading a folder


def open_lines(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """("path:number", line) of a UTF-8 file; a .gz file is unpacked behind a progress bar.

    DatasetError names the file, and the line where there is one, if it cannot be read.
    """
    number, packed = 0, path.suffix == ".gz"
    try:
        size = os.stat(path).st_size
        bar = {"desc": f"reading {path.name}", "disable": not packed}
        with open(path, "rb") as f, tqdm.wrapattr(f, "read", size, **bar) as counted:
            lines = gzip.GzipFile(fileobj=counted) if packed else f
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > MAX_LINE:
                    fault = f"longer than {MAX_LINE:,} bytes; write one row a line"
                    raise DatasetError(f"{where}: the line is {fault}")
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        fault = f"byte {e.start + 1} of the line is not UTF-8; save the file as UTF-8"
        raise DatasetError(f"{where}: {fault}") from e
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        fault = f"damaged or cut short ({e}); delete it and fetch it again"
        raise DatasetError(f"{path}: {fault}") from e
    except OSError as e:
        needed = "a dataset needs the files items.jsonl and interactions.csv"
        if path.suffix == ".gz":
            needed = "delete it and fetch it again"
        raise DatasetError(f"{path}: cannot be read ({e.strerror}); {needed}") from e


def json_rows(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    """("path:number", object) for every line of a JSON-lines file that is not blank."""
    for where, line in open_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            reason = getattr(e, "msg", "too deep, or a number too long")
            fault = f"not JSON ({reason}); write one object a line"
            raise DatasetError(f"{where}: {fault}") from e
        if not isinstance(row, dict) or row.get("parent_asin") in (None, ""):
            fault = "field parent_asin is missing; give every item an id"
            raise DatasetError(f"{where}: {fault}")
        yield where, row


def positive_number(value: object) -> float | None:
    """A positive number, also from text such as "$1,299.00"; None for null, a dash, "from 8.99" or a decimal comma."""
    try:
        text = str(value).replace("$", "")
        number = float(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def read_items(path: pathlib.Path) -> dict[str, Item]:
    """Items by id from a JSON-lines file; the category is the last of `categories`, else `main_category`."""
    items: dict[str, Item] = {}
    for where, row in json_rows(path):
        if fault := item_fault(row, items):
            raise DatasetError(f"{where}: {fault}")
        key, title = str(row["parent_asin"]), " ".join(str(row["title"]).split())
        category = one_line((row.get("categories") or [""])[-1])
        category = category or one_line(row.get("main_category") or "")
        store, count = one_line(row.get("store") or ""), row.get("rating_number")
        price = positive_number(row.get("price"))
        stars = positive_number(row.get("average_rating"))
        items[key] = Item(
            key, title, store or None, category or None, price, stars, count
        )
    if len(items) < N_CANDIDATES:
        few = f"{len(items)} items; add more, at least {N_CANDIDATES} are needed"
        raise DatasetError(f"{path}: {few}")
    return items


def item_fault(row: dict, items: dict[str, Item]) -> str | None:
    """What is wrong with a row, given the `items` read before it, and what to do; None if nothing is."""
    key, title = str(row["parent_asin"]), str(row.get("title") or "")
    if key in items:
        return f"parent_asin {key!r:.40} appears a second time; keep one line of it"
    if not one_line(title):
        return "field title is empty; give every item a title or drop its line"
    for name, (kind, wanted) in OPTIONAL.items():
        if value := row.get(name):
            parts = value if isinstance(value, list) else []
            if not (isinstance(value, kind) and all(isinstance(c, str) for c in parts)):
                return f"field {name} is {value!r:.40}; use {wanted} or null"
    return None


def read_interactions(
    path: pathlib.Path, index: dict[str, int] | None, start: int = 0, end: int = 10**13
) -> tuple[list[tuple], list[str]]:
    """Rows (user, item, rating, ms) from time `start` up to `end`, each once, and the places ("path:number") of repeats.

    The item is its place in `index`, or its id where there is none. DatasetError names the line and the field.
    """
    rows, again, wanted = {}, [], ",".join(HEADER)
    lines = open_lines(path)
    header = next(lines, ("", ""))[1].strip().replace('"', "")
    if header != wanted:
        raise DatasetError(f"{path}:1: header is {header!r:.80}; it must be {wanted}")
    for where, line in lines:
        try:
            fields = next(csv.reader([line], strict=True), [])
        except csv.Error as e:
            raise DatasetError(f"{where}: not CSV ({e}); write {wanted}") from e
        if not fields:
            continue
        if fault := interaction_fault(fields, index):
            raise DatasetError(f"{where}: {fault}")
        user, item, rating, time = fields
        row = user, index[item] if index else item, float(rating), int(time)
        if row in rows:
            again.append(where)
        elif start <= row[3] < end:
            rows[row] = None
    return list(rows), again


def interaction_fault(fields: list[str], index: dict[str, int] | None) -> str | None:
    """What is wrong with a CSV row, and what to do; None if nothing is."""
    if len(fields) != len(HEADER):
        return f"{len(fields)} fields; expected {','.join(HEADER)}"
    user, item, rating, time = fields
    if not user or not item:
        name = "parent_asin" if user else "user_id"
        return f"{name} is empty; fill it in or drop the row"
    if index and item not in index:
        return f"parent_asin {item!r:.40} is not in items.jsonl; add it or drop the row"
    try:
        stars = float(rating)
    except ValueError:
        return f"rating {rating!r:.40} is not a number; use 1 to 5"
    if not 0 <= stars <= 5:
        return f"rating {rating!r:.40} is outside 0 to 5; use 1 to 5"
    digits = time.isascii() and time.isdigit() and len(time) < 14
    if not digits or not 10**11 < int(time) < 10**13:
        return f"timestamp {time!r:.40} is not in milliseconds since 1970; write for example 1664582400000"
    return None


def untie(rows: list[tuple]) -> list[tuple]:
    """Rows (user, item, rating, ms) in order of time, a user's equal times moved 1 ms apart in file order."""
    latest: dict[int, int] = {}
    out = []
    for user, item, rating, time in sorted(rows, key=itemgetter(3)):
        latest[user] = max(time, latest.get(user, -1) + 1)
        out.append((user, item, rating, latest[user]))
    return sorted(out, key=itemgetter(3))


def note_repeats(rows: list[tuple]) -> list[str]:
    """A warning where users often buy the same item again: of all candidates only the positive can be in the history."""
    share = 1 - len({(user, item) for user, item, *_ in rows}) / len(rows)
    why = "as a positive it is in the history, where no negative can be"
    what = "keep first purchases only, or expect rankings that look too good"
    told = f"{share:.0%} of the interactions repeat an item of the same user"
    return [f"{told}: {why}; {what}"] if share > 0.05 else []


def read_folder(folder: pathlib.Path, name: str) -> Dataset:
    """Read `items.jsonl` (parent_asin, title and where known store, main_category, categories, price,
    average_rating, rating_number) and `interactions.csv` (user_id,parent_asin,rating,timestamp in ms)."""
    catalogue = read_items(folder / "items.jsonl")
    index = {key: i for i, key in enumerate(catalogue)}
    path = folder / "interactions.csv"
    rows, again = read_interactions(path, index)
    if not rows:
        fault = "no interactions; add at least one line below the header"
        raise DatasetError(f"{path}: {fault}")
    users: dict[str, int] = {}
    rows = untie([(users.setdefault(r[0], len(users)), *r[1:]) for r in rows])
    columns = [np.array(c) for c in zip(*rows)]
    skipped = f"{len(again)} duplicate rows skipped, this one first"
    notes = [f"{where}: {skipped}" for where in again[:1]]
    notes += note_repeats(rows)
    return Dataset(name, list(catalogue.values()), list(users), *columns, notes=notes)


def load_dataset(name: str, folder: str | None = None, seed: int = 0) -> Dataset:
    """The dataset called `name` with its splits made; `folder` (--data-dir) overrides data/<name>."""
    path = pathlib.Path(folder or HOME / name)
    if folder and name == "office-sim":
        fault = "is the bundled shop; give --data-dir's dataset another name"
        raise DatasetError(f"dataset office-sim {fault}")
    there = (path / "items.jsonl").exists() or name in KNOWN and os.path.lexists(path)
    if folder or (there and name != "office-sim"):
        ds = read_folder(path, name)
    elif name in ("office", "office-sim"):
        ds = simulate_office()
    elif name in KNOWN:
        advice = f"run `python data.py {name}` first"
        raise DatasetError(f"dataset {name}: {path} does not exist; {advice}")
    else:
        near = difflib.get_close_matches(name, KNOWN, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = f"known: {', '.join(KNOWN)}; others with --data-dir"
        raise DatasetError(f"unknown dataset {name!r} ({known}){hint}")
    make_splits(ds, seed)
    return ds


def history(ds: Dataset, sample: Sample, limit: int | None = N_HISTORY) -> np.ndarray:
    """Interaction indices the sample may show: strictly before its time, oldest first, the last `limit`."""
    rows = ds.before(sample.user, sample.time)
    return rows[-limit:] if limit else rows


# ------------------------------------------------------------------------------------------------ Amazon Reviews 2023

BASE_URL = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023"
RATINGS = "benchmark/5core/rating_only/{}.csv.gz"
METADATA = "raw/meta_categories/meta_{}.jsonl.gz"
AMAZON = {  # source category, then the paper's users, items and interactions
    "office": ("Office_Products", 27_130, 11_511, 47_333),
    "cds": ("CDs_and_Vinyl", 5_437, 8_785, 13_826),
    "instruments": ("Musical_Instruments", 7_593, 5_279, 15_746),
    "games": ("Video_Games", 6_251, 3_003, 11_457),
}
TITLE_WORDS = 20  # longer titles are dropped, like those of one character or "<span id"


def fetch(url: str, path: pathlib.Path) -> None:
    """Download `url` to `path`, continuing what an earlier attempt left in `path`.part.

    The size is checked before the file gets its name. DatasetError if that fails.
    """
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    advice = f"check the network and --base-url, or put the file into {path.parent}"
    again = "run the same command again and it goes on from there"
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        reply = urlopen(Request(url, headers=headers), timeout=60)
    except HTTPError as e:
        if e.code == 416 and e.headers.get("Content-Range") == f"bytes */{have}":
            part.rename(path)  # it was already whole
            return
        if e.code == 416:  # the file has no such part
            advice = f"delete {part} and run the same command again"
        raise DatasetError(f"{url}: HTTP {e.code} {e.reason}; {advice}") from e
    except (OSError, ValueError, HTTPException) as e:
        reason = getattr(e, "reason", e)
        raise DatasetError(f"{url}: no answer ({reason}); {advice}") from e
    have *= reply.status == 206  # any other answer starts at the first byte
    length = reply.headers.get("Content-Length")
    size = have + int(length) if length else None
    bar = tqdm(None, path.name, size, unit="B", unit_scale=True, initial=have)
    with reply, bar, open(part, "ab" if have else "wb") as f:
        try:
            while chunk := reply.read(1 << 20):
                have += f.write(chunk)
                bar.update(len(chunk))
        except (ConnectionError, TimeoutError, ssl.SSLError, HTTPException) as e:
            raise DatasetError(f"{url}: cut off ({e}); {again}") from e
    if size not in (None, have):
        raise DatasetError(f"{url}: got {have:,} of {size:,} bytes; {again}")
    part.rename(path)


def clean(text: object) -> str:
    """`one_line` of a text with its HTML entities resolved; "" for what is no text."""
    return one_line(html.unescape(text)) if isinstance(text, str) else ""


def usable_items(path: pathlib.Path, needed: set, unpriced: bool) -> tuple[dict, dict]:
    """Rows of items.jsonl for the `needed` ids that pass the filters, and how many did not, by reason; `unpriced` ones may pass."""
    items, missing, dropped = {}, set(needed), Counter()
    for _, row in json_rows(path):
        key = str(row["parent_asin"])
        if key not in missing:
            continue
        missing.remove(key)
        title, price = clean(row.get("title")), positive_number(row.get("price"))
        count, listed = positive_number(row.get("rating_number")), row.get("categories")
        listed = listed if isinstance(listed, list) else []
        if len(title) < 2 or len(title.split()) > TITLE_WORDS or "<span id" in title:
            dropped["items without a usable title"] += 1
        elif price is None and not unpriced:
            dropped["items without a numeric price"] += 1
        else:
            items[key] = {
                "parent_asin": key,
                "title": title,
                "store": clean(row.get("store")) or None,
                "main_category": clean(row.get("main_category")) or None,
                "categories": [c for c in map(clean, listed) if c],
                "price": price,
                "average_rating": positive_number(row.get("average_rating")),
                "rating_number": int(count) if count else None,
            }
    dropped["items without metadata"] = len(missing)
    return items, dropped


def write_folder(folder: pathlib.Path, items: dict, rows: list, about: dict) -> None:
    """Write and load the dataset beside `folder`, then rename: a half-written one never gets the name."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with open(part / "items.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in items.values())
        with open(part / "interactions.csv", "w", encoding="utf-8", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows([HEADER, *rows])
        (part / "dataset.json").write_text(json.dumps(about, indent=1) + "\n")
        load_dataset(folder.name, str(part))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def milliseconds(day: str) -> int:
    """Milliseconds from 1970 to the start of a day written YYYY-MM-DD, UTC."""
    try:
        return (datetime.date.fromisoformat(day) - datetime.date(1970, 1, 1)).days * DAY
    except ValueError as e:
        raise DatasetError(f"{day!r} is no date; write YYYY-MM-DD") from e


def prepare(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, dict]:
    """Fetch, filter and write one subset; returns what dataset.json says of sources, filters and the paper's counts."""
    start, end = milliseconds(args.min_date), milliseconds(args.max_date)
    if start >= end:
        raise DatasetError(f"--max-date {args.max_date} must be after {args.min_date}")
    period = f"{args.min_date} to {args.max_date}"
    category, raw = AMAZON[args.name][0], pathlib.Path(args.raw_dir)
    raw.mkdir(parents=True, exist_ok=True)
    remotes = RATINGS.format(category), METADATA.format(category)
    ratings, metadata = paths = [raw / remote.split("/")[-1] for remote in remotes]
    for remote, path in zip(remotes, paths):
        if not path.exists():
            fetch(f"{args.base_url.rstrip('/')}/{remote}", path)
    rows, again = read_interactions(ratings, None, start, end)
    items, dropped = usable_items(metadata, {r[1] for r in rows}, args.keep_unpriced)
    rows = sorted((r for r in rows if r[1] in items), key=itemgetter(3))
    if len(items) < N_CANDIDATES:
        few = f"{len(items)} items and {len(rows)} interactions of {period} pass the filters"
        raise DatasetError(f"{ratings}: {few}; widen --min-date and --max-date")
    found = len({r[0] for r in rows}), len(items), len(rows)
    counts = dict(zip(("users", "items", "interactions"), found))
    paper = dict(zip(counts, AMAZON[args.name][1:]))
    bytes_read = {p.name: p.stat().st_size for p in (ratings, metadata)}
    about = {
        "source": {"base_url": args.base_url, "bytes": bytes_read},
        "filters": {
            "time": f"{period}, the last day not included",
            "title": f"2 characters to {TITLE_WORDS} words, no '<span id'",
            "price": "any" if args.keep_unpriced else "a number",
        },
        "dropped": {"duplicate interactions": len(again), **dropped},
        "counts": counts,
        "paper": paper,
        "difference": {name: counts[name] - paper[name] for name in counts},
    }
    write_folder(folder, items, rows, about)
    return about


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prepare Amazon Reviews 2023.")
    add = parser.add_argument
    add("name", choices=list(AMAZON), help="one of the paper's four subsets")
    add("--data-dir", help="folder to write (default: data/NAME)")
    add("--raw-dir", default=HOME / "raw", help="downloads; used where already there")
    add("--base-url", default=BASE_URL, help="of the files, for a mirror")
    add("--min-date", default="2022-10-01", help="first day (default: the paper's)")
    add("--max-date", default="2023-10-01", help="day after the last (the paper's)")
    add("--keep-unpriced", action="store_true", help="keep items without a price")
    args = parser.parse_args(argv)
    folder = pathlib.Path(args.data_dir or HOME / args.name)
    if os.path.lexists(folder):
        raise DatasetError(f"{folder} exists; move it away to prepare it again")
    try:
        about = prepare(args, folder)
    except OSError as e:
        advice = "make room or choose another --raw-dir or --data-dir, then run the same command again"
        where = e.filename or args.raw_dir
        raise DatasetError(f"{where}: {e.strerror or e}; {advice}") from e
    for name, count in about["counts"].items():
        print(f"{name} {count:,} (paper {about['paper'][name]:,})")
    where = f" --data-dir {folder}" if args.data_dir else ""
    print(f"written: {folder}; now: python train.py --dataset {args.name}{where}")


if __name__ == "__main__":
    run_main(main, "stopped; the same command goes on from here")
