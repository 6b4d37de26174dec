"""What is ranked: a catalogue, time-stamped interactions, and samples of 20 candidates (paper: task definition, data).

A dataset is a folder with `items.jsonl` and `interactions.csv` in Amazon Reviews 2023's field names (see `read_folder`),
or the bundled world `office-sim`, a simulated office-supplies shop (see `simulate_office`). `office` means the folder
data/office where it exists and the bundled world otherwise.

Deviations: 1. a user's interactions of the same time (day-granular data) are ordered as in the file, 1 ms apart;
2. tools and SASRec are fitted on the first 3/4 of the train split and the agent learns on the last quarter, so that
nothing fitted has seen the future of a sample that the agent learns from.
"""

import bisect
import csv
import difflib
import hashlib
import json
import math
import pathlib
from dataclasses import dataclass, field

import numpy as np

N_CANDIDATES = 20
N_HISTORY = 10
KNOWN = ("office", "office-sim", "cds", "instruments", "games")


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
    three quarters ("fit") only fit SASRec and the tools' statistics, the last quarter trains the agent.
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
    cuts = {"fit": (0, int(0.6 * n)), "train": (int(0.6 * n), int(0.8 * n))}
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
    weights = np.full((n_users, 6), 0.10)  # [users, evidence]
    drivers = np.argsort(-(rng.gumbel(size=(n_users, 6)) + np.log(FREQUENCY)), axis=1)
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


def read_items(path: pathlib.Path) -> dict[str, Item]:
    """Items by id from a JSON-lines file; the category is the last of `categories`, else `main_category`."""
    items: dict[str, Item] = {}
    for number, line in enumerate(open_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise DatasetError(
                f"{path}:{number}: not JSON ({e.msg}); write one object a line"
            ) from e
        if not isinstance(row, dict) or not row.get("parent_asin"):
            raise DatasetError(
                f"{path}:{number}: field parent_asin is missing; give every item an id"
            )
        title = str(row.get("title") or "").strip()
        if not title:
            raise DatasetError(
                f"{path}:{number}: field title is empty; give every item a title or drop its line"
            )
        price = row.get("price")
        price = (
            float(price)
            if isinstance(price, (int, float)) and price > 0 and math.isfinite(price)
            else None
        )
        category = (row.get("categories") or [None])[-1] or row.get("main_category")
        rated, count = row.get("average_rating"), row.get("rating_number")
        key = str(row["parent_asin"])
        items[key] = Item(
            key,
            " ".join(title.split()),
            row.get("store") or None,
            category,
            price,
            rated,
            count,
        )
    if len(items) < N_CANDIDATES:
        raise DatasetError(
            f"{path}: {len(items)} items; at least {N_CANDIDATES} are needed"
        )
    return items


def open_lines(path: pathlib.Path):
    """Lines of a UTF-8 file; a missing file or bad bytes become a DatasetError that names it."""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            yield from f
    except UnicodeDecodeError as e:
        raise DatasetError(
            f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8"
        ) from e
    except OSError as e:
        raise DatasetError(
            f"{path}: cannot be read ({e.strerror}); a dataset needs items.jsonl and interactions.csv"
        ) from e


def read_folder(folder: pathlib.Path, name: str) -> Dataset:
    """Read `items.jsonl` (parent_asin, title and where known store, main_category, categories, price,
    average_rating, rating_number) and `interactions.csv` (user_id,parent_asin,rating,timestamp in ms)."""
    catalogue = read_items(folder / "items.jsonl")
    index = {key: i for i, key in enumerate(catalogue)}
    path = folder / "interactions.csv"
    reader = csv.reader(open_lines(path))
    header = next(reader, [])
    if header != ["user_id", "parent_asin", "rating", "timestamp"]:
        raise DatasetError(
            f"{path}:1: header is {','.join(header)!r}; it must be user_id,parent_asin,rating,timestamp"
        )
    users: dict[str, int] = {}
    rows, seen, duplicates = [], set(), 0
    for number, row in enumerate(reader, 2):
        parsed = parse_interaction(path, number, row, index)
        if parsed in seen:
            duplicates += 1
            continue
        seen.add(parsed)
        rows.append((users.setdefault(parsed[0], len(users)), *parsed[1:]))
    if not rows:
        raise DatasetError(
            f"{path}: no interactions; add at least one line below the header"
        )
    rows = untie(rows)
    columns = [np.array(c) for c in zip(*rows)]
    notes = [f"{duplicates} duplicate rows skipped"] if duplicates else []
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
    path: pathlib.Path, number: int, row: list[str], index: dict[str, int]
) -> tuple:
    """(user, item index, rating, time) of one CSV row; DatasetError names the line and the field."""
    if len(row) != 4:
        raise DatasetError(
            f"{path}:{number}: {len(row)} fields; expected user_id,parent_asin,rating,timestamp"
        )
    if row[1] not in index:
        raise DatasetError(
            f"{path}:{number}: parent_asin {row[1]!r} is not in items.jsonl; add it or drop the row"
        )
    try:
        rating = float(row[2])
    except ValueError as e:
        raise DatasetError(
            f"{path}:{number}: rating {row[2]!r} is not a number; use 1 to 5"
        ) from e
    if not 0 <= rating <= 5:
        raise DatasetError(f"{path}:{number}: rating {row[2]} is outside 0 to 5")
    if not row[3].isdigit() or not 10**11 < int(row[3]) < 10**13:
        raise DatasetError(
            f"{path}:{number}: timestamp {row[3]!r} is not in milliseconds since 1970"
        )
    return row[0], index[row[1]], rating, int(row[3])


def load_dataset(name: str, folder: str | None = None, seed: int = 0) -> Dataset:
    """The dataset called `name` with its splits made; `folder` (--data-dir) overrides data/<name>."""
    path = (
        pathlib.Path(folder)
        if folder
        else pathlib.Path(__file__).parent / "data" / name
    )
    if folder or (path / "items.jsonl").exists():
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


def item_by_title(ds: Dataset, title: str) -> int | None:
    """Catalogue index of the item with this title (exact, then ignoring case, then as a unique prefix)."""
    if not hasattr(ds, "_titles"):
        ds._titles = {}
        for i, item in enumerate(ds.items):
            ds._titles.setdefault(item.title.casefold(), i)
        ds._sorted_titles = sorted(ds._titles)
    key = " ".join(title.split()).casefold()
    if key in ds._titles or not key:
        return ds._titles.get(key)
    at = bisect.bisect_left(ds._sorted_titles, key)
    near = [t for t in ds._sorted_titles[at : at + 2] if t.startswith(key)]
    return ds._titles[near[0]] if len(near) == 1 else None
