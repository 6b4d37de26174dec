"""eval.py: metrics and intervals by hand, rows that resume, probes, and one whole evaluation of a small shop."""

import argparse
import collections
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from safetensors.torch import save_file

import eval as ev
from data import Dataset, Item, Sample
from model import ModelError, save_policy
from rollout import ALL_TOOLS, Task, append, demonstrate, observe
from sasrec import SASRec
from train import parse_args

TINY = pathlib.Path(ev.HERE / "assets" / "tiny-agent")


# ------------------------------------------------------------------------------------------------ metrics and intervals


def test_metrics_of_two_seeds_are_averaged_for_each_sample():
    lines = [[{"rank": r} for r in part] for part in ((1, 4, None), (2, 4, 11))]
    assert ev.column(lines, "hit@1", 10).tolist() == [0.5, 0, 0]
    mrr = ev.column(lines, "mrr", 10)
    assert mrr.tolist() == [0.75, 0.25, 0]  # beyond k: not ranked
    wanted = [(1 + 1 / np.log2(3)) / 2, 1 / np.log2(5), 0]
    assert np.allclose(ev.column(lines, "ndcg@5", 10), wanted)


def test_users_are_resampled_not_samples_and_differences_are_paired():
    """99 samples of one user and one of another: a resample holds both, or one of them alone."""
    users, values = np.array([0] * 99 + [1]), np.array([0.0] * 99 + [1.0])
    columns = {"a": values, "b": values + 1, "b-a": np.ones(100)}
    found = ev.intervals(columns, users, resamples=1000)
    assert found["a"] == {"mean": 0.01, "lo": 0.0, "hi": 1.0}
    assert found["b"] == {"mean": 1.01, "lo": 1.0, "hi": 2.0}
    assert found["b-a"] == {"mean": 1.0, "lo": 1.0, "hi": 1.0}


def test_item_knn_by_hand():
    """Users 0 and 1 bought items 0 and 1, user 2 item 1 alone; what user 0 buys after train_end does not count."""
    user, item = np.array([0, 0, 1, 1, 2, 0, 2]), np.array([0, 1, 0, 1, 1, 2, 2])
    items = [Item(str(i), str(i)) for i in range(3)]
    time = np.arange(7)
    ds = Dataset("hand", items, ["u", "v", "w"], user, item, np.full(7, 5), time)
    ds.splits["valid"] = [Sample(5, 0, 5, (1, 2), 1)]
    sample = Sample(6, 2, 6, (0, 2), 1)  # user 2 has bought item 1
    assert np.allclose(ev.item_knn(ds, [sample]), [[2 / np.sqrt(3 * 2), 0]])


@pytest.mark.parametrize(("scale", "power", "near"), [(1, 1, 0.2), (3, 16, 1)])
def test_learned_fusion_minimises_its_loss(scale, power, near):
    """Targets drawn from a softmax of known weights: they are found, and any step away raises the loss.

    Whole Newton steps diverge on rare high scores (power 16), as on those of the bundled shop's user profile.
    """
    rng = np.random.default_rng(0)
    scores, true = rng.random((4000, 3, 20)) ** power, scale * np.array([3, 0, -2])
    noise = rng.gumbel(size=(4000, 20))
    targets = (np.einsum("ntc,t->nc", scores, true) + noise).argmax(1)
    found = ev.fit_fusion(scores, targets)
    assert np.allclose(found, true, atol=near)

    def loss(weights):
        logits = np.einsum("ntc,t->nc", scores, weights)
        chosen = logits[np.arange(4000), targets]
        nll = np.log(np.exp(logits).sum(1)) - chosen
        return nll.mean() + 1e-4 * (weights**2).sum()

    for step in 1e-3 * np.concatenate([np.eye(3), -np.eye(3)]):
        assert loss(found + step) > loss(found)


def test_best_subset_leaves_out_what_misleads():
    """Two tools score the target higher by chance, one says nothing, one misleads; the fifth says what the first says."""
    rng = np.random.default_rng(0)
    targets = rng.integers(20, size=500)
    positive = np.eye(20)[targets]
    noise = rng.random((5, 500, 20))
    noise[4] = noise[0]  # halves what the second tool is worth
    strength = np.array([0.5, 0.5, 0, -0.5, 0.2])[:, None, None]
    scores = (noise + strength * positive).swapaxes(0, 1)
    scores[:, 2] = 0.3  # equal for all: no harm, no use; the larger subset wins the tie
    assert ev.best_subset(scores, targets).tolist() == [1, 1, 1, 0, 0]
    one = np.array([[[0.2] * 20, [0.1] * 19 + [0.9]]])
    assert ev.best_subset(one, np.array([19])).tolist() == [1, 1]
    assert ev.best_subset(one, np.array([0])).tolist() == [1, 0], "a tie is better"


@pytest.mark.parametrize(
    ("a", "b", "tau"),
    [
        ([1, 2, 3], [1, 2, 3], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        ([3], [3], 1),
        ([1, 2], [1, 3], 1 / 3),  # 2 and 3 each tie for the other's last place
    ],
)
def test_kendall(a, b, tau):
    assert ev.kendall(a, b) == pytest.approx(tau)


def test_reshuffled_keeps_candidates_and_positive(world):
    s = world.splits["test"][0]
    other = ev.reshuffled(s)
    assert other.candidates != s.candidates
    assert sorted(other.candidates) == sorted(s.candidates)
    assert other.candidates[other.target] == s.candidates[s.target]


def test_a_copied_order_is_told_from_a_fused_one(policy, ctx):
    """A demonstration with one list copies it; with one digit changed in what was shown it no longer does."""
    found = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        t = demonstrate(policy, ctx, Task(ctx.ds.splits["train"][seed]), 10, rng, 1)
        text = policy.decode(t.ids)
        line = {"valid": True, "text": text, "answer": t.answer}
        if len(t.calls) == 1 and re.match(r"\d+:\d", text.rsplit("\n", 1)[-1]):
            assert ev.copied_tool(line) == t.calls[0].name
            found.add(t.calls[0].name)
            swapped = line | {"answer": [t.answer[1], t.answer[0], *t.answer[2:]]}
            assert ev.copied_tool(swapped) is None
            assert ev.copied_tool(line | {"valid": False}) is None
    assert len(found) > 2


# ------------------------------------------------------------------------------------------------------- kept trajectories


@pytest.fixture
def args(tmp_path, ctx):
    save_file(ctx.sasrec.state_dict(), tmp_path / "sasrec.safetensors")
    return argparse.Namespace(
        out=tmp_path, k=10, bonus=0.1, temperature=1.0, max_new_tokens=12,
        dtype="float32", device="cpu", slots=4, seeds=[0], greedy_answer=False,
        cuda_graphs=False,
    )  # fmt: skip


class Counts(list):
    def __init__(self):
        super().__init__()
        self.temperatures = []


@pytest.fixture
def rolled(monkeypatch):
    """How many tasks each rollout was given."""
    counts, real = Counts(), ev.rollout

    def counting(policy, ctx, tasks, **how):
        counts.append(len(tasks))
        counts.temperatures.append(how["temperature"])
        return real(policy, ctx, tasks, **how)

    monkeypatch.setattr(ev, "rollout", counting)
    return counts


def test_only_what_is_missing_is_sampled(args, ctx, policy, rolled):
    save_policy(policy, args.out / "agent")
    agent = ev.Agent("frozen", str(args.out / "agent"))
    tasks = [Task(s) for s in ctx.ds.splits["test"][:3]]
    first = ev.play(args, ctx, agent, tasks[:2], 0)
    (file,) = (args.out / "rows").iterdir()
    torn = file.read_text()
    file.write_text(torn[: len(torn) - 40])  # killed while it wrote the second line
    again = ev.play(args, ctx, agent, tasks, 0)
    assert rolled == [2, 2]
    assert [x["text"] for x in again[:2]] == [x["text"] for x in first]
    assert [x["sample"] for x in again] == [t.sample.id for t in tasks]
    ev.play(args, ctx, agent, tasks, 0)
    assert rolled == [2, 2]
    ev.play(args, ctx, agent, [Task(ev.reshuffled(tasks[0].sample))], 0)
    ev.play(args, ctx, agent, tasks[:1], 1)  # another seed
    args.temperature = 0.5
    ev.play(args, ctx, agent, tasks[:1], 0)
    args.greedy_answer = True
    ev.play(args, ctx, agent, tasks[:1], 0)
    assert rolled == [2, 2, 1, 1, 1, 1]


def test_a_retrained_checkpoint_is_evaluated_again(args, ctx, policy, rolled):
    agent = ev.Agent("rta", str(args.out / "rta"))
    tasks = [Task(ctx.ds.splits["test"][0])]
    for _ in range(2):
        save_policy(policy, args.out / "rta")
        ev.identity.cache_clear()
        ev.play(args, ctx, agent, tasks, 0)
        next(policy.model.parameters()).data += 0.1
    assert rolled == [1, 1]


def test_edited_code_evaluates_again(args, ctx, policy, rolled, monkeypatch, tmp_path):
    save_policy(policy, args.out / "agent")
    agent = ev.Agent("frozen", str(args.out / "agent"))
    for name in ev.CODE:
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(ev, "HERE", tmp_path)
    for text in ("", "", "K = 3"):
        (tmp_path / "tools.py").write_text(text)
        ev.identity.cache_clear()
        ev.play(args, ctx, agent, [Task(ctx.ds.splits["test"][0])], 0)
    assert rolled == [1, 1]


def test_a_tool_that_is_off_says_so_and_costs_no_format(ctx, policy, world):
    from rollout import ALL_TOOLS, Trajectory, act

    t = Trajectory(Task(world.splits["test"][0]), [])
    call = '<think>x</think><tool_call>{"name": "get_user_profile", "arguments": {}}'
    shown = act(ctx, t, call + "</tool_call>", ALL_TOOLS)
    ctx.unavailable = ("get_user_profile",)
    try:
        off = act(ctx, t, call + "</tool_call>", ALL_TOOLS)
    finally:
        ctx.unavailable = ()
    # the form that the agent knows: without the scores it asks again until its tokens are used up
    alike = " ".join(f"{n}:0" for n in range(1, 21))
    assert off == f"not available now\n{alike}" and "not available" not in shown
    assert not t.malformed and len(t.calls) == 2 and t.tool_seconds > 0
    append(t, observe(policy, off))
    assert not any(t.action_mask)


def test_agents_of_a_run_trained_without_tools(tmp_path):
    """Its stage 1 is row "r", without tools, in its own evaluation and beside another run's."""
    for name, flags in (
        ("a", {}),
        ("b", {"no_tools": True}),
        ("c", {"no_tools": True}),
    ):
        (tmp_path / name / "rta").mkdir(parents=True)
        config = {"args": {"model": "x", **flags}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    names = {}
    for name, models in (("a", ["b"]), ("b", ["a"]), ("a", ["b", "c"])):
        config = json.loads((tmp_path / name / "config.json").read_text())
        args = argparse.Namespace(
            out=tmp_path / name, models=[tmp_path / m for m in models], agent=["react"]
        )
        agents = ev.run_agents(args, config)
        names[name, *models] = {a.name: len(a.tools) for a in agents}
    n = len(ALL_TOOLS)
    frozen = {"frozen_r": 0, "frozen": n}
    assert names["a", "b"] == frozen | {"rta": n, "r": 0}
    assert names["b", "a"] == frozen | {"r": 0, "model:a/rta": n}
    assert names["a", "b", "c"] == frozen | {"rta": n, "r": 0, "model:c/rta": 0}


def test_models_of_equal_names_keep_rows_of_their_own(tmp_path):
    models = [tmp_path / "1/run", tmp_path / "2/run"]
    for model in models:
        (model / "rta").mkdir(parents=True)
    args = argparse.Namespace(out=tmp_path, models=models, agent=["react"])
    found = [a.name for a in ev.run_agents(args, {"args": {"model": "x"}})]
    assert found[-2:] == ["model:run/rta", f"model:{models[1] / 'rta'}"]


def test_the_frozen_agent_has_the_tools_that_training_had(tmp_path):
    (tmp_path / "rta").mkdir()
    config = {"args": {"model": "x", "without_tool": ["get_user_profile"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = argparse.Namespace(out=tmp_path, models=[], agent=["react"])
    tools = {a.name: len(a.tools) for a in ev.run_agents(args, config)}
    n = len(ALL_TOOLS) - 1
    assert tools == {"frozen_r": 0, "frozen": n, "rta": n}


def test_probes_and_figures_need_all_rows(monkeypatch, capsys):
    for flag in ("--probes", "--plot"):
        argv = ["eval.py", "runs/x", "--rows", "itemknn", flag]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit):
            ev.parse_args()
        assert "need all rows" in capsys.readouterr().err


def test_show_prints_trajectories_and_nothing_else(monkeypatch, capsys):
    for flag in ("--probes", "--plot"):
        monkeypatch.setattr(sys, "argv", ["eval.py", "runs/x", "--show", "2", flag])
        with pytest.raises(SystemExit):
            ev.parse_args()
        assert "print trajectories only" in capsys.readouterr().err


def test_show_takes_the_agent_that_rows_names(monkeypatch, ctx):
    agents = [ev.Agent(name, "x", ()) for name in ("frozen", "rta", "ppr")]
    config, asked = {"args": {"profiles": "template"}}, []
    monkeypatch.setattr(ev, "load", lambda args: (config, ctx))
    monkeypatch.setattr(ev, "run_agents", lambda args, config: agents)
    monkeypatch.setattr(ev, "play", lambda args, ctx, agent, tasks, seed: tasks)
    monkeypatch.setattr(ev, "show", lambda name, lines: asked.append((name, len(lines))))  # fmt: skip
    for rows in ([], ["--rows", "frozen"], ["--rows", "titles", "rta"]):
        argv = ["eval.py", "runs/x", "--samples", "50", "--show", "3", *rows]
        monkeypatch.setattr(sys, "argv", argv)
        ev.main()
    assert asked == [("ppr", 3), ("frozen", 3), ("rta", 3)]
    monkeypatch.setattr(sys, "argv", [*argv[:-2], "titles"])
    with pytest.raises(ModelError, match="no agent titles; there are frozen rta ppr"):
        ev.main()


def test_user_shows_all_of_a_users_samples(monkeypatch, ctx, capsys):
    """However few --samples are evaluated; and profiles that no model has written are counted."""
    agents, pool = [ev.Agent(x, "x", ()) for x in ("frozen", "rta")], ctx.ds.splits["test"]  # fmt: skip
    config = {"args": {"profiles": "llm"}}
    line = {"positive": 3, "title": "Pen", "rank": 1, "reward": 1.1, "end": "answer", "prompt": "Rank.", "text": ""}  # fmt: skip

    def play(args, ctx, agent, tasks, seed):
        return [line | {"user": ctx.ds.users[t.sample.user]} for t in tasks]

    monkeypatch.setattr(ev, "load", lambda args: (config, ctx))
    monkeypatch.setattr(ev, "run_agents", lambda args, config: agents)
    monkeypatch.setattr(ev, "play", play)
    ((user, n),) = collections.Counter(s.user for s in pool).most_common(1)
    name, argv = ctx.ds.users[user], ["eval.py", "runs/x", "--samples", "1", "--user"]
    monkeypatch.setattr(sys, "argv", [*argv, name])
    ev.main()
    told = capsys.readouterr().out
    shown = f"=== rta, user {name}, bought 3 (Pen): rank 1, reward 1.100, end: answer\nRank.\n"
    assert told.count(shown) == n > 1
    assert "note: 1 of 1 have the template's profile" in told
    monkeypatch.setattr(sys, "argv", [*argv, "nobody"])
    with pytest.raises(ModelError, match="no sample of the test split is of nobody"):
        ev.main()


@pytest.mark.parametrize("flag", ["--show", "--slots"])
def test_show_and_slots_need_a_number(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["eval.py", "runs/x", flag, "0"])
    with pytest.raises(SystemExit):
        ev.parse_args()
    assert "give a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--temperature nan", "--temperature inf", "--samples -1", "--slots -1"])  # fmt: skip
def test_numbers_must_be_possible(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["eval.py", "runs/x", *flags.split()])
    with pytest.raises(SystemExit):
        ev.parse_args()
    assert "cannot be negative or infinite" in capsys.readouterr().err


def test_several_sampling_seeds_need_a_temperature(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "runs/x", "--seeds", "0", "1"])
    with pytest.raises(SystemExit):
        ev.parse_args()
    assert "--temperature above 0" in capsys.readouterr().err


def test_training_free_agents_are_untrained_models_with_rows_of_their_own(args, ctx, policy, rolled):  # fmt: skip
    save_policy(policy, args.out / "other")
    args.models, args.agent = [args.out / "other"], ["self-inspiring", "plan-first"]
    agents = ev.run_agents(args, {"args": {"model": str(args.out / "other")}})
    other = "/".join((args.out / "other").parts[-2:])
    names = ["frozen_r", "frozen", f"model:{other}", "plan_first", f"plan_first:{other}"]  # fmt: skip
    names += ["self_inspiring", f"self_inspiring:{other}"]
    assert [a.name for a in agents] == names
    ways = [agents[1], *agents[3::2]]
    assert [a.strategy for a in ways] == ["react", "plan-first", "self-inspiring"]
    for agent in ways * 2:
        ev.play(args, ctx, agent, [Task(ctx.ds.splits["test"][0])], 0)
    assert rolled == [1, 1, 1] and len(list((args.out / "rows").iterdir())) == 3
    assert rolled.temperatures == [1.0, 0, 1.0], "InteRecAgent plans greedily"


def test_report_is_escaped_and_small(tmp_path):
    def make(kept):
        return {"texts": {"rta": [{"text": "</script><b>" + "x" * 10**5}] * kept}}

    ev.write_report(tmp_path / "report.html", make)
    page = (tmp_path / "report.html").read_text()
    assert 500_000 < len(page) < 3_000_000
    assert "</script><b>x" not in page and "\\u003c/script>\\u003cb>x" in page


# ---------------------------------------------------------------------------------------------------- a whole evaluation


def test_a_whole_evaluation(monkeypatch, tmp_path, world, ctx, capsys):
    """The bundled agent on a small shop: documented keys, two seeds, probes; the report's payload is JSON."""
    for name in ("sasrec", "sasrec_baseline"):
        weights = SASRec(len(world.items)).state_dict()
        save_file(weights, tmp_path / f"{name}.safetensors")
    flags = ("--slots", "2", "--device", "cpu", "--dtype", "float32")
    settings = vars(parse_args(flags))
    config = {"args": settings, "dataset": "d", "fingerprint": world.fingerprint()}
    config["commit"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(ev, "load_dataset", lambda *_: world)
    flags = (
        "--samples",
        "6",
        "--seeds",
        "0",
        "1",
        "--temperature",
        "1",
        "--probes",
        "3",
    )
    flags += ("--agent", "react", "plan-first")
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path), *flags])
    ev.main()
    result = json.loads((tmp_path / "eval.json").read_text())
    names = ["random", "popularity", "itemknn", "itemknn_popular", "sasrec", "oracle"]
    names += ["fusion", "subset_fusion", "learned_fusion", "titles", "titles_fusion"]
    names += ["frozen_r", "frozen", "plan_first"]
    assert set(names) <= set(result["rows"])
    assert {f"tool:{name}" for name in ALL_TOOLS} <= set(result["rows"])
    assert (result["split"], result["n"], result["k"]) == ("test", 6, 10)
    frozen, knn = result["rows"]["frozen"], result["rows"]["itemknn"]
    assert frozen["hit@1"] == frozen["ndcg@1"] and "mrr" in frozen
    assert 0 < frozen["tool_ms"] < frozen["ms"] and frozen["tool_calls"] > 0
    assert -1 <= frozen["reward"] <= 1.1
    assert result["rows"]["itemknn_popular"] != knn
    gap = result["paired"]["frozen-itemknn"]["ndcg@10"]["mean"]
    assert gap == pytest.approx(frozen["ndcg@10"]["mean"] - knn["ndcg@10"]["mean"])
    assert (
        result["rows"]["plan_first"]["tool_calls"] == 0
    )  # it was never taught to plan
    assert "frozen-plan_first" in result["paired"]
    probes = result["probes"]
    assert set(probes["without_tool"]) == set(ev.ALL_TOOLS)
    assert probes["stability"]["resampled"]["n"] > 0
    assert sum(g["n"] for g in probes["by_position"].values()) == 6
    page = (tmp_path / "report.html").read_text()
    start = page.index('id="payload">') + len('id="payload">')
    assert json.loads(page[start : page.index("</script>", start)])["eval"] == result
    assert "N@10 of frozen minus" in capsys.readouterr().out
    monkeypatch.setattr(ev, "reward", lambda *_: np.float32(0.25))  # a fork's own
    drawn = []
    monkeypatch.setattr(ev, "plot", lambda shown, folder: drawn.append((shown["eval"]["split"], folder)))  # fmt: skip
    flags = ("--samples", "2", "--split", "valid", "--plot")
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path), *flags])
    ev.main()
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    valid = json.loads((tmp_path / "eval-valid.json").read_text())
    assert (valid["split"], valid["rows"]["frozen"]["reward"]) == ("valid", 0.25)
    assert drawn == [("valid", tmp_path / "plots-valid")]
    assert (tmp_path / "report.html").read_text() == page
    assert (tmp_path / "report-valid.html").read_text() != page


def test_figures_lose_no_digit_but_the_leading_zero():
    assert ev.interval({"mean": 0.5, "lo": -0.25, "hi": 10.5}) == ".500 -.250–10.500"


def test_a_tool_written_since_is_no_tool_of_an_older_run(tmp_path):
    config = {"args": {"without_tool": ["get_user_profile"]}}
    config["tools"] = ["get_user_profile", "get_similar_items"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ev.own_tools(tmp_path) == ("get_similar_items",)


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    steps = [
        {"stage": stage, "step": n} | dict.fromkeys(ev.CURVES, n / 10)
        for stage, last in (("rta", 7), ("ppr", 2))
        for n in range(1, last + 1)
    ]
    steps[0]["tool_rate_of_rewarded"] = None  # none was rewarded
    point = {"mean": 0.5, "lo": 0.4, "hi": 0.6}
    rows = {name: {"ndcg@10": point, "hit@1": point} for name in ("random", "rta")}
    ev.plot({"metrics": steps, "eval": {"rows": rows}}, tmp_path / "plots")
    for name in ("curves.png", "comparison.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_figures_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModelError, match="pip install matplotlib"):
        ev.plot({}, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_other_settings_of_another_run_are_told(tmp_path, capsys):
    for name, flags in {"a": {"k": 10}, "b": {"k": 5}}.items():
        (tmp_path / name / "rta").mkdir(parents=True)
        config = {"args": {"model": "x", **flags}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    models = [tmp_path / "b", tmp_path / "b" / "rta"]
    args = argparse.Namespace(out=tmp_path / "a", models=models, agent=["react"])
    ev.run_agents(args, {"args": {"model": "x", "k": 10}})
    note = f"note: {tmp_path / 'b'} was trained with k 5; here it is 10\n"
    assert capsys.readouterr().out == 2 * note


def test_the_row_without_tools_is_stage_1s(tmp_path):
    for stage in ("rta", "ppr"):
        (tmp_path / "b" / stage).mkdir(parents=True)
    config = {"args": {"model": "x", "no_tools": True}}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    args = argparse.Namespace(out=tmp_path, models=[tmp_path / "b"], agent=["react"])
    agents = {a.name: a.path for a in ev.run_agents(args, {"args": {"model": "x"}})}
    assert agents["r"] == str(tmp_path / "b" / "rta")


def test_a_misspelt_model_is_named_before_anything_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "cached_file", lambda *_: pathlib.Path("nowhere").stat())
    agents = [ev.Agent("model:runs/nope", "runs/nope", ())]
    args = argparse.Namespace(rows=None, out=tmp_path)
    with pytest.raises(ev.ModelError, match="runs/nope: no such folder"):
        ev.evaluate(args, None, agents, [])


def test_another_runs_profiles_are_told_apart(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"args": {"profiles": "llm"}}))
    ev.note_differences({"profiles": "template"}, tmp_path)
    expected = "was trained with profiles llm; here it is template"
    assert expected in capsys.readouterr().out


def test_pairs_are_asked_of_the_runs_own_stage_1(world, tmp_path, monkeypatch):
    """Without tools it is called r; beside rta an r is another run's; a stage 2 alone began with the frozen agent."""
    sample = world.splits["train"][0]
    pair = {"sample": sample.id, "positive": 1, "negative": 2, "rank": 3}
    (tmp_path / "hard_pairs.jsonl").write_text(json.dumps(pair) + "\n")
    monkeypatch.setattr(ev, "play", lambda args, ctx, agent, tasks, seed: tasks)
    args = argparse.Namespace(out=tmp_path, seeds=[0])
    ctx = argparse.Namespace(ds=world)
    for names, asked in (
        (("r", "ppr"), ["r", "ppr"]),
        (("r", "rta", "ppr"), ["rta", "ppr"]),
        (("ppr",), ["frozen", "ppr"]),
    ):
        agents = [ev.Agent(name, "x", ()) for name in ("frozen", *names)]
        assert list(ev.ask_pairs(args, ctx, agents)) == asked
