"""eval.py's rows, intervals and probes against values computed by hand, and what they may and may not see."""

import argparse
import json
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_data import removed, replaced

import eval as ev
import rollout as rollout_module
import tools
import train
from data import Sample
from model import save_policy
from rollout import (
    ALL_TOOLS,
    Task,
)
from sasrec import SASRec
from tools import Context, tool_scores


def test_95_of_100_means_lie_in_an_interval():
    """400 users with one sample each, half of them 1: 1.96 standard errors of 1/40 on either side."""
    found = ev.intervals({"a": np.arange(400) % 2}, np.arange(400))["a"]
    assert (found["hi"] - found["lo"]) / 2 == pytest.approx(1.96 / 40, rel=0.05)


def test_a_tables_intervals_are_over_users(args):
    """All samples are one user's: another user's would be needed to say more."""
    samples = [Sample(i, 0, i, tuple(range(20)), 0) for i in range(6)]
    rows = {"frozen": [[{"rank": 1 + i} for i in range(6)]]}
    rows["random"] = [[{"rank": None}] * 6]
    found = ev.summarize(rows, samples, args)
    mean = found["rows"]["frozen"]["mrr"]
    assert mean["lo"] == mean["hi"] == pytest.approx(mean["mean"]) == pytest.approx(sum(1 / (1 + i) for i in range(6)) / 6)  # fmt: skip
    assert found["paired"]["frozen-random"]["mrr"]["mean"] == pytest.approx(mean["mean"])  # fmt: skip


def test_the_highest_score_ranks_first_and_ties_fall_at_random(world):
    samples = list(world.splits["test"])
    own = np.array([np.arange(20) == s.target for s in samples], float)
    assert set(ev.ranks_from_scores(own, samples)) == {1}
    assert set(ev.ranks_from_scores(-own, samples)) == {20}
    tied = ev.ranks_from_scores(0 * own, samples)
    assert tied == ev.ranks_from_scores(0 * own, samples)
    first = Sample(1, 0, 0, tuple(range(20)), 0)
    many = [replace(first, id=i) for i in range(400)]
    ranks = np.bincount(ev.ranks_from_scores(np.zeros((400, 20)), many), minlength=21)
    assert ranks[1:].min() > 5, "wherever the positive stands"


@pytest.mark.parametrize("change", [removed, replaced])
def test_baselines_see_nothing_from_a_samples_time_or_later(ctx, tmp_path, change):
    torch.manual_seed(2)
    model = SASRec(len(ctx.ds.items))
    save_file(model.state_dict(), tmp_path / "sasrec_baseline.safetensors")
    for sample in ctx.ds.splits["test"][::90]:
        other = Context(change(ctx.ds, sample.time), ctx.sasrec)
        want, got = (ev.baseline_scores(c, tmp_path, [sample]) for c in (ctx, other))
        oracle = want.pop("oracle")[0]
        assert oracle.tolist() == ctx.ds.utility[sample.id][list(sample.candidates)].tolist()  # fmt: skip
        assert want.keys() == got.keys()
        for name in want:
            assert np.array_equal(want[name], got[name]), name


def test_the_baselines_sasrec_is_fitted_once_and_only_when_needed(
    ctx, tmp_path, monkeypatch
):
    fits = []

    def fit(ds, progress):
        fits.append(ds)
        return SASRec(len(ds.items))

    monkeypatch.setattr(ev, "fit_baseline", fit)
    first, again = (ev.baseline_sasrec(tmp_path, ctx.ds) for _ in "ab")
    assert fits == [ctx.ds]
    assert torch.equal(first.items.weight, again.items.weight)


def test_fusions_are_fitted_to_training_samples(ctx, tmp_path, monkeypatch):
    save_file(
        SASRec(len(ctx.ds.items)).state_dict(), tmp_path / "sasrec_baseline.safetensors"
    )
    fitted = []

    def fit(scores, targets):
        fitted.append((scores.shape[1], targets.tolist()))
        return np.ones(scores.shape[1])

    monkeypatch.setattr(ev, "best_subset", fit)
    monkeypatch.setattr(ev, "fit_fusion", fit)
    ev.baseline_scores(ctx, tmp_path, ctx.ds.splits["test"][:3])
    targets = [s.target for s in ctx.ds.splits["train"]]
    assert fitted == [(n, targets) for n in (7, 7, 8)]


def test_baselines_by_hand(ctx, tmp_path):
    ds, samples = ctx.ds, ctx.ds.splits["test"][:4]
    model = SASRec(len(ds.items)).eval()
    save_file(model.state_dict(), tmp_path / "sasrec_baseline.safetensors")
    rows = ev.baseline_scores(ctx, tmp_path, samples)
    for i, s in enumerate(samples):
        bought = Counter(ds.item[ds.time < ds.train_end].tolist())
        assert rows["popularity"][i].tolist() == [bought[c] for c in s.candidates]
        of = [tool_scores(ctx, name, s) for name in ALL_TOOLS]
        for name, scores in zip(ALL_TOOLS, of):
            assert np.array_equal(rows[f"tool:{name}"][i], scores)
        assert np.allclose(rows["fusion"][i], np.sum(of, 0))
        assert np.array_equal(rows["titles"][i] * 9, rollout_module.read_titles(ctx, s)[1])  # fmt: skip
        past = ds.item[(ds.user == s.user) & (ds.time < s.time)]
        scores = model.scores(model.states([past]))[0].numpy()[list(s.candidates)]
        assert np.allclose(rows["sasrec"][i], scores, atol=1e-5)
        assert not rows["random"][i].any()


@pytest.fixture
def args(tmp_path, ctx):
    save_file(ctx.sasrec.state_dict(), tmp_path / "sasrec.safetensors")
    return argparse.Namespace(
        out=tmp_path, k=10, bonus=0.1, temperature=1.0, max_new_tokens=12, split="test",
        dtype="float32", device="cpu", slots=4, seeds=[0], greedy_answer=False,
        cuda_graphs=False,
    )  # fmt: skip


def test_an_agent_plays_by_the_seed_its_tools_and_k(args, ctx, policy, monkeypatch):
    save_policy(policy, args.out / "agent")
    asked, real, args.k = [], ev.rollout, 5

    def watching(policy, ctx, tasks, **how):
        asked.append((how["tools"], how["seed"], how["k"]))
        return real(policy, ctx, tasks, **how)

    monkeypatch.setattr(ev, "rollout", watching)
    sample, wanted = ctx.ds.splits["test"][0], []
    for own, seed in (((), 0), ((), 3), (("get_user_profile",), 3)):
        agent = ev.Agent("a", str(args.out / "agent"), own)
        (line,) = ev.play(args, ctx, agent, [Task(sample)], seed)
        wanted.append((own, (seed, 99), 5))
        title = ctx.titles[sample.candidates[sample.target]]
        assert (line["positive"], line["title"]) == (sample.target + 1, title)
    assert asked == wanted


def test_an_agent_is_evaluated_with_graphs_if_it_was_trained_so(args, ctx, policy, monkeypatch):  # fmt: skip
    save_policy(policy, args.out / "agent")
    seen, task = [], Task(ctx.ds.splits["test"][0])
    agent = ev.Agent("a", str(args.out / "agent"))
    watching = lambda policy, *_, **__: seen.append(policy.graphs) or 1 / 0
    monkeypatch.setattr(ev, "rollout", watching)
    for args.cuda_graphs in (False, True):
        with pytest.raises(ZeroDivisionError):
            ev.play(args, ctx, agent, [task], 0)
    assert seen == [False, True]


def test_an_agent_without_instructions_is_told_and_pairs_are_named(args, ctx, policy, capsys):  # fmt: skip
    save_policy(policy, args.out / "agent")
    path, sample = str(args.out / "agent"), ctx.ds.splits["test"][0]
    ev.play(args, ctx, ev.Agent("rta", path), [Task(sample, (3, 5))], 0)
    told = capsys.readouterr()
    assert "asking pairs of rta" in told.err and not told.out
    ev.play(args, ctx, ev.Agent("plan", path, strategy="plan-first"), [Task(sample)], 0)
    told = capsys.readouterr()
    assert "evaluating plan" in told.err and "plan needs a chat model" in told.out


def test_whatever_shapes_a_trajectory_has_rows_of_its_own(args, ctx, policy):
    save_policy(policy, args.out / "agent")
    agent = ev.Agent("a", str(args.out / "agent"))
    base = {"args": args, "ctx": ctx, "agent": agent, "seed": 0, "off": ()}
    same = {"ds": ctx.ds, "profiles": {}, "title_limit": 60}
    others = [{"seed": 1}, {"off": ("get_user_profile",)}]
    for change in ({"k": 5}, {"bonus": 0.2}, {"temperature": 0.5}, {"greedy_answer": True}, {"max_new_tokens": 13}, {"dtype": "bfloat16"}, {"device": "cuda"}):  # fmt: skip
        others.append({"args": argparse.Namespace(**vars(args) | change)})
    for change in ({"tools": ()}, {"strategy": "plan-first"}):
        others.append({"agent": replace(agent, **change)})
    fork = SimpleNamespace(fingerprint=lambda: "another")
    for change in ({"ds": fork}, {"profiles": {3: "likes red"}}, {"title_limit": 30}):
        others.append({"ctx": SimpleNamespace(**same | change)})
    files = [ev.row_file(**base | other) for other in ({}, *others)]
    assert len(set(files)) == len(files) == 15
    again = SimpleNamespace(**same)
    assert ev.row_file(**base | {"ctx": again}) == files[0]


def test_agreement_is_of_items_not_of_their_numbers(world):
    s = world.splits["test"][0]
    other = ev.reshuffled(s)
    before, after = (
        {"task": ev.task_key(Task(x)), "valid": True,
         "answer": [x.candidates.index(c) + 1 for c in s.candidates[:10]]}
        for x in (s, other)
    )  # fmt: skip
    spoilt = before | {"valid": False}
    found = ev.agreement([before, before, spoilt], [after, spoilt, after])
    assert found == {"n": 1, "top1": 1.0, "kendall": 1.0}


def test_probes_by_hand(args, ctx, monkeypatch):
    """First as it is; second without the tool that was called and where candidates are reshuffled; missed with another seed."""
    samples, tool = ctx.ds.splits["test"][:6], "get_user_profile"
    asked = []

    def play(args, ctx, agent, tasks, seed, off=()):
        lines = []
        for t in tasks:
            moved = t.sample.candidates != ctx.ds.splits["test"].of(t.sample.id).candidates  # fmt: skip
            rank = None if seed else 2 if off or moved else 1
            lines.append({"task": ev.task_key(t), "rank": rank, "valid": True, "calls": [tool] * (t.sample.id == samples[0].id), "text": "", "answer": [1, 2]})  # fmt: skip
        asked.append((len(tasks), seed, off))
        return lines

    monkeypatch.setattr(ev, "play", play)
    args.probes = 4
    agent = ev.Agent("frozen", "x")
    rows = {"frozen": [play(args, ctx, agent, [Task(s) for s in samples], 0)]}
    asked.clear()
    found = ev.probe(args, ctx, agent, samples, rows)
    assert (4, 1, ()) in asked and (1, 0, (tool,)) in asked and found["n"] == 4
    lost = 1 / math.log2(3) - 1
    assert found["stability"]["resampled"]["ndcg@10"]["mean"] == -1
    assert found["stability"]["reshuffled"]["ndcg@10"]["mean"] == pytest.approx(lost)
    without = {name: x["ndcg@10"]["mean"] for name, x in found["without_tool"].items()}
    assert without.pop(tool) == pytest.approx(lost / 4)
    assert set(without.values()) == {0}


def test_groups_of_samples_by_hand(args):
    """20 samples, the positive of each in another place, with 1 to 20 items in the past; found where that is even."""
    order = np.random.default_rng(0).permutation(20).tolist()
    samples = [Sample(i, i, i + 1, tuple(range(20)), 19 - i) for i in order]
    ctx = SimpleNamespace(ds=SimpleNamespace(before=lambda user, time: range(time)))
    ranks = [1 if i < 5 else None for i in order]
    found = ev.by_groups(args, ctx, samples, {"frozen": [[{"rank": r} for r in ranks]]})
    n = {k: {label: g["n"] for label, g in x.items()} for k, x in found.items()}
    labels = ["1–5", "6–10", "11–15", "16–20"]
    assert n == dict.fromkeys(("by_history", "by_position"), dict.fromkeys(labels, 5))
    mean = {k: [x[label]["rows"]["frozen"]["mean"] for label in labels] for k, x in found.items()}  # fmt: skip
    assert mean == {"by_history": [1, 0, 0, 0], "by_position": [0, 0, 0, 1]}


def test_behaviour_is_per_request():
    line = {"valid": True, "reward": 1.0, "seconds": 2.0, "tool_seconds": 0.5, "tokens": 10, "calls": ["get_user_profile"] * 2}  # fmt: skip
    other = line | {"valid": False, "reward": -1.0, "calls": ["get_similar_users"]}
    found = ev.behaviour([[line, other], [line, line]])
    assert (found["valid"], found["reward"], found["tool_calls"]) == (0.75, 0.5, 1.75)
    assert (found["ms"], found["tool_ms"], found["tokens"]) == (2000, 500, 10)
    assert found["calls"]["get_user_profile"] == 1.5


def test_the_frozen_agent_of_a_warmed_up_run_is_what_stage_1_began_with(tmp_path):
    args = argparse.Namespace(out=tmp_path, models=[], agent=["react"])
    for warmed, path in ((False, "x"), (True, str(tmp_path / "warmup"))):
        if warmed:
            (tmp_path / "warmup").mkdir()
        agents = ev.run_agents(args, {"args": {"model": "x"}})
        assert {a.name: a.path for a in agents} == dict.fromkeys(("frozen_r", "frozen"), path)  # fmt: skip


def test_an_evaluation_uses_the_runs_own_tools_and_data(world, monkeypatch, tmp_path):
    models = [SASRec(len(world.items)) for _ in range(2)]
    for name, model in zip(("sasrec", "sasrec_baseline"), models):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    settings = vars(train.parse_args(["--device", "cpu", "--title-chars", "17"]))
    config = {"args": settings, "fingerprint": world.fingerprint()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / tools.PROFILES).write_text('{"sample": 3, "text": "likes red"}\n')
    monkeypatch.setattr(ev, "load_dataset", lambda *_: world)
    monkeypatch.setattr("sys.argv", ["eval.py", str(tmp_path)])
    _, ctx = ev.load(ev.parse_args())
    assert torch.equal(ctx.sasrec.items.weight, models[0].items.weight)
    assert (ctx.title_limit, ctx.profiles) == (17, {3: "likes red"})
    other = replace(world, rating=np.flip(world.rating))
    monkeypatch.setattr(ev, "load_dataset", lambda *_: other)
    with pytest.raises(ev.DatasetError, match="its dataset has changed since"):
        ev.load(ev.parse_args())


def test_a_table_compares_the_final_agent_with_every_row(args):
    samples = [Sample(i, i, i, tuple(range(20)), 0) for i in range(4)]
    done = {"valid": True, "reward": 1.0, "seconds": 1.0, "tool_seconds": 0.5, "tokens": 9, "calls": []}  # fmt: skip
    ranks = {"random": 3, "frozen": 2, "rta": 1}
    rows = {n: [[{"rank": r} | (done if n != "random" else {})] * 4] for n, r in ranks.items()}  # fmt: skip
    text = ev.table(ev.summarize(rows, samples, args))
    tail = text.partition("N@10 of rta minus each other row (paired):\n")[2].splitlines()  # fmt: skip
    assert [line.split()[:2] for line in tail] == [["random", "+0.500"], ["frozen", "+0.369"]]  # fmt: skip
