"""The data: nothing leaks from a sample's time or later, samples are fixed, bad files are refused in one line, the
bundled world and real data keep their promises, and Amazon Reviews 2023 is prepared from a local server.

    python -m pytest tests/test_data.py
"""

import csv
import errno
import gzip
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import sasrec
from data import (
    DAY,
    Dataset,
    DatasetError,
    Samples,
    history,
    load_dataset,
    main,
    make_splits,
    milliseconds,
    positive_number,
    read_folder,
    simulate_office,
)
from rollout import ALL_TOOLS, Task, user_prompt
from sasrec import SASRec, train_sasrec
from tools import (
    TOOLS,
    Call,
    Context,
    Observation,
    Tool,
    ToolError,
    best,
    candidates_analyze,
    log_rank,
    run_call,
)

REPOSITORY = pathlib.Path(data.__file__).parent
REAL = REPOSITORY.parent / "shared" / "data" / "office2018"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")


@pytest.fixture(scope="module")
def office():
    ds = simulate_office()
    make_splits(ds)
    return ds


def every_sample(ds):
    return [s for split in ds.splits.values() for s in split]


def copy(ds, user, item, rating, when):
    """A dataset with other interactions but the samples of `ds`."""
    other = Dataset(ds.name, ds.items, ds.users, user, item, rating, when)
    other.splits = ds.splits
    return other


def removed(ds, end):
    """`ds` without the interactions at or after time `end`."""
    n = np.searchsorted(ds.time, end)
    return copy(ds, ds.user[:n], ds.item[:n], ds.rating[:n], ds.time[:n])


def replaced(ds, end, seed=0):
    """`ds` with other users, items, ratings and times in all interactions at or after time `end`."""
    n, rng = np.searchsorted(ds.time, end), np.random.default_rng(seed)
    m = len(ds.time) - n
    later = np.sort(end + rng.integers(0, 30 * DAY, m))
    later[: m // 10] = end  # some at the very time of the sample
    return copy(
        ds,
        np.append(ds.user[:n], rng.integers(len(ds.users), size=m)),
        np.append(ds.item[:n], rng.integers(len(ds.items), size=m)),
        np.append(ds.rating[:n], rng.integers(1, 6, size=m)),
        np.append(ds.time[:n], later),
    )


# ------------------------------------------------------------------------------------------------------------ no leak


def answer(ctx, sample, name, **arguments):
    """All that a call shows, or the error that the agent reads."""
    try:
        seen = run_call(ctx, sample, Call(name, arguments))
    except ToolError as e:
        return str(e)
    scores = None if seen.scores is None else np.asarray(seen.scores).tolist()
    return seen.render(), scores


def shown(ctx, sample):
    """Everything that the agent can get to see about a sample, by where it sees it."""
    out = {"prompt": user_prompt(ctx, Task(sample), ALL_TOOLS)}
    out["pair"] = user_prompt(ctx, Task(sample, (3, 5), False), ALL_TOOLS)
    items = [*ctx.ds.item[history(ctx.ds, sample)], *sample.candidates]
    titles = [ctx.ds.items[i].title for i in items]
    for name, tool in TOOLS.items():
        if tool.argument:
            out[name] = [answer(ctx, sample, name, **{tool.argument: t}) for t in titles]  # fmt: skip
        else:
            out[name] = answer(ctx, sample, name)
    return out


@pytest.mark.parametrize("change", [removed, replaced])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_nothing_from_a_samples_time_or_later_is_shown(ctx, change, split):
    samples = ctx.ds.splits[split]
    for sample in (samples[0], *samples[7::40]):
        assert sample.time >= ctx.ds.fit_end
        other = Context(change(ctx.ds, sample.time), ctx.sasrec)
        assert len(other.ds.time) < len(ctx.ds.time) or change is replaced
        assert shown(other, sample) == shown(ctx, sample)


def test_the_leak_test_sees_what_happened_just_before(ctx):
    sample = ctx.ds.splits["test"][-1]
    rows = history(ctx.ds, sample, None)
    assert len(rows) > 2
    before = shown(ctx, sample)
    earlier = Context(removed(ctx.ds, int(ctx.ds.time[rows[-1]])), ctx.sasrec)
    changed = {name for name, value in shown(earlier, sample).items() if value != before[name]}  # fmt: skip
    assert changed >= {"prompt", "get_session_behavior", "get_similar_users"}


def weights(model):
    return {name: w.tolist() for name, w in model.state_dict().items()}


def lifts(ds, sasrec):
    """[kinds, kinds] what the tools fit."""
    ctx = Context(ds, sasrec)
    return np.array([ctx.lift(kind) for kind in range(len(ctx.kind_names))])


def test_nothing_fitted_sees_validation_or_test(world):
    later = replaced(world, world.train_end)
    assert (later.fit_end, later.train_end) == (world.fit_end, world.train_end)
    torch.manual_seed(1)
    sasrec = SASRec(len(world.items)).eval()
    fitted = lifts(world, sasrec)
    assert np.array_equal(lifts(later, sasrec), fitted)
    baseline = weights(train_sasrec(world, world.train_end, epochs=1))
    assert weights(train_sasrec(later, later.train_end, epochs=1)) == baseline
    agent = replaced(world, world.fit_end)  # what the agent learns on is not fitted
    tool = weights(train_sasrec(world, world.fit_end, epochs=1))
    assert weights(train_sasrec(agent, agent.fit_end, epochs=1)) == tool
    assert np.array_equal(lifts(agent, sasrec), fitted)
    earlier = replaced(world, world.fit_end - 30 * DAY)  # the test can see a change
    assert weights(train_sasrec(earlier, world.fit_end, epochs=1)) != tool
    assert not np.array_equal(lifts(earlier, sasrec), fitted)


# ------------------------------------------------------------------------------------------------------------ samples


def test_samples_depend_on_dataset_and_seed_only(world):
    again = simulate_office(n_users=120)
    assert again.fingerprint() == world.fingerprint()
    make_splits(again)
    assert every_sample(again) == every_sample(world)
    np.random.seed(3)  # no global state
    make_splits(again, seed=1)
    for name, samples in again.splits.items():
        assert [s.id for s in samples] == [s.id for s in world.splits[name]]
        assert [s.candidates for s in samples] != [s.candidates for s in world.splits[name]]  # fmt: skip


def test_a_samples_candidates_do_not_depend_on_the_other_samples(world):
    theirs = world.splits["test"]
    mine = Samples(simulate_office(n_users=120), theirs.rows[::3], 0)
    assert list(mine) == list(theirs)[::3]


def test_samples_are_drawn_when_asked_for_and_keep_their_place(world):
    ds = simulate_office(n_users=120)
    make_splits(ds)
    train, test = ds.splits["train"], ds.splits["test"]
    assert [s.id for s in test[5:9:2]] == [test[5].id, test[7].id] == list(test.rows[5:9:2])  # fmt: skip
    assert test[-1] == test[len(test) - 1] == test.of(int(test.rows[-1]))
    both = train + test
    assert list(both) == list(train) + list(test) and both[len(train)] == test[0]
    with pytest.raises(IndexError):
        test[len(test)]


def test_candidates_are_the_target_and_19_items_never_interacted_with(world):
    targets = []
    for s in every_sample(world):
        owned = set(world.item[world.by_user[s.user]].tolist())
        assert len(s.candidates) == len(set(s.candidates)) == 20
        assert s.candidates[s.target] == world.item[s.id]
        assert owned & set(s.candidates) == {world.item[s.id]}
        assert (s.user, s.time) == (world.user[s.id], world.time[s.id])
        targets.append(s.target)
    counts = np.bincount(targets, minlength=20) / len(targets)
    assert counts.min() > 0.02 and counts.max() < 0.09, "the place tells nothing"


@pytest.mark.parametrize("name", ["world", pytest.param("real", marks=needs_real)])
def test_splits_are_70_10_10_10_in_order_of_time(name, request):
    ds = request.getfixturevalue(name)
    assert list(ds.splits) == ["fit", "train", "valid", "test"]
    sizes = [len(s) for s in ds.splits.values()]
    shares = np.array(sizes) / sum(sizes)
    assert np.abs(shares - [0.7, 0.1, 0.1, 0.1]).max() < 0.005
    times = [s.time for s in every_sample(ds)]
    assert times == sorted(times)
    assert ds.fit_end == ds.splits["train"][0].time
    assert ds.train_end == ds.splits["valid"][0].time
    rows = [r for r in range(len(ds.time)) if len(ds.before(ds.user[r], ds.time[r]))]
    assert [s.id for s in every_sample(ds)] == rows


def test_a_history_is_strictly_before_oldest_first_and_at_most_10(world):
    for s in world.splits["test"]:
        rows, full = history(world, s), history(world, s, None)
        assert (world.time[full] < s.time).all() and (world.user[full] == s.user).all()
        assert (np.diff(world.time[full]) > 0).all()
        assert rows.tolist() == full[-10:].tolist() and 1 <= len(rows) <= 10
        assert len(full) == ((world.user == s.user) & (world.time < s.time)).sum()


# ------------------------------------------------------------------------------------------------- the bundled office


def test_the_bundled_office_is_quick_and_says_that_it_is_simulated(office, monkeypatch, tmp_path):  # fmt: skip
    monkeypatch.setattr(data, "HOME", tmp_path / "data")
    began = time.process_time()
    ds = load_dataset("office")
    assert time.process_time() - began < 5
    assert ds.simulated and ds.name == "office-sim"
    assert ds.describe().startswith("dataset office-sim: SIMULATED office-supplies shop (bundled, not real people); 2,000 users, 1,800 items, ")  # fmt: skip
    assert all(item.id.startswith("SIM") for item in ds.items)
    assert len({item.title for item in ds.items}) == len(ds.items)
    assert office.fingerprint() == ds.fingerprint()
    monkeypatch.setattr(data, "simulate_office", lambda: office)
    assert load_dataset("office-sim") is office


def test_simulated_users_buy_nothing_twice_and_follow_their_utility(office):
    for rows in office.by_user:
        assert len(set(office.item[rows].tolist())) == len(rows) >= 7
        assert (np.diff(office.time[rows]) > 0).all()
    assert office.utility.shape == (len(office.item), len(office.items))
    sample = office.splits["test"][::10]
    oracle = np.array([office.utility[s.id][list(s.candidates)] for s in sample])
    assert 0.6 < ndcg(oracle, sample) < 0.95, "learnable, and no certainty"
    assert set(np.unique(office.rating)) <= {1, 2, 3, 4, 5}


# ------------------------------------------------------------------------------------------------------------- SASRec


def ndcg(scores, samples, k=10):
    """Mean NDCG@k of [n, 20] candidate scores; ties count against the target."""
    target = np.array([s.target for s in samples])
    mine = scores[np.arange(len(samples)), target]
    rank = (scores >= mine[:, None]).sum(1)
    return float(np.where(rank <= k, 1 / np.log2(1 + rank), 0).mean())


def test_sasrec_of_a_shop_where_nobody_bought_twice_is_untrained():
    ds = simulate_office(n_users=100)
    assert isinstance(train_sasrec(ds, end=int(ds.time.min())), SASRec)


def test_sasrecs_states_do_not_see_later_items():
    torch.manual_seed(0)
    model = SASRec(50).eval()
    ids = torch.randint(1, 51, (4, 12))
    with torch.no_grad():
        states = model(ids)
        for t in range(11):
            later = ids.clone()
            later[:, t + 1 :] = (ids[:, t + 1 :] + 6) % 50 + 1
            changed = (model(later) - states).abs().amax((0, 2))
            assert changed[: t + 1].max() < 1e-6
            assert changed[t + 1 :].min() > 1e-3
    sequences = [(row[: n + 1] - 1).numpy() for n, row in zip((2, 11, 0, 5), ids)]
    ends = model.states(sequences)  # ragged: padding at the end is not seen either
    for i, sequence in enumerate(sequences):
        assert torch.allclose(ends[i], states[i, len(sequence) - 1], atol=1e-6)


def test_sasrec_learns_every_place_that_it_looks_from(monkeypatch):
    """A user with more than MAX_LEN items has as many inputs: none of the places keeps its random beginning."""
    monkeypatch.setattr(sasrec, "MAX_LEN", 8)
    ds = simulate_office(n_users=100)
    assert max(map(len, ds.by_user)) > 8
    torch.manual_seed(0)
    begin = SASRec(len(ds.items)).positions.weight
    moved = train_sasrec(ds, int(ds.time.max()) + 1, epochs=3).positions.weight - begin
    size = moved.detach().abs().amax(1)
    assert size[-1] > 0.2 * size[:-1].median()


def test_a_large_catalogues_loss_takes_each_item_once(monkeypatch):
    """Over all items drawn the sampled loss is the whole one: no target among its own negatives."""
    torch.manual_seed(0)
    model, ids = SASRec(30).eval(), torch.randint(1, 31, (3, 9))
    whole = sasrec.next_item_loss(model, ids)
    monkeypatch.setattr(sasrec, "MAX_SOFTMAX", 29)  # 30 items: one too many
    everything = lambda low, high, size: torch.arange(low, high).repeat(2)
    monkeypatch.setattr(torch, "randint", everything)
    assert torch.allclose(sasrec.next_item_loss(model, ids), whole, atol=1e-6)


def test_a_large_catalogues_loss_is_against_the_drawn_items_only(monkeypatch):
    """One row's target is no negative of the others: popular items would be negatives far too often."""
    torch.manual_seed(0)
    model, ids = SASRec(30).eval(), torch.tensor([[1, 2, 3, 2]])
    monkeypatch.setattr(sasrec, "MAX_SOFTMAX", 29)
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.tensor([2, 7]))
    states, table = model(ids[:, :-1])[0], model.items.weight
    scores = (states @ table.T).exp()  # 3 places, 31 items
    wanted = [
        scores[0, 2] / (scores[0, 2] + scores[0, 7]),
        scores[1, 3] / (scores[1, 3] + scores[1, 2] + scores[1, 7]),
        scores[2, 2] / (scores[2, 2] + scores[2, 7]),
    ]
    loss = -torch.stack(wanted).log().mean()
    assert torch.allclose(sasrec.next_item_loss(model, ids), loss, atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "tried", "taken"),
    [((0.3, 0.5, 0.4), 3, 20), ((0.5, 0.4, 0.9), 2, 10), ((0.1, 0.2, 0.3), 3, 40)],
)
def test_the_baseline_is_fitted_as_long_as_validation_gains(world, monkeypatch, scores, tried, taken):  # fmt: skip
    fits, score = [], dict(zip(sasrec.EPOCHS, scores))

    def fit(ds, end, epochs, progress):
        assert end == ds.train_end
        fits.append(epochs)
        return epochs

    def of_validation(model, ds, samples):
        assert samples[0].id == ds.splits["valid"][0].id
        return score[model]

    monkeypatch.setattr(sasrec, "train_sasrec", fit)
    monkeypatch.setattr(sasrec, "mean_ndcg", of_validation)
    assert sasrec.fit_baseline(world) == taken and len(fits) == tried


def test_what_chooses_the_baselines_epochs_is_ndcg(world):
    torch.manual_seed(0)
    model, samples = SASRec(len(world.items)).eval(), world.splits["valid"]
    past = [world.item[history(world, s, None)] for s in samples]
    scores = model.scores(model.states(past)).numpy()
    own = np.array([scores[i, list(s.candidates)] for i, s in enumerate(samples)])
    found = sasrec.mean_ndcg(model, world, samples)
    assert found == pytest.approx(ndcg(own, samples, k=20), abs=1e-6)


def test_sasrec_beats_popularity_on_held_out_items(office):
    samples = office.splits["test"][:600]
    model = train_sasrec(office, office.train_end, epochs=10)
    past = [office.item[history(office, s, None)] for s in samples]
    candidates = np.array([s.candidates for s in samples])
    states = model.states(past)
    scores = model.scores(states, torch.from_numpy(candidates)).numpy()
    everything = model.scores(states).numpy()
    whole = np.take_along_axis(everything, candidates, axis=1)
    assert np.allclose(scores, whole, atol=1e-5)
    bought = office.item[office.time < office.train_end]
    counts = np.bincount(bought, minlength=len(office.items))[candidates]
    ours, popular = ndcg(scores, samples), ndcg(counts, samples)
    assert ours > popular + 0.05, (ours, popular)
    assert ours > 0.227 + 0.1, "the hit rate of chance"


# ------------------------------------------------------------------------------------------- what the tools look up


@pytest.fixture(scope="module")
def crowded(world):
    """`world` with a user of more than 32 interactions, one of none, and equal times."""
    user, when = world.user.copy(), world.time // DAY * DAY
    user[user < 4], user[user == 5] = 0, 6
    return Context(copy(world, user, world.item, world.rating, when), SASRec(len(world.items)).eval())  # fmt: skip


def test_look_ups_at_a_time_count_what_was_before_it(crowded):
    ds = crowded.ds
    assert len(ds.by_user[0]) > 34 and not len(ds.by_user[5])
    for now in (0, *ds.time[::97], ds.time[-1] + 1):
        counts, last = crowded.as_of(now)
        earlier = ds.item[ds.time < now]
        assert counts.tolist() == np.bincount(earlier, minlength=len(ds.items)).tolist()
        past = [ds.item[ds.before(u, now)] for u in range(len(ds.users))]
        assert (last >= 0).tolist() == [len(p) > 0 for p in past]
        states = crowded.sasrec.states(past)[last >= 0]
        expected = torch.nn.functional.normalize(states, dim=1)
        found = torch.from_numpy(crowded.states[last[last >= 0]])
        assert torch.allclose(found, expected, atol=1e-5)


def test_lifts_are_those_of_counted_pairs(crowded):
    ds, n = crowded.ds, len(crowded.kind_names)
    counts = np.zeros((n, n))
    for u in range(len(ds.users)):
        kinds = crowded.kind[ds.item[ds.before(u, ds.fit_end)]].tolist()
        for i, a in enumerate(kinds):
            for b in kinds[i + 1 : i + 3]:
                counts[a, b] += 1
    share = (counts.sum(0) + 1) / (counts.sum() + n)
    expected = (counts + 10 * share) / (counts.sum(1, keepdims=True) + 10) / share
    found = [crowded.lift(kind) for kind in range(n)]
    assert np.allclose(found, expected, rtol=1e-5)


def test_ranks_and_the_best_with_ties():
    scores = np.array([3, 5, 5, -np.inf, 3, 3, 9], np.float32)
    ranks = np.array([4, 1.5, 1.5, 6, 4, 4, 0])  # ties share the mean of their places
    expected = 1 - np.log1p(ranks) / np.log(8)
    assert np.allclose(log_rank(scores, range(7)), expected)
    assert np.allclose(log_rank(scores, (6, 2)), expected[[6, 2]])
    assert best(scores, 2).tolist() == [6, 1]
    assert best(scores, 4).tolist() == [6, 1, 2, 0]
    assert best(scores, 99).tolist() == [6, 1, 2, 0, 4, 5, 3]


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def real():
    return load_dataset("office2018", str(REAL))


def test_a_candidate_without_a_price_is_neither_usual_nor_unusual(ctx, monkeypatch):
    sample = ctx.ds.splits["test"][0]
    before = candidates_analyze(ctx, sample).scores
    prices = ctx.log_price.copy()
    prices[sample.candidates[4]] = np.nan
    monkeypatch.setattr(ctx, "log_price", prices)
    after = candidates_analyze(ctx, sample).scores
    assert after[4] == 0.5 and (after != before).sum() <= 1


@pytest.mark.parametrize("scores", [np.full(20, np.nan), np.full(20, 1.01), np.zeros(19)])  # fmt: skip
def test_scores_that_would_spoil_every_sum_are_refused(ctx, monkeypatch, scores):
    tool = Tool(lambda ctx, sample: Observation("?", scores), "")
    monkeypatch.setitem(TOOLS, "get_weather", tool)
    with pytest.raises(AssertionError, match=r"get_weather: scores must be 20 numbers"):
        run_call(ctx, ctx.ds.splits["test"][0], Call("get_weather", {}))


@needs_real
def test_real_data_loads_whole(real):
    assert (len(real.users), len(real.items), len(real.item)) == (3231, 3317, 21290)
    assert real.describe().startswith("dataset office2018: real interactions; 3,231 users, 3,317 items, 21,290 interactions; ")  # fmt: skip
    assert real.notes == [] and not real.simulated
    for rows in real.by_user:  # day-granular: ties are moved apart, in file order
        assert (np.diff(real.time[rows]) > 0).all()


@needs_real
def test_tools_on_real_data_say_unknown_and_invent_nothing(real):
    torch.manual_seed(1)
    ctx = Context(real, SASRec(len(real.items)).eval())
    for sample in real.splits["test"][::90]:
        past = [real.items[i] for i in real.item[history(real, sample, None)]]
        stores = {i.store for i in past if i.store}
        title = ctx.titles[sample.candidates[0]]
        text, _ = answer(ctx, sample, "item_info_search", item_name=real.items[sample.candidates[0]].title)  # fmt: skip
        assert re.fullmatch(r"category unknown; price unknown; rating unknown; as popular as \d+%", text.split("\n")[0]), title  # fmt: skip
        text, scores = answer(ctx, sample, "candidates_analyze")
        assert scores is None
        numbers = " ".join(map(str, range(1, 21)))
        assert text == f"category unknown: {numbers}; prices unknown"
        text, _ = answer(ctx, sample, "get_user_profile")
        brands, rest = text.split("\n")[0].split("; ", 1)
        assert rest == "categories unknown; price unknown"
        for brand in re.split(r" \d+% ?", brands.removeprefix("brands "))[:-1]:
            assert any(s.startswith(brand.rstrip("…")[:10]) for s in stores)
        assert stores or brands == "brands unknown"


BY_KIND = ("get_user_profile", "get_session_behavior", "get_rating_behavior")


def unlabelled(world, keeps):
    """The shop with category and brand of an item where `keeps` says so."""
    items = [
        item if keeps(i) else replace(item, category=None, store=None)
        for i, item in enumerate(world.items)
    ]
    ds = replace(world, items=items)
    return Context(ds, SASRec(len(items)).eval())


def test_items_without_category_and_brand_are_no_category_of_their_own(world):
    """All of them looked like purchases of one category, and candidates without any like more of it."""
    none, even = unlabelled(world, lambda i: False), unlabelled(world, lambda i: i % 2)
    scored = 0
    for sample in world.splits["test"][:20]:
        for name in BY_KIND:
            text, scores = answer(none, sample, name)
            assert scores is None and "unknown" in text and ":" not in text
            text, scores = answer(even, sample, name)
            past = [even.ds.items[i] for i in even.ds.item[history(even.ds, sample)]]
            if name == "get_session_behavior":
                past = past[-3:]
            if scores is None:
                assert not any(item.category for item in past)
                continue
            scored += 1
            nothing = 0 if name == "get_user_profile" else 0.5
            bare = [s for s, c in zip(scores, sample.candidates) if c % 2 == 0]
            assert bare == [nothing] * len(bare)
    assert scored > 40


def test_a_title_that_several_items_share_says_so(world):
    """Titles are cut: two candidates can read the same, and the tools look at the first."""
    sample = world.splits["test"][0]
    a, b, other = sample.candidates[:3]
    items = list(world.items)
    for item, end in ((a, "Red"), (b, "Blue")):
        items[item] = replace(
            items[item], title=f"Zephyr Heavy Duty Envelope Box {end}"
        )
    ds = replace(world, items=items)
    ctx = Context(ds, SASRec(len(items)).eval(), title_limit=28)
    assert ctx.titles[a] == ctx.titles[b]
    for name in ("item_info_search", "get_similar_items"):
        argument = TOOLS[name].argument
        text, _ = answer(ctx, sample, name, **{argument: ctx.titles[b]})
        assert text.startswith("first of 2 titled so: ")
        text, _ = answer(ctx, sample, name, **{argument: ctx.titles[other]})
        assert "titled so" not in text


# -------------------------------------------------------------------------------------------------------- bad folders

GOOD_ITEMS = [
    json.dumps({"parent_asin": f"B{i:02d}", "title": f"Stapler {i}", "store": "Norvik"})
    for i in range(40)
]
GOOD_ROWS = ["user_id,parent_asin,rating,timestamp"] + [
    f"U{u},B{(7 * u + n) % 40:02d},{1 + n % 5}.0,{1664582400000 + n * DAY + u}"
    for n in range(6)
    for u in range(12)
]


def write_dataset(folder, items=GOOD_ITEMS, rows=GOOD_ROWS):
    """A folder in the dataset format; lines may be bytes."""
    folder.mkdir(exist_ok=True)
    for name, lines in (("items.jsonl", items), ("interactions.csv", rows)):
        encoded = [x if isinstance(x, bytes) else x.encode() for x in lines]
        (folder / name).write_bytes(b"".join(x + b"\n" for x in encoded))
    return folder


def with_item(line, number=3):
    """Arguments of write_dataset: items.jsonl with this line in place of a good one."""
    return {"items": GOOD_ITEMS[: number - 1] + [line] + GOOD_ITEMS[number:]}


def with_row(line, number=4):
    return {"rows": GOOD_ROWS[: number - 1] + [line] + GOOD_ROWS[number:]}


def item(**fields):
    return json.dumps({"parent_asin": "B02", "title": "Stapler"} | fields)


WHEN = 1664582400000
BAD = {  # what is wrong: files, the file to blame, what comes after its name
    "no items": ({"items": []}, "items.jsonl", ": 0 items; add more, at least 20 are needed"),
    "19 items": ({"items": GOOD_ITEMS[:19]}, "items.jsonl", ": 19 items; add more, at least 20 are needed"),
    "not JSON": (with_item("{'parent_asin': 1}"), "items.jsonl", ":3: not JSON (Expecting property name enclosed in double quotes); write one object a line"),
    "cut JSON": (with_item(GOOD_ITEMS[2][:-1]), "items.jsonl", ":3: not JSON (Expecting ',' delimiter); write one object a line"),
    "deep JSON": (with_item("[" * 200_000), "items.jsonl", ":3: not JSON (too deep, or a number too long); write one object a line"),
    "long number": (with_item("9" * 5000), "items.jsonl", ":3: not JSON (too deep, or a number too long); write one object a line"),
    "no object": (with_item("[1, 2]"), "items.jsonl", ":3: field parent_asin is missing; give every item an id"),
    "no id": (with_item('{"title": "Stapler"}'), "items.jsonl", ":3: field parent_asin is missing; give every item an id"),
    "no title": (with_item('{"parent_asin": "B02"}'), "items.jsonl", ":3: field title is empty; give every item a title or drop its line"),
    "null title": (with_item(item(title=None)), "items.jsonl", ":3: field title is empty; give every item a title or drop its line"),
    "blank title": (with_item(item(title=" \u200b\t")), "items.jsonl", ":3: field title is empty; give every item a title or drop its line"),
    "store": (with_item(item(store=["Norvik"])), "items.jsonl", ":3: field store is ['Norvik']; use text or null"),
    "categories": (with_item(item(categories="Office")), "items.jsonl", ":3: field categories is 'Office'; use a list of text or null"),
    "category": (with_item(item(categories=["Office", 3])), "items.jsonl", ":3: field categories is ['Office', 3]; use a list of text or null"),
    "main category": (with_item(item(main_category={"a": 1})), "items.jsonl", ":3: field main_category is {'a': 1}; use text or null"),
    "average rating": (with_item(item(average_rating="4.5")), "items.jsonl", ":3: field average_rating is '4.5'; use a number or null"),
    "item twice": (with_item(GOOD_ITEMS[0]), "items.jsonl", ":3: parent_asin 'B00' appears a second time; keep one line of it"),
    "Latin-1 title": (with_item('{"parent_asin": "B02", "title": "Caf\xe9"}'.encode("latin-1")), "items.jsonl", ":3: byte 37 of the line is not UTF-8; save the file as UTF-8"),
    "10 MB title": (with_item(item(title="x" * 10_000_000)), "items.jsonl", ":3: the line is longer than 4,194,304 bytes; write one row a line"),
    "no header": ({"rows": []}, "interactions.csv", ":1: header is ''; it must be user_id,parent_asin,rating,timestamp"),
    "wrong header": (with_row("user,item,rating,time", 1), "interactions.csv", ":1: header is 'user,item,rating,time'; it must be user_id,parent_asin,rating,timestamp"),
    "header only": ({"rows": GOOD_ROWS[:1]}, "interactions.csv", ": no interactions; add at least one line below the header"),
    "3 fields": (with_row("U0,B00,5.0"), "interactions.csv", ":4: 3 fields; expected user_id,parent_asin,rating,timestamp"),
    "open quote": (with_row('"U0,B00,5.0,1'), "interactions.csv", ":4: not CSV (unexpected end of data); write user_id,parent_asin,rating,timestamp"),
    "no user": (with_row(f",B00,5.0,{WHEN}"), "interactions.csv", ":4: user_id is empty; fill it in or drop the row"),
    "no item": (with_row(f"U0,,5.0,{WHEN}"), "interactions.csv", ":4: parent_asin is empty; fill it in or drop the row"),
    "unknown item": (with_row(f"U0,B99,5.0,{WHEN}"), "interactions.csv", ":4: parent_asin 'B99' is not in items.jsonl; add it or drop the row"),
    "rating text": (with_row(f"U0,B00,five,{WHEN}"), "interactions.csv", ":4: rating 'five' is not a number; use 1 to 5"),
    "no rating": (with_row(f"U0,B00,,{WHEN}"), "interactions.csv", ":4: rating '' is not a number; use 1 to 5"),
    "rating NaN": (with_row(f"U0,B00,nan,{WHEN}"), "interactions.csv", ":4: rating 'nan' is outside 0 to 5; use 1 to 5"),
    "rating 6": (with_row(f"U0,B00,6,{WHEN}"), "interactions.csv", ":4: rating '6' is outside 0 to 5; use 1 to 5"),
    "seconds": (with_row("U0,B00,5.0,1664582400"), "interactions.csv", ":4: timestamp '1664582400' is not in milliseconds since 1970; write for example 1664582400000"),
    "microseconds": (with_row("U0,B00,5.0,1664582400000000"), "interactions.csv", ":4: timestamp '1664582400000000' is not in milliseconds since 1970; write for example 1664582400000"),
    "negative time": (with_row("U0,B00,5.0,-1664582400000"), "interactions.csv", ":4: timestamp '-1664582400000' is not in milliseconds since 1970; write for example 1664582400000"),
    "a date": (with_row("U0,B00,5.0,2022-10-01"), "interactions.csv", ":4: timestamp '2022-10-01' is not in milliseconds since 1970; write for example 1664582400000"),
    "a superscript": (with_row("U0,B00,5.0,166458240000²"), "interactions.csv", ":4: timestamp '166458240000²' is not in milliseconds since 1970; write for example 1664582400000"),
    "Latin-1 user": (with_row(f"J\xfcrg,B00,5.0,{WHEN}".encode("latin-1")), "interactions.csv", ":4: byte 2 of the line is not UTF-8; save the file as UTF-8"),
    "late Latin-1": (with_row(f"J\xfcrg,B00,5.0,{WHEN}".encode("latin-1"), 60), "interactions.csv", ":60: byte 2 of the line is not UTF-8; save the file as UTF-8"),
    "10 MB row": (with_row("U" * 10_000_000), "interactions.csv", ":4: the line is longer than 4,194,304 bytes; write one row a line"),
    "200 kB field": (with_row("U" * 200_000), "interactions.csv", ":4: not CSV (field larger than field limit (131072)); write user_id,parent_asin,rating,timestamp"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named_with_what_to_do(tmp_path, name):
    files, blamed, message = BAD[name]
    folder = write_dataset(tmp_path / "mine", **files)
    with pytest.raises(DatasetError) as e:
        load_dataset("mine", str(folder))
    assert str(e.value) == f"{folder / blamed}{message}"


def break_missing(path):
    path.unlink()


def break_loop(path):
    path.unlink()
    path.symlink_to(path)


def break_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("blamed", ["items.jsonl", "interactions.csv"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_missing, "No such file or directory"),
        (break_loop, "Too many levels of symbolic links"),
        (break_directory, "Is a directory"),
    ],
)
def test_unreadable_files_are_named(tmp_path, blamed, damage, reason):
    folder = write_dataset(tmp_path / "mine")
    damage(folder / blamed)
    with pytest.raises(DatasetError) as e:
        load_dataset("mine", str(folder))
    assert str(e.value) == f"{folder / blamed}: cannot be read ({reason}); a dataset needs the files items.jsonl and interactions.csv"  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD_ROWS[:41], "mine: only 28 samples have a history; add interactions (40 are needed)"),
        (GOOD_ROWS[:13], "mine: only 0 samples have a history; add interactions (40 are needed)"),
        (GOOD_ROWS + [f"U0,B{i:02d},5.0,{WHEN + 9 * DAY}" for i in range(30)],
         "mine: 40 items are too few: 19 negatives beside a user's 30 items need 49"),
    ],
)  # fmt: skip
def test_datasets_too_small_for_samples_are_refused(tmp_path, rows, message):
    with pytest.raises(DatasetError) as e:
        load_dataset("mine", str(write_dataset(tmp_path / "mine", rows=rows)))
    assert str(e.value) == message


def test_harmless_oddities_load(tmp_path):
    oddities = [GOOD_ROWS[5], f"ONE,B00,5,{WHEN}", "", GOOD_ROWS[9]]
    rows = ["\ufeff" + GOOD_ROWS[0]] + [r + "\r" for r in GOOD_ROWS[1:] + oddities]
    items = ["\ufeff" + GOOD_ITEMS[0], "", *GOOD_ITEMS[1:]]
    folder = write_dataset(tmp_path / "mine", items, rows)
    ds = load_dataset("mine", str(folder))
    assert len(ds.item) == 73 and len(ds.items) == 40
    assert ds.notes == [f"{folder / 'interactions.csv'}:74: 2 duplicate rows skipped, this one first"]  # fmt: skip
    one = ds.users.index("ONE")
    samples = every_sample(ds)
    assert len(samples) == 60, "a user with one interaction has no sample"
    assert one not in {s.user for s in samples}


def test_optional_fields_are_read_or_unknown(tmp_path):
    items = [
        item(title=" Pens \n &  more "),
        item(parent_asin="B01", price="—", average_rating=float("nan")),
        item(parent_asin="B00", price="from 8.99", categories=[], main_category=None),
        item(parent_asin="B03", price=8.99, categories=["Office", "Pens"], main_category="X", average_rating=4.5, rating_number=7),
        item(parent_asin="B04", main_category="Office", categories=None, store=""),
    ] + GOOD_ITEMS[5:]  # fmt: skip
    ds = read_folder(write_dataset(tmp_path / "mine", items), "mine")
    first, dash, lowest, full, bare = ds.items[:5]
    assert first.title == "Pens & more"
    assert dash.price is dash.average_rating is lowest.price is lowest.category is None
    assert (full.price, full.category, full.average_rating, full.rating_number) == (8.99, "Pens", 4.5, 7)  # fmt: skip
    assert (bare.category, bare.store) == ("Office", None)


def test_numbers_are_ids_and_blank_brands_are_none(tmp_path):
    items = [
        item(parent_asin=n, store=" \n ", categories=[" Pens "]) for n in range(40)
    ]
    rows = [GOOD_ROWS[0]] + [f"U{n % 2},{n % 8},5,{WHEN + n}" for n in range(16)]
    ds = read_folder(write_dataset(tmp_path / "mine", items, rows), "mine")
    assert ds.items[0].id == "0"
    assert {(i.store, i.category) for i in ds.items} == {(None, "Pens")}
    told = "50% of the interactions repeat an item of the same user"
    assert len(ds.notes) == 1 and ds.notes[0].startswith(told)


def test_one_long_brand_costs_no_memory(world):
    """An array of text would be as wide as its longest entry for every item."""
    items = [replace(i, store="x" * 10**6) for i in world.items[:1]]
    ds = replace(world, items=items + world.items[1:])
    tracemalloc.start()
    Context(ds, SASRec(len(ds.items)).eval())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_equal_times_of_a_user_keep_the_files_order_1_ms_apart(tmp_path):
    rows = [GOOD_ROWS[0]] + [f"U{n % 2},B{n:02d},5,{WHEN + (n > 5)}" for n in range(8)]
    ds = read_folder(write_dataset(tmp_path / "mine", rows=rows), "mine")
    assert ds.item[ds.by_user[0]].tolist() == [0, 2, 4, 6]
    assert (ds.time[ds.by_user[1]] - WHEN).tolist() == [0, 1, 2, 3]
    assert (np.diff(ds.time) >= 0).all()


def test_names_and_broken_folders_never_fall_back_to_the_simulation(tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.setattr(data, "HOME", tmp_path / "data")
    places = tmp_path / "data"
    for name, message in (
        ("games", f"dataset games: {places / 'games'} does not exist; run `python data.py games` first"),
        ("ofice", "unknown dataset 'ofice' (known: office, office-sim, cds, instruments, games; others with --data-dir); did you mean office?"),
    ):  # fmt: skip
        with pytest.raises(DatasetError) as e:
            load_dataset(name)
        assert str(e.value) == message
    write_dataset(places)  # data/ itself, where it could be mistaken for a dataset
    (places / "office").mkdir()
    with pytest.raises(DatasetError, match=r"office/items.jsonl: cannot be read \(No such"):  # fmt: skip
        load_dataset("office")
    write_dataset(places / "office")
    assert load_dataset("office").describe().startswith("dataset office: real")
    with pytest.raises(DatasetError, match="office-sim is the bundled shop"):
        load_dataset("office-sim", str(places))
    write_dataset(places / "office-sim")
    monkeypatch.setattr(data, "simulate_office", lambda: read_folder(places, "bundled"))
    assert load_dataset("office-sim").name == "bundled"


# ------------------------------------------------------------------------------------------------ Amazon Reviews 2023

START, END = milliseconds("2022-10-01"), milliseconds("2023-10-01")
CATEGORY = "Office_Products"


def meta(key, **fields):
    """A row of the metadata with the real file's fields."""
    row = {"main_category": "Office Products", "title": f"Stapler {key}", "average_rating": 4.5, "rating_number": 31,
           "features": ["Steel"], "description": [], "price": 9.99, "images": [{"thumb": "https://m/1.jpg"}], "videos": [],
           "store": "Norvik", "categories": ["Office Products", "Office &amp; School", "Staplers"],
           "details": {"Brand": "Norvik"}, "parent_asin": key, "bought_together": None}  # fmt: skip
    return row | fields


def kept(key, **fields):
    """The line of items.jsonl that `meta(key)` becomes."""
    row = {"parent_asin": key, "title": f"Stapler {key}", "store": "Norvik", "main_category": "Office Products",
           "categories": ["Office Products", "Office & School", "Staplers"], "price": 9.99, "average_rating": 4.5,
           "rating_number": 31}  # fmt: skip
    return row | fields


WORDS = " ".join("w" * n for n in range(1, 21))
KEPT = {  # id: fields in the metadata, and in items.jsonl
    "entities": ({"title": "Pens &amp; &quot;Ink&quot; &#8211; 12 Pack"}, {"title": 'Pens & "Ink" – 12 Pack'}),
    "20 words": ({"title": WORDS}, {"title": WORDS}),
    "bare": ({"main_category": None, "categories": [], "store": None, "average_rating": None, "rating_number": None},
             {"main_category": None, "categories": [], "store": None, "average_rating": None, "rating_number": None}),
    "dollars": ({"price": "$1,299.00", "categories": None}, {"price": 1299.0, "categories": []}),
    "lines": ({"title": "Two\nlines\u0007  "}, {"title": "Two lines"}),
}  # fmt: skip
UNPRICED = {"null": None, "dash": "—", "from": "from 8.99", "zero": 0, "absent": ...}
UNTITLED = {"empty": "", "one": "A", "entity": "&amp;", "none": None, "blank": " \t ",
            "span": '<span id="productTitle">Pen</span>', "21 words": WORDS + " more"}  # fmt: skip


def raw_files():
    """(ratings, metadata) as the gzipped bytes that the server holds, with every known trap."""
    special = [*KEPT, *UNPRICED, *UNTITLED, "nowhere"]
    rows = [line.split(",") for line in GOOD_ROWS[1:]]
    rows += [[f"V{i}", key, "4.0", str(START + i)] for i, key in enumerate(special)]
    rows += [rows[0], rows[70]]  # duplicates
    rows += [["U0", "B05", "3.0", str(t)] for t in (START - 1, START, END - 1, END)]
    rows += [["U1", "old", "5.0", "831000000000"]]  # reviewed in 1996 only
    rows = [["user_id", "parent_asin", "rating", "timestamp"], *rows]
    priced = {k: {"price": v} for k, v in UNPRICED.items()}
    products = [meta(f"B{i:02d}") for i in range(40)] + [meta("B03", title="Again")]
    products += [meta(k, **fields) for k, (fields, _) in KEPT.items()]
    products += [meta(k, **fields) for k, fields in priced.items()]
    products += [meta(k, title=title) for k, title in UNTITLED.items()]
    products += [meta("never bought"), meta("old")]
    for product in products:
        if product["price"] is ...:
            del product["price"]
    lines = ["\n".join(",".join(r) for r in rows), "\n".join(json.dumps(p, ensure_ascii=False) for p in products)]  # fmt: skip
    return [gzip.compress(f"{text}\n".encode(), mtime=0) for text in lines]


class Files(http.server.BaseHTTPRequestHandler):
    """A mirror that answers ranges; `server.trouble` makes it fail."""

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path.rsplit("/", 1)[1], wanted))
        body = server.files.get(self.path)
        start = int(wanted[6:-1]) if wanted and server.trouble != "no ranges" else 0
        if body is None or start >= len(body):
            self.send_response(404 if body is None else 416)
            self.send_header("Content-Range", f"bytes */{len(body or b'')}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = len(body) // 2 if server.trouble == "cut" else len(body)
        self.wfile.write(body[start:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    ratings, metadata = raw_files()
    server.files = {
        f"/a23/benchmark/5core/rating_only/{CATEGORY}.csv.gz": ratings,
        f"/a23/raw/meta_categories/meta_{CATEGORY}.jsonl.gz": metadata,
    }
    server.asked, server.trouble = [], None
    server.url = f"http://127.0.0.1:{server.server_port}/a23"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def flags(server, tmp_path, *more):
    places = ["--raw-dir", str(tmp_path / "raw"), "--data-dir", str(tmp_path / "office")]  # fmt: skip
    return ["office", "--base-url", server.url, *places, *more]


def written(tmp_path):
    """(items by id, interactions below the header, dataset.json) of the prepared folder."""
    folder = tmp_path / "office"
    lines = (folder / "items.jsonl").read_text().splitlines()
    rows = list(csv.reader((folder / "interactions.csv").read_text().splitlines()))
    assert rows[0] == ["user_id", "parent_asin", "rating", "timestamp"]
    items = {row["parent_asin"]: row for row in map(json.loads, lines)}
    assert len(items) == len(lines)
    return items, rows[1:], json.loads((folder / "dataset.json").read_text())


def test_amazon_is_filtered_as_the_recipe_says(mirror, tmp_path, capsys):
    main(flags(mirror, tmp_path))
    items, rows, about = written(tmp_path)
    bought = {f"B{(7 * u + n) % 40:02d}" for u in range(12) for n in range(6)}
    expected = {key: kept(key) for key in bought}
    expected |= {key: kept(key, **fields) for key, (_, fields) in KEPT.items()}
    assert items == expected
    times = [int(r[3]) for r in rows]
    assert times == sorted(times) and START == times[0] and times[-1] == END - 1
    assert len(rows) == 72 + len(KEPT) + 2 == len(set(map(tuple, rows)))
    assert {r[1] for r in rows} == set(items)
    counts = {"users": 12 + len(KEPT), "items": len(expected), "interactions": len(rows)}  # fmt: skip
    paper = {"users": 27130, "items": 11511, "interactions": 47333}
    assert about == {
        "source": {"base_url": mirror.url, "bytes": {p.rsplit("/", 1)[1]: len(b) for p, b in mirror.files.items()}},
        "filters": {"time": "2022-10-01 to 2023-10-01, the last day not included",
                    "title": "2 characters to 20 words, no '<span id'", "price": "a number"},
        "dropped": {"duplicate interactions": 2, "items without metadata": 1,
                    "items without a usable title": 7, "items without a numeric price": 5},
        "counts": counts,
        "paper": paper,
        "difference": {k: counts[k] - paper[k] for k in paper},
    }  # fmt: skip
    out = capsys.readouterr().out
    assert out.splitlines()[2:] == [
        f"interactions {len(rows)} (paper 47,333)",
        f"written: {tmp_path}/office; now: python train.py --dataset office --data-dir {tmp_path}/office",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["office", "raw"]
    ds = load_dataset("office", str(tmp_path / "office"))
    assert (len(ds.users), len(ds.items), len(ds.item)) == tuple(counts.values())
    assert ds.notes == []


@pytest.mark.parametrize(
    "name, category, users, items, interactions",
    [
        ("cds", "CDs_and_Vinyl", 5437, 8785, 13826),
        ("instruments", "Musical_Instruments", 7593, 5279, 15746),
        ("games", "Video_Games", 6251, 3003, 11457),
    ],
)
def test_the_other_subsets_of_the_paper(
    mirror, tmp_path, name, category, users, items, interactions
):
    mirror.files = {p.replace(CATEGORY, category): b for p, b in mirror.files.items()}
    main([name, *flags(mirror, tmp_path)[1:]])
    about = written(tmp_path)[2]
    paper = {"users": users, "items": items, "interactions": interactions}
    assert about["paper"] == paper and about["counts"]["interactions"] > 72
    assert set(about["source"]["bytes"]) == {p.rsplit("/", 1)[1] for p in mirror.files}


def test_amazon_flags_keep_unpriced_items_and_move_the_window(mirror, tmp_path):
    window = "--min-date", "2022-10-02", "--max-date", "2022-10-07"
    main(flags(mirror, tmp_path, "--keep-unpriced", *window))
    items, rows, about = written(tmp_path)
    assert not set(UNPRICED) & set(items), "their interactions are on the first day"
    assert len(rows) == 60 and about["filters"]["price"] == "any"
    (tmp_path / "office").rename(tmp_path / "earlier")
    asked = len(mirror.asked)
    main(flags(mirror, tmp_path, "--keep-unpriced"))
    items, *_ = written(tmp_path)
    assert {k: items[k]["price"] for k in UNPRICED} == dict.fromkeys(UNPRICED)
    assert len(mirror.asked) == asked, "downloads are used again"


@pytest.mark.parametrize(
    ("value", "price"),
    [(8.99, 8.99), (5, 5.0), ("8.99", 8.99), ("$1,299.00", 1299.0), ("1,299,000", 1299000.0), ("4,75", None), (None, None), ("—", None), ("from 8.99", None),
     ("", None), (0, None), (-3, None), ("nan", None), (float("inf"), None), (10**400, None), (10**4299, None), ([1], None)],
)  # fmt: skip
def test_prices(value, price):
    assert positive_number(value) == price


def test_an_interrupted_download_goes_on_where_it_stopped(mirror, tmp_path):
    ratings, metadata = mirror.files.values()
    mirror.trouble = "cut"
    again = "run the same command again and it goes on from there"
    with pytest.raises(DatasetError, match=again) as e:
        main(flags(mirror, tmp_path))
    half = len(ratings) // 2
    assert str(e.value).startswith(f"{mirror.url}/benchmark/5core/rating_only/{CATEGORY}.csv.gz: ")  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "raw").iterdir()) == [f"{CATEGORY}.csv.gz.part"]  # fmt: skip
    assert (tmp_path / "raw" / f"{CATEGORY}.csv.gz.part").read_bytes() == ratings[:half]
    mirror.trouble = None
    main(flags(mirror, tmp_path))
    assert mirror.asked == [
        (f"{CATEGORY}.csv.gz", None),
        (f"{CATEGORY}.csv.gz", f"bytes={half}-"),
        (f"meta_{CATEGORY}.jsonl.gz", None),
    ]
    assert (tmp_path / "raw" / f"{CATEGORY}.csv.gz").read_bytes() == ratings
    assert (tmp_path / "raw" / f"meta_{CATEGORY}.jsonl.gz").read_bytes() == metadata


def test_a_part_that_is_already_whole_is_taken(mirror, tmp_path):
    ratings = next(iter(mirror.files.values()))
    part = tmp_path / "raw" / f"{CATEGORY}.csv.gz.part"
    part.parent.mkdir()
    part.write_bytes(ratings)
    main(flags(mirror, tmp_path))
    assert part.with_suffix("").read_bytes() == ratings and not part.exists()


@pytest.mark.parametrize("trouble", ["no ranges", None])
def test_a_part_that_cannot_be_continued(mirror, tmp_path, trouble):
    mirror.trouble = trouble
    ratings = next(iter(mirror.files.values()))
    part = tmp_path / "raw" / f"{CATEGORY}.csv.gz.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * (len(ratings) + 5))  # longer than the file
    if trouble:  # the server sends all of it again
        main(flags(mirror, tmp_path))
        assert part.with_suffix("").read_bytes() == ratings
    else:
        message = f"HTTP 416 .*; delete {part} and run the same command again"
        with pytest.raises(DatasetError, match=message):
            main(flags(mirror, tmp_path))


def command(*arguments):
    """Exit code and the lines of stderr of `python data.py ...`."""
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "data.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in run.stderr
    return run.returncode, run.stderr.strip().splitlines()


def test_a_missing_file_on_the_server_exits_2_with_one_line(mirror, tmp_path):
    mirror.files.clear()
    code, lines = command(*flags(mirror, tmp_path))
    url = f"{mirror.url}/benchmark/5core/rating_only/{CATEGORY}.csv.gz"
    advice = f"check the network and --base-url, or put the file into {tmp_path / 'raw'}"  # fmt: skip
    assert (code, lines) == (2, [f"error: {url}: HTTP 404 Not Found; {advice}"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]
    assert not list((tmp_path / "raw").iterdir())


def test_no_network_exits_2_with_one_line(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    places = "--raw-dir", str(tmp_path / "raw"), "--data-dir", str(tmp_path / "office")
    code, lines = command("office", "--base-url", url, *places)
    assert code == 2 and len(lines) == 1
    assert re.fullmatch(rf"error: {url}/\S+: no answer \(.*refused.*\); check the network and --base-url, or put the file into \S+", lines[0])  # fmt: skip


def place(mirror, tmp_path):
    """Put the raw files where --raw-dir finds them; returns their paths."""
    (tmp_path / "raw").mkdir()
    paths = [tmp_path / "raw" / p.rsplit("/", 1)[1] for p in mirror.files]
    for path, body in zip(paths, mirror.files.values()):
        path.write_bytes(body)
    return paths


def refused(mirror, tmp_path, *more):
    """What `main` says when it refuses; neither a dataset nor a rest of one may be left."""
    with pytest.raises(DatasetError) as e:
        main(flags(mirror, tmp_path, *more))
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]
    assert "\n" not in str(e.value)
    return str(e.value)


def test_damaged_raw_files_are_named(mirror, tmp_path):
    ratings, metadata = place(mirror, tmp_path)
    whole = metadata.read_bytes()
    fetch_again = "; delete it and fetch it again"
    for body in (whole[: len(whole) // 2], whole[:-6], whole[:300] + b"xx" + whole[302:]):  # fmt: skip
        metadata.write_bytes(body)
        text = refused(mirror, tmp_path)
        assert text.startswith(f"{metadata}: damaged or cut short (") and text.endswith(fetch_again)  # fmt: skip
    metadata.write_bytes(b"<html>log in first</html>")
    assert refused(mirror, tmp_path) == f"{metadata}: damaged or cut short (Not a gzipped file (b'<h')){fetch_again}"  # fmt: skip
    metadata.unlink()
    metadata.mkdir()
    assert refused(mirror, tmp_path) == f"{metadata}: cannot be read (Is a directory){fetch_again}"  # fmt: skip
    metadata.rmdir()
    metadata.write_bytes(whole)
    ratings.write_bytes(gzip.compress(b"user_id,rating\n"))
    assert refused(mirror, tmp_path) == f"{ratings}:1: header is 'user_id,rating'; it must be user_id,parent_asin,rating,timestamp"  # fmt: skip
    ratings.write_bytes(gzip.compress(f"{GOOD_ROWS[0]}\nU0,B00,5.0,1664582400\n".encode()))  # fmt: skip
    assert refused(mirror, tmp_path) == f"{ratings}:2: timestamp '1664582400' is not in milliseconds since 1970; write for example 1664582400000"  # fmt: skip
    assert not mirror.asked


def test_windows_without_enough_in_them_are_refused(mirror, tmp_path):
    ratings, _ = place(mirror, tmp_path)
    empty = "--min-date", "2001-01-01", "--max-date", "2001-02-01"
    assert refused(mirror, tmp_path, *empty) == (
        f"{ratings}: 0 items and 0 interactions of 2001-01-01 to 2001-02-01 pass the filters; "
        "widen --min-date and --max-date"
    )  # fmt: skip
    short = refused(mirror, tmp_path, "--max-date", "2022-10-03")
    assert short == "office: only 13 samples have a history; add interactions (40 are needed)"  # fmt: skip
    swapped = refused(mirror, tmp_path, "--max-date", "2022-10-01")
    assert swapped == "--max-date 2022-10-01 must be after 2022-10-01"
    assert refused(mirror, tmp_path, "--min-date", "1.10.2022") == "'1.10.2022' is no date; write YYYY-MM-DD"  # fmt: skip


def test_a_full_disk_is_one_line_and_leaves_no_dataset(mirror, tmp_path, monkeypatch):
    hint = "No space left on device; make room or choose another --raw-dir or --data-dir, then run the same command again"  # fmt: skip
    if pathlib.Path("/dev/full").exists():
        (tmp_path / "raw").mkdir()
        part = tmp_path / "raw" / f"{CATEGORY}.csv.gz.part"
        part.symlink_to("/dev/full")
        assert refused(mirror, tmp_path) == f"{tmp_path / 'raw'}: {hint}"
        part.unlink()
        (tmp_path / "raw").rmdir()
    place(mirror, tmp_path)
    seen = []

    def full(name, folder):
        seen.append((pathlib.Path(folder), (tmp_path / "office").exists()))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder}/items.jsonl")

    monkeypatch.setattr(data, "load_dataset", full)
    part = tmp_path / ".office.part"
    assert refused(mirror, tmp_path) == f"{part}/items.jsonl: {hint}"
    assert seen == [(part, False)], "everything is written before the folder gets its name"  # fmt: skip


def test_an_existing_dataset_is_not_overwritten(mirror, tmp_path):
    folder = write_dataset(tmp_path / "office")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    code, lines = command(*flags(mirror, tmp_path))
    assert (code, lines) == (2, [f"error: {folder} exists; move it away to prepare it again"])  # fmt: skip
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not mirror.asked


def test_a_rest_of_a_killed_run_is_cleared_and_never_loaded(mirror, tmp_path, monkeypatch):  # fmt: skip
    place(mirror, tmp_path)
    rest = write_dataset(tmp_path / ".office.part", items=GOOD_ITEMS[:5])
    monkeypatch.setattr(data, "HOME", tmp_path / "data")
    monkeypatch.setattr(data, "simulate_office", lambda: pytest.fail("not reached"))
    with pytest.raises(pytest.fail.Exception):
        load_dataset("office")
    main(flags(mirror, tmp_path))
    assert not rest.exists() and (tmp_path / "office" / "dataset.json").exists()
