"""The simulated shop, SASRec and what each tool shows and scores, against values computed here from the interactions."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_data import copy

import data as data_module
import eval as ev
import sasrec
import tools
from data import Sample, history, simulate_office
from sasrec import SASRec
from tools import Call, Context, digits, run_call, tool_scores


def test_the_bundled_shop_is_the_one_of_the_readmes_figures():
    """What is simulated is part of every result: a change has to be meant."""
    assert simulate_office(n_users=120).fingerprint() == "bbbbbb292f6d019b"


def test_loved_categories_are_rated_well_and_hated_ones_badly():
    rng = np.random.default_rng(7)
    _, prop = data_module.make_catalogue(rng)
    users = data_module.draw_users(rng, prop, 300)
    user, item, rating, *_ = data_module.purchases(rng, prop, users)
    love = users[2][user, prop["category"][item]]
    loved, none, hated = (rating[love == x].mean() for x in (1, 0, -1))
    assert loved > 4.5 and 3.4 < none < 3.8 and hated < 2.7


def test_what_drives_users_is_drawn_as_often_as_said():
    rng = np.random.default_rng(0)
    drive, *_ = data_module.draw_users(
        rng, data_module.make_catalogue(rng, 200)[1], 4000
    )
    strength = drive / data_module.STRENGTH
    main = np.bincount(strength.argmax(1), minlength=6) / 4000
    assert np.abs(main - data_module.FREQUENCY).max() < 0.03
    assert np.allclose(np.sort(strength), [0.1, 0.1, 0.1, 0.35, 0.7, 1.0])


def test_the_oracles_utility_is_what_purchases_are_drawn_by(world):
    """Positives fall as often as the softmax over the candidates says, so that log p averages minus the entropy."""
    gaps = []
    for s in [*world.splits["fit"], *world.splits["test"]]:
        x = torch.from_numpy(world.utility[s.id][list(s.candidates)]).double()
        logp = x.log_softmax(0)
        gaps.append(float(logp[s.target] + -(logp.exp() * logp).sum()))
    assert abs(np.mean(gaps)) < 0.1


@pytest.mark.parametrize("part", ["user", "item", "rating", "time", "items"])
def test_a_fingerprint_covers_all_that_a_run_reads(world, part):
    value = getattr(world, part)
    if part == "items":
        changed = [replace(value[0], price=1.0), *value[1:]]
    else:
        changed = value.copy()
        changed[0] += 1
    assert replace(world, **{part: changed}).fingerprint() != world.fingerprint()


class Stopped(Exception):
    pass


def test_sasrec_is_fitted_on_the_latest_purchases_for_20_epochs(world, monkeypatch):
    """A long history keeps its end."""
    monkeypatch.setattr(sasrec, "MAX_LEN", 4)
    seen, steps = [], []

    def pad(sequences, limit):
        seen.extend(s.tolist() for s in sequences)
        raise Stopped

    def schedule(optimizer, lr, total_steps):
        steps.append(total_steps)

    monkeypatch.setattr(sasrec, "pad", pad)
    monkeypatch.setattr(sasrec, "OneCycleLR", schedule)
    with pytest.raises(Stopped):
        sasrec.train_sasrec(world, world.time[-1] + 1)
    n = sum(len(r) > 1 for r in world.by_user)
    assert steps == [20 * -(-n // 128)]
    ends = {tuple(world.item[r[-5:]].tolist()) for r in world.by_user}
    assert seen and {tuple(s) for s in seen} <= ends


def test_a_fitted_sasrec_drops_nothing_out(world):
    """fit_baseline chooses between models by their ranking as it stands."""
    assert not sasrec.train_sasrec(world, world.fit_end, epochs=1).training


@pytest.fixture(scope="module")
def crowd(world):
    """The small shop with a user of 35 purchases and more, as the tools see it."""
    user = world.user.copy()
    user[user < 4] = 0
    torch.manual_seed(1)
    ds = copy(world, user, world.item, world.rating, world.time)
    return Context(ds, SASRec(len(world.items)).eval())


@pytest.fixture(scope="module")
def samples(crowd):
    """Some test samples, and one of the user with a long past."""
    long = Sample(10**6, 0, int(crowd.ds.time[-1]), tuple(range(50, 70)), 3)
    return [s for s in crowd.ds.splits["test"][::9] if s.user > 3] + [long]


def of_past(ctx, sample, limit=None):
    """Items and ratings before the sample, oldest first."""
    rows = history(ctx.ds, sample, limit)
    return [ctx.ds.items[i] for i in ctx.ds.item[rows]], ctx.ds.rating[rows]


def test_a_profile_scores_brands_by_their_share_of_the_whole_past(crowd, samples):
    for s in samples:
        past, _ = of_past(crowd, s)
        stores = Counter(i.store for i in past)
        offered = [crowd.ds.items[c] for c in s.candidates]
        expected = [stores[i.store] / (len(past) + 1) for i in offered]
        found = tools.get_user_profile(crowd, s)
        assert np.allclose(found.scores, expected)
        store, n = stores.most_common(1)[0]
        assert found.text.startswith(f"brands {store} {100 * n // len(past)}%")
    assert len(past) > 34


def test_a_session_weighs_the_latest_category_most(crowd, samples):
    for s in samples:
        past, _ = of_past(crowd, s, 10)
        names = crowd.kind_names.tolist()
        kinds = [names.index(i.category) for i in past]
        drift = sum(
            w * np.log(crowd.lift(k)) for w, k in zip((1, 0.7, 0.49), kinds[::-1])
        )
        offered = [names.index(crowd.ds.items[c].category) for c in s.candidates]
        expected = 1 / (1 + np.exp(-1.5 * drift[offered]))
        found = tools.get_session_behavior(crowd, s)
        assert np.allclose(found.scores, expected)
        assert found.text == "recent " + " > ".join(i.category for i in past[-4:])


def test_a_well_rated_category_scores_above_one_half(crowd, samples):
    for s in samples:
        past, ratings = of_past(crowd, s)
        for score, c in zip(tools.get_rating_behavior(crowd, s).scores, s.candidates):
            own = [r for i, r in zip(past, ratings) if i.category == crowd.ds.items[c].category]  # fmt: skip
            mean = sum(r - 3.4 for r in own) / (len(own) + 1) / 2
            assert score == pytest.approx(min(1, max(0, 0.5 + mean)))
    ds = replace(crowd.ds, rating=crowd.ds.rating.copy())
    rows = history(ds, s, None)
    ds.rating[rows] = np.resize([5.0, 4.0, 3.0, 2.0, 1.0], len(rows))
    text = tools.get_rating_behavior(Context(ds, crowd.sasrec), s).text
    for band, marks in (("high", (4, 5)), ("middle", (3,)), ("low", (1, 2))):
        kinds = [i.category for i, r in zip(past, ds.rating[rows]) if r in marks]
        top = ", ".join(name for name, _ in Counter(kinds).most_common(3))
        assert f"{band} {top}" in text


def test_a_usual_price_scores_1_and_others_less(crowd, samples):
    for s in samples:
        past, _ = of_past(crowd, s)
        usual = np.median([np.log(i.price) for i in past])
        offered = np.log([crowd.ds.items[c].price for c in s.candidates])
        expected = np.exp(-0.5 * ((offered - usual) / 0.5) ** 2)
        assert np.allclose(tools.candidates_analyze(crowd, s).scores, expected)


def test_similar_items_are_those_likeliest_next_and_not_the_item_itself(crowd, samples):
    model = crowd.sasrec
    for s in samples:
        item = s.candidates[2]
        found = tools.get_similar_items(crowd, s, crowd.titles[item])
        scores = model.scores(model.states([np.array([item])]))[0].tolist()
        order = [i for i in np.argsort(scores)[::-1].tolist() if i != item] + [item]
        assert found.text == "near " + "; ".join(crowd.titles[i] for i in order[:2])
        ranks = [order.index(c) for c in s.candidates]
        expected = [1 - math.log(1 + r) / math.log(1 + len(order)) for r in ranks]
        assert np.allclose(found.scores, expected, atol=1e-4)


def test_similar_users_purchases_count_by_likeness_and_the_users_own_do_not(crowd, samples):  # fmt: skip
    ds = crowd.ds
    for s in samples:
        past = [ds.item[ds.before(u, s.time)] for u in range(len(ds.users))]
        states = torch.nn.functional.normalize(crowd.sasrec.states(past), dim=1).numpy()
        like = {u: float(states[u] @ states[s.user]) for u, p in enumerate(past) if len(p) and u != s.user}  # fmt: skip
        near = sorted(like, key=lambda u: -like[u])[:40]
        bought = np.bincount(np.concatenate(past), minlength=len(ds.items)) * 1.0
        bought *= 0.5 / bought.max()
        for u in near:
            for i in past[u][-6:]:
                bought[i] += math.exp(6 * (like[u] - like[near[0]]))
        found = tools.get_similar_users(crowd, s)
        assert np.allclose(found.scores, tools.log_rank(bought, s.candidates), atol=0.02)  # fmt: skip
        top = [crowd.titles[i] for i in np.argsort(-bought, kind="stable")[:2]]
        assert found.text == "bought " + "; ".join(top)


def test_popularity_is_the_share_of_items_that_are_no_more_popular(crowd, samples):
    ds = crowd.ds
    for s in samples:
        counts = np.bincount(ds.item[ds.time < s.time], minlength=len(ds.items))
        expected = [(counts <= counts[c]).mean() for c in s.candidates]
        assert np.allclose(tool_scores(crowd, "item_info_search", s), expected)
        c = s.candidates[0]
        text = tools.item_info_search(crowd, s, crowd.titles[c]).text
        assert text.endswith(f"as popular as {int(100 * expected[0])}%")


def test_the_similar_items_of_the_baseline_are_the_last_purchases(crowd, samples):
    for s in samples:
        last = crowd.titles[crowd.ds.item[history(crowd.ds, s)[-1]]]
        want = tools.get_similar_items(crowd, s, last).scores
        assert np.array_equal(tool_scores(crowd, "get_similar_items", s), want)


def test_reshuffled_candidates_are_answered_anew(crowd, samples):
    """eval.py's probe keeps the sample's id: an answer from memory would be of the order before."""
    s = samples[0]
    other = ev.reshuffled(s)
    place = [s.candidates.index(c) for c in other.candidates]
    for name in ("get_user_profile", "candidates_analyze", "get_similar_users"):
        before, after = (run_call(crowd, x, Call(name, {})).scores for x in (s, other))
        assert np.array_equal(after, before[place])


def test_digits_are_rounded_down():
    scores = np.array([0, 0.09, 0.1, 0.19, 0.55, 0.94, 0.99, 1])
    assert digits(scores).tolist() == [0, 0, 1, 1, 5, 9, 9, 9]
