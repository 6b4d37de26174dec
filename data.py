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
import shutil
import ssl
import sys
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException

import numpy as np
from tqdm import tqdm

N_CANDIDATES = 20
N_HISTORY = 10
KNOWN = ("office", "office-sim", "cds", "instruments", "games")
HEADER = ["user_id", "parent_asin", "rating", "timestamp"]  # of interactions.csv
OPTIONAL = {  # fields of an item that may be missing; a price of any form may
    "store": (str, "text"),
    "main_category": (str, "text"),
    "categories": (list, "a list of text"),
    "average_rating": ((int, float), "a number"),
    "rating_number": ((int, float), "a number"),
}
MAX_LINE = 1 << 22  # bytes; a longer line is no product and no interaction


class DatasetError(ValueError):
    """A dataset that cannot be used: one line with file, line, field and what to do."""


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
    utility: np.ndarray | None = (
        None  # [N, items] the simulator's true utilities at each choice (oracle only)
    )
    notes: list[str] = field(default_factory=list)  # what was skipped while reading
    splits: dict[str, list[Sample]] = field(default_factory=dict)

    def __post_init__(self):
        self.by_user: list[np.ndarray] = [np.empty(0, int)] * len(self.users)
        order = np.argsort(self.user, kind="stable")
        starts = np.searchsorted(self.user[order], np.arange(len(self.users) + 1))
        self.by_user = np.split(order, starts[1:-1])

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
        kind = (
            "SIMULATED office-supplies shop (bundled, not real people)"
            if self.simulated
            else "real interactions"
        )
        counts = ", ".join(
            f"{name} {len(samples):,}" for name, samples in self.splits.items()
        )
        return (
            f"dataset {self.name}: {kind}; {len(self.users):,} users, {len(self.items):,} items, "
            f"{len(self.item):,} interactions; samples: {counts}"
        )

    def fingerprint(self) -> str:
        """Hash of everything that samples are made of."""
        h = hashlib.sha256()
        for array in (self.user, self.item, self.rating, self.time):
            h.update(np.ascontiguousarray(array).tobytes())
        h.update(json.dumps([i.__dict__ for i in self.items]).encode())
        return h.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ samples and the split


def draw_candidates(
    ds: Dataset, row: int, rng: np.random.Generator
) -> tuple[tuple[int, ...], int]:
    """The positive of interaction `row` and 19 random items its user never interacted with, shuffled."""
    taken = set(ds.item[ds.by_user[ds.user[row]]].tolist())
    negatives: list[int] = []
    while len(negatives) < N_CANDIDATES - 1:
        i = int(rng.integers(len(ds.items)))
        if i not in taken:
            taken.add(i)
            negatives.append(i)
    target = int(rng.integers(N_CANDIDATES))
    negatives.insert(target, int(ds.item[row]))
    return tuple(negatives), target


def make_splits(ds: Dataset, seed: int = 0, min_history: int = 1) -> None:
    """Cut the samples 80/10/10 by time into fit + train, valid and test; each sample's draw has its own seed.

    Every interaction with at least `min_history` earlier ones is a sample. The 80% are cut once more: their first
    seven eighths ("fit") only fit SASRec and the tools' statistics, the last eighth trains the agent.
    """
    rows = [
        r
        for r in range(len(ds.item))
        if len(ds.before(ds.user[r], ds.time[r])) >= min_history
    ]
    if len(rows) < 40:
        raise DatasetError(
            f"{ds.name}: only {len(rows)} samples have a history; add interactions (40 are needed)"
        )
    largest = max(len(set(ds.item[r].tolist())) for r in ds.by_user)
    if len(ds.items) < largest + N_CANDIDATES - 1:
        raise DatasetError(
            f"{ds.name}: {len(ds.items)} items are too few: {N_CANDIDATES - 1} negatives beside a user's "
            f"{largest} items need {largest + N_CANDIDATES - 1}"
        )
    n = len(rows)
    cuts = {"fit": (0, int(0.7 * n)), "train": (int(0.7 * n), int(0.8 * n))}
    cuts |= {"valid": (int(0.8 * n), int(0.9 * n)), "test": (int(0.9 * n), n)}
    for name, (a, b) in cuts.items():
        ds.splits[name] = []
        for row in rows[a:b]:
            candidates, target = draw_candidates(
                ds, row, np.random.default_rng([seed, row])
            )
            ds.splits[name].append(
                Sample(row, int(ds.user[row]), int(ds.time[row]), candidates, target)
            )


# ------------------------------------------------------------------------------------------------- the bundled office

SHOP = {  # project -> category -> products; a project is what a buyer is busy with for a while
    "desk": {
        "Staplers": "Stapler Staples Remover",
        "Pens": "Ballpoint Gelpen Fineliner",
        "Clips": "Binder Clip Pin",
    },
    "mail": {
        "Envelopes": "Envelope Mailer Pouch",
        "Labels": "Label Stamp Sticker",
        "Tape": "Tape Dispenser Glue",
    },
    "archive": {
        "Folders": "Folder Sleeve Divider",
        "Boxes": "Box Crate Drawer",
        "Shelves": "Shelf Rack Tray",
    },
    "print": {
        "Paper": "Paper Cardstock Roll",
        "Ink": "Ink Toner Ribbon",
        "Printers": "Printer Scanner Laminator",
    },
    "study": {
        "Notebooks": "Notebook Journal Pad",
        "Planners": "Planner Calendar Diary",
        "Boards": "Board Easel Chart",
    },
    "art": {
        "Markers": "Marker Crayon Chalk",
        "Scissors": "Scissors Cutter Knife",
        "Paint": "Paint Brush Canvas",
    },
}
BRANDS = "Norvik Kallo Bexley Tamaro Ostia Quill Merino Zephyr Halden Ivory Jasper Lumen Pavo Rivet Sable Umber"
ADJECTIVES = "Fine Bold Mini Grand Classic Matte Clear Blue Red Green Grey Slim Heavy Eco Pro Soft Quick Duo Prime Basic"
EVIDENCE = (
    "brand",
    "project",
    "price",
    "complement",
    "taste",
    "rating",
)  # what can drive a simulated user
STRENGTH = np.array(
    [6.0, 4.6, 4.0, 7.0, 5.0, 4.5]
)  # utility of a full match, chosen so that each explains alike
FREQUENCY = np.array(
    [0.24, 0.14, 0.05, 0.26, 0.23, 0.08]
)  # how often each is the main driver
DAY = 86_400_000


def make_catalogue(
    rng: np.random.Generator, n_items: int = 480
) -> tuple[list[Item], dict[str, np.ndarray]]:
    """Items of the simulated shop and their hidden properties, arrays with one entry an item."""
    kinds = [
        (p, c, noun)
        for p, cats in SHOP.items()
        for c, nouns in cats.items()
        for noun in nouns.split()
    ]
    brands, adjectives = BRANDS.split(), ADJECTIVES.split()
    items, titles = [], set()
    prop = {
        k: np.zeros(n_items, int)
        for k in ("brand", "project", "category", "band", "style")
    }
    categories = [c for cats in SHOP.values() for c in cats]
    base = rng.uniform(0, 1.0, len(kinds))
    for i in range(n_items):
        k = i % len(kinds)
        project, category, noun = kinds[k]
        while True:
            b, a = int(rng.integers(len(brands))), int(rng.integers(len(adjectives)))
            title = f"{brands[b]} {adjectives[a]} {noun}"
            if title not in titles:
                break
        titles.add(title)
        band = int(rng.integers(4))
        price = round(
            float(np.exp(1.2 + 0.9 * band + 0.3 * base[k] + 0.25 * rng.normal())), 2
        )
        items.append(
            Item(
                f"SIM{i:04d}",
                title,
                brands[b],
                category,
                price,
                round(float(rng.uniform(3.4, 4.9)), 1),
                0,
            )
        )
        prop["brand"][i], prop["band"][i], prop["style"][i] = (
            b,
            band,
            int(rng.integers(8)),
        )
        prop["project"][i], prop["category"][i] = (
            list(SHOP).index(project),
            categories.index(category),
        )
    prop["complement"] = np.stack(
        [rng.permutation(n_items)[:3] for _ in range(n_items)]
    )  # [items, 3]
    prop["appeal"] = 0.2 * rng.normal(size=n_items)
    number = np.exp(4 + prop["appeal"] * 4 + 0.3 * rng.normal(size=n_items)).astype(int)
    items = [
        Item(**{**i.__dict__, "rating_number": int(n)}) for i, n in zip(items, number)
    ]
    return items, prop


def simulate_office(n_users: int = 3000, seed: int = 7) -> Dataset:
    """A shop whose users differ in which evidence predicts them; generated in under 2 s.

    Each user has one main and one lesser driver among EVIDENCE, hidden tastes (favourite brand, price band, style,
    loved and hated categories) and a project that changes now and then. An item's utility is the weighted sum of
    the six matches plus its general appeal; the next purchase is drawn from the softmax over items not yet owned.
    """
    rng = np.random.default_rng(seed)
    items, prop = make_catalogue(rng)
    n_items, n_cat = len(items), int(prop["category"].max()) + 1
    everyone = np.arange(n_users)
    weights = np.full((n_users, len(EVIDENCE)), 0.10)  # [users, evidence]
    drivers = np.argsort(
        -(rng.gumbel(size=(n_users, len(EVIDENCE))) + np.log(FREQUENCY)), axis=1
    )
    weights[everyone, drivers[:, 0]], weights[everyone, drivers[:, 1]] = 1.0, 0.7
    weights[everyone, drivers[:, 2]] = 0.35
    brand, band = (
        rng.integers(len(BRANDS.split()), size=n_users),
        rng.integers(4, size=n_users),
    )
    style, project = (
        rng.integers(8, size=n_users),
        rng.integers(len(SHOP), size=n_users),
    )
    love = np.zeros((n_users, n_cat))
    order = np.argsort(rng.random((n_users, n_cat)), axis=1)
    np.put_along_axis(love, order[:, :3], 1.0, axis=1)
    np.put_along_axis(love, order[:, 3:9], -1.0, axis=1)
    length = rng.integers(7, 15, size=n_users)
    start = rng.uniform(0, 0.25, size=n_users)
    owned = np.zeros((n_users, n_items), bool)
    last = np.full(n_users, -1)
    static = weights[:, 0, None] * STRENGTH[0] * (prop["brand"][None] == brand[:, None])
    static += (
        weights[:, 2, None]
        * STRENGTH[2]
        * (1 - 0.8 * np.abs(prop["band"][None] - band[:, None]).clip(0, 2))
    )
    static += (
        weights[:, 4, None] * STRENGTH[4] * (prop["style"][None] == style[:, None])
    )
    static += (
        weights[:, 5, None] * STRENGTH[5] * love[:, prop["category"]]
        + prop["appeal"][None]
    )
    rows: list[tuple[np.ndarray, ...]] = []
    for step in range(length.max()):
        project = np.where(
            rng.random(n_users) < 0.15, rng.integers(len(SHOP), size=n_users), project
        )
        utility = static + weights[:, 1, None] * STRENGTH[1] * (
            prop["project"][None] == project[:, None]
        )
        if step:
            match = np.zeros((n_users, n_items))
            np.put_along_axis(match, prop["complement"][last], 1.0, axis=1)
            utility += weights[:, 3, None] * STRENGTH[3] * match
        noisy = np.where(owned, -np.inf, utility + rng.gumbel(size=utility.shape))
        last = noisy.argmax(1)
        owned[everyone, last] = True
        liked = (
            3.6
            + 1.2 * love[everyone, prop["category"][last]]
            + 0.7 * rng.normal(size=n_users)
        )
        when = (
            (start + (1 - start) * (step + rng.uniform(0.1, 0.9, n_users)) / length)
            * 365
            * DAY
        )
        keep = step < length
        rows.append(
            (
                everyone[keep],
                last[keep],
                liked[keep].round().clip(1, 5),
                when[keep],
                utility[keep],
            )
        )
    user, item, rating, when, utility = (np.concatenate(x) for x in zip(*rows))
    time = (1_664_582_400_000 + when).astype(np.int64)  # from 2022-10-01 on
    o = np.argsort(time, kind="stable")
    names = [f"U{u:04d}" for u in range(n_users)]
    utility = utility.astype(np.float32)[o]
    return Dataset(
        "office-sim",
        items,
        names,
        user[o],
        item[o],
        rating[o],
        time[o],
        simulated=True,
        utility=utility,
    )


# --------------------------------------------------------------------------------------------------- reading a folder


def open_lines(path: pathlib.Path) -> Iterator[str]:
    """Lines of a UTF-8 file, unpacked behind a progress bar where its name ends in .gz.

    DatasetError names the file, and the line where there is one, if it cannot be read.
    """
    number, packed = 0, path.suffix == ".gz"
    needs = "a dataset needs the files items.jsonl and interactions.csv"
    try:
        size = os.stat(path).st_size
        with (
            open(path, "rb") as f,
            tqdm.wrapattr(
                f, "read", size, desc=f"reading {path.name}", disable=not packed
            ) as counted,
        ):
            lines = gzip.GzipFile(fileobj=counted) if packed else f
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise DatasetError(
                        f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes; "
                        "write one row a line"
                    )
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise DatasetError(
            f"{path}:{number}: byte {e.start + 1} of the line is not UTF-8; "
            "save the file as UTF-8"
        ) from e
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DatasetError(
            f"{path}: damaged or cut short ({e}); delete it and fetch it again"
        ) from e
    except OSError as e:
        raise DatasetError(f"{path}: cannot be read ({e.strerror}); {needs}") from e


def json_rows(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line of a JSON-lines file that is not blank."""
    for number, line in enumerate(open_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            reason = getattr(e, "msg", "too deep, or a number too long")
            raise DatasetError(
                f"{path}:{number}: not JSON ({reason}); write one object a line"
            ) from e
        if not isinstance(row, dict) or not row.get("parent_asin"):
            raise DatasetError(
                f"{path}:{number}: field parent_asin is missing; give every item an id"
            )
        yield number, row


def csv_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) below the header of a CSV file of interactions; blank lines are skipped."""
    header = ""
    for number, line in enumerate(open_lines(path), 1):
        try:
            row = next(csv.reader([line], strict=True), [])
        except csv.Error as e:
            raise DatasetError(
                f"{path}:{number}: not CSV ({e}); write {','.join(HEADER)}"
            ) from e
        if number == 1:
            header = ",".join(row)
            if row != HEADER:
                break
        elif row:
            yield number, row
    if header != ",".join(HEADER):
        raise DatasetError(
            f"{path}:1: header is {header!r:.80}; it must be {','.join(HEADER)}"
        )


def positive_number(value: object) -> float | None:
    """A positive number, also from text such as "$1,299.00"; None for null, a dash or "from 8.99"."""
    try:
        number = float(str(value).replace("$", "").replace(",", ""))
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def read_items(path: pathlib.Path) -> dict[str, Item]:
    """Items by id from a JSON-lines file; the category is the last of `categories`, else `main_category`."""
    items: dict[str, Item] = {}
    for number, row in json_rows(path):
        key, title = str(row["parent_asin"]), str(row.get("title") or "")
        if not any(c.isprintable() and not c.isspace() for c in title):
            raise DatasetError(
                f"{path}:{number}: field title is empty; give every item a title or drop its line"
            )
        if key in items:
            raise DatasetError(
                f"{path}:{number}: parent_asin {key!r:.40} appears a second time; keep one line of it"
            )
        check_fields(path, number, row)
        items[key] = Item(
            key,
            " ".join(title.split()),
            row.get("store") or None,
            (row.get("categories") or [None])[-1] or row.get("main_category"),
            positive_number(row.get("price")),
            positive_number(row.get("average_rating")),
            row.get("rating_number"),
        )
    if len(items) < N_CANDIDATES:
        raise DatasetError(
            f"{path}: {len(items)} items; add more, at least {N_CANDIDATES} are needed"
        )
    return items


def check_fields(path: pathlib.Path, number: int, row: dict) -> None:
    """DatasetError where an optional field of an item is there but of the wrong type."""
    for name, (kind, wanted) in OPTIONAL.items():
        value = row.get(name)
        good = isinstance(value, kind)
        if kind is list and good:
            good = all(isinstance(c, str) for c in value)
        if value and not good:
            raise DatasetError(
                f"{path}:{number}: field {name} is {value!r:.40}; use {wanted} or null"
            )


def read_folder(folder: pathlib.Path, name: str) -> Dataset:
    """Read `items.jsonl` (parent_asin, title and where known store, main_category, categories, price,
    average_rating, rating_number) and `interactions.csv` (user_id,parent_asin,rating,timestamp in ms)."""
    catalogue = read_items(folder / "items.jsonl")
    index = {key: i for i, key in enumerate(catalogue)}
    path = folder / "interactions.csv"
    users: dict[str, int] = {}
    rows, seen, duplicates = [], set(), []
    for number, row in csv_rows(path):
        parsed = parse_interaction(path, number, row, index)
        if parsed in seen:
            duplicates.append(number)
            continue
        seen.add(parsed)
        rows.append((users.setdefault(parsed[0], len(users)), *parsed[1:]))
    if not rows:
        raise DatasetError(
            f"{path}: no interactions; add at least one line below the header"
        )
    rows = untie(rows)
    columns = [np.array(c) for c in zip(*rows)]
    notes = []
    if duplicates:
        notes.append(
            f"{path}:{duplicates[0]}: {len(duplicates)} duplicate rows skipped, this one first"
        )
    return Dataset(name, list(catalogue.values()), list(users), *columns, notes=notes)


def untie(rows: list[tuple]) -> list[tuple]:
    """Rows (user, item, rating, ms) in order of time, a user's equal times moved 1 ms apart in file order."""
    latest: dict[int, int] = {}
    out = []
    for user, item, rating, time in sorted(rows, key=lambda r: r[3]):
        latest[user] = max(time, latest.get(user, -1) + 1)
        out.append((user, item, rating, latest[user]))
    return sorted(out, key=lambda r: r[3])


def parse_interaction(
    path: pathlib.Path, number: int, row: list[str], index: dict[str, int] | None
) -> tuple:
    """(user, item index, rating, time) of one CSV row, or its item's id where there is no index yet.

    DatasetError names the line and the field.
    """
    where = f"{path}:{number}"
    if len(row) != len(HEADER):
        raise DatasetError(f"{where}: {len(row)} fields; expected {','.join(HEADER)}")
    user, item, rating, time = row
    if not user or not item:
        name = "parent_asin" if user else "user_id"
        raise DatasetError(f"{where}: {name} is empty; fill it in or drop the row")
    if index is not None and item not in index:
        raise DatasetError(
            f"{where}: parent_asin {item!r:.40} is not in items.jsonl; add it or drop the row"
        )
    try:
        stars = float(rating)
    except ValueError as e:
        raise DatasetError(
            f"{where}: rating {rating!r:.40} is not a number; use 1 to 5"
        ) from e
    if not 0 <= stars <= 5:
        raise DatasetError(
            f"{where}: rating {rating!r:.40} is outside 0 to 5; use 1 to 5"
        )
    digits = time.isascii() and time.isdigit() and len(time) < 14
    if not digits or not 10**11 < int(time) < 10**13:
        raise DatasetError(
            f"{where}: timestamp {time!r:.40} is not in milliseconds since 1970; "
            "write for example 1664582400000"
        )
    return user, item if index is None else index[item], stars, int(time)


def load_dataset(name: str, folder: str | None = None, seed: int = 0) -> Dataset:
    """The dataset called `name` with its splits made; `folder` (--data-dir) overrides data/<name>."""
    path = (
        pathlib.Path(folder)
        if folder
        else pathlib.Path(__file__).parent / "data" / name
    )
    there = (path / "items.jsonl").exists() or name in KNOWN and os.path.lexists(path)
    if folder or (there and name != "office-sim"):
        ds = read_folder(path, name)
    elif name in ("office", "office-sim"):
        ds = simulate_office()
    elif name in KNOWN:
        raise DatasetError(
            f"dataset {name}: {path} does not exist; run `python data.py {name}` first"
        )
    else:
        near = difflib.get_close_matches(name, KNOWN, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DatasetError(
            f"unknown dataset {name!r} (known: {', '.join(KNOWN)}; others with --data-dir){hint}"
        )
    make_splits(ds, seed)
    return ds


def history(ds: Dataset, sample: Sample, limit: int | None = N_HISTORY) -> np.ndarray:
    """Interaction indices the sample may show: strictly before its time, oldest first, the last `limit`."""
    rows = ds.before(sample.user, sample.time)
    return rows[-limit:] if limit else rows


# ------------------------------------------------------------------------------------------------ Amazon Reviews 2023

BASE_URL = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023"
AMAZON = {  # source category, then the paper's users, items and interactions
    "office": ("Office_Products", 27_130, 11_511, 47_333),
    "cds": ("CDs_and_Vinyl", 5_437, 8_785, 13_826),
    "instruments": ("Musical_Instruments", 7_593, 5_279, 15_746),
    "games": ("Video_Games", 6_251, 3_003, 11_457),
}
TITLE_WORDS = 20  # longer titles are dropped, like those of one character or "<span id"


def fetch(url: str, path: pathlib.Path) -> None:
    """Download `url` to `path`, continuing what an earlier attempt left in `path`.part.

    The size is checked before the file gets its name. DatasetError if it cannot be had.
    """
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    advice = f"check the network and --base-url, or put the file into {path.parent}"
    again = "run the same command again and it goes on from there"
    try:
        request = urllib.request.Request(url)
        if have:
            request.add_header("Range", f"bytes={have}-")
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
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


def window_ratings(path: pathlib.Path, start: int, end: int) -> tuple[list[tuple], int]:
    """Different rows (user, item, rating, ms) from `start` up to `end`, by time; and how many were duplicates."""
    rows, duplicates = {}, 0
    for number, row in csv_rows(path):
        parsed = parse_interaction(path, number, row, None)
        if start <= parsed[3] < end:
            duplicates += parsed in rows
            rows[parsed] = None
    return sorted(rows, key=lambda r: r[3]), duplicates


def clean(text: object) -> str:
    """Text with HTML entities resolved, on one line, without characters that cannot be shown; "" for no text."""
    text = html.unescape(text) if isinstance(text, str) else ""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def usable_items(
    path: pathlib.Path, needed: set[str], keep_unpriced: bool
) -> tuple[dict[str, dict], Counter]:
    """Rows of items.jsonl for those of the `needed` ids that pass, and how many do not by reason."""
    items, found, dropped = {}, set(), Counter()
    for _, row in json_rows(path):
        key = str(row["parent_asin"])
        if key not in needed or key in found:
            continue
        found.add(key)
        title, price = clean(row.get("title")), positive_number(row.get("price"))
        count, listed = positive_number(row.get("rating_number")), row.get("categories")
        listed = listed if isinstance(listed, list) else []
        if len(title) < 2 or len(title.split()) > TITLE_WORDS or "<span id" in title:
            dropped["items without a usable title"] += 1
        elif price is None and not keep_unpriced:
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
    dropped["items without metadata"] = len(needed - found)
    return items, dropped


def write_folder(
    folder: pathlib.Path, items: dict[str, dict], rows: list[tuple], about: dict
) -> None:
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
    """Fetch, filter and write one subset; returns dataset.json: from what, how, and how it compares to the paper."""
    category, *published = AMAZON[args.name]
    start, end = milliseconds(args.min_date), milliseconds(args.max_date)
    if start >= end:
        raise DatasetError(f"--max-date {args.max_date} must be after {args.min_date}")
    raw, period = pathlib.Path(args.raw_dir), f"{args.min_date} to {args.max_date}"
    ratings, metadata = raw / f"{category}.csv.gz", raw / f"meta_{category}.jsonl.gz"
    raw.mkdir(parents=True, exist_ok=True)
    for path, remote in (
        (ratings, "benchmark/5core/rating_only"),
        (metadata, "raw/meta_categories"),
    ):
        if not path.exists():
            fetch(f"{args.base_url.rstrip('/')}/{remote}/{path.name}", path)
    rows, duplicates = window_ratings(ratings, start, end)
    items, dropped = usable_items(metadata, {r[1] for r in rows}, args.keep_unpriced)
    rows = [r for r in rows if r[1] in items]
    if len(items) < N_CANDIDATES:
        raise DatasetError(
            f"{ratings}: {len(items)} items and {len(rows)} interactions of {period} "
            "pass the filters; widen --min-date and --max-date"
        )
    found = len({r[0] for r in rows}), len(items), len(rows)
    names = "users", "items", "interactions"
    bytes_read = {p.name: p.stat().st_size for p in (ratings, metadata)}
    about = {
        "source": {"base_url": args.base_url, "bytes": bytes_read},
        "filters": {
            "time": f"{period}, the last day not included",
            "title": f"2 characters to {TITLE_WORDS} words, no '<span id'",
            "price": "any" if args.keep_unpriced else "a number",
        },
        "dropped": {"duplicate interactions": duplicates, **dropped},
        "counts": dict(zip(names, found)),
        "paper": dict(zip(names, published)),
        "difference": {n: f - p for n, f, p in zip(names, found, published)},
    }
    write_folder(folder, items, rows, about)
    return about


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prepare Amazon Reviews 2023.")
    add, here = parser.add_argument, pathlib.Path(__file__).parent / "data"
    add("name", choices=list(AMAZON), help="one of the paper's four subsets")
    add("--data-dir", help="folder to write (default: data/NAME)")
    add("--raw-dir", default=here / "raw", help="downloads; used where already there")
    add("--base-url", default=BASE_URL, help="of the files, for a mirror")
    add("--min-date", default="2022-10-01", help="first day (default: the paper's)")
    add("--max-date", default="2023-10-01", help="day after the last (the paper's)")
    add("--keep-unpriced", action="store_true", help="keep items without a price")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    here = pathlib.Path(__file__).parent / "data"
    folder = pathlib.Path(args.data_dir or here / args.name)
    if os.path.lexists(folder):
        raise DatasetError(f"{folder} exists; move it away to prepare it again")
    try:
        about = prepare(args, folder)
    except OSError as e:
        raise DatasetError(
            f"{e.filename or args.raw_dir}: {e.strerror or e}; make room or choose "
            "another --raw-dir or --data-dir, then run the same command again"
        ) from e
    for name, count in about["counts"].items():
        print(f"{name} {count:,} (paper {about['paper'][name]:,})")
    where = f" --data-dir {folder}" if args.data_dir else ""
    print(f"written: {folder}; now: python train.py --dataset {args.name}{where}")


if __name__ == "__main__":
    try:
        main()
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
