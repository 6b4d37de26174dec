"""The driver on a miniature world: learning, exact resume, stopping, the run folder and its refusals."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from rank import shrink
from safetensors.torch import load_file
from torch.optim import Muon

import train
from data import Sample, history
from grpo import Objective
from model import Float32Muon
from rollout import Task, Trajectory, add_up, find_series, parse_answer
from sasrec import SASRec

SAMPLE = Sample(0, 0, 0, tuple(range(20)), 0)


@pytest.fixture
def small(monkeypatch):
    """A 150-user shop and one epoch of SASRec in place of the bundled world's sizes."""
    shrink(monkeypatch.setattr)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    train.main()


SHORT = (
    "--dtype",
    "float32",
    "--batch",
    2,
    "--group-size",
    4,
    "--no-eval",
    "--max-new-tokens",
    600,
    "--mine-samples",
    12,
    "--temperature",
    1.5,  # the agent as it comes mostly answers at once: groups should differ
)


def read_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(x).items() if "seconds" not in k} for x in lines
    ]


@pytest.mark.parametrize(
    "more",
    [(), ("--lora-rank", 4, "--lr", 1e-3, "--grad-checkpoint")],
    ids=["plain", "adapters"],
)
def test_resume_continues_exactly(small, monkeypatch, tmp_path, capsys, more):
    """Both stages, stopped by SIGTERM in each: weights and metrics equal the uninterrupted run's."""
    flags = (*SHORT, "--steps", 3, "--ppr-steps", 2, "--save-every", 1, *more)
    run_main(monkeypatch, *flags, "--out", tmp_path / "whole")
    step = train.grpo_step

    def stopping(run, stage, number):
        if (stage, number) in ((("rta"), 1), ("ppr", 0)):
            signal.raise_signal(signal.SIGTERM)
        return step(run, stage, number)

    monkeypatch.setattr(train, "grpo_step", stopping)
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *flags, "--out", tmp_path / "parts")
    assert stopped.value.code == 143
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--resume", tmp_path / "parts")
    monkeypatch.setattr(train, "grpo_step", step)
    config = json.loads((tmp_path / "parts/config.json").read_text())
    del config["args"]["teach_form"]  # as if the run were older than the flag
    (tmp_path / "parts/config.json").write_text(json.dumps(config))
    run_main(monkeypatch, "--resume", tmp_path / "parts")
    assert "started without --teach-form; now it is True" in capsys.readouterr().out
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    for stage in ("rta", "ppr"):
        a = load_file(tmp_path / "whole" / stage / "model.safetensors")
        b = load_file(tmp_path / "parts" / stage / "model.safetensors")
        assert all(torch.equal(a[k], b[k]) for k in a)
        start = load_file(train.HERE / "assets/tiny-agent/model.safetensors")
        assert a.keys() == start.keys(), "adapters are merged"
        assert any(not torch.equal(a[k], start[k]) for k in a)
    rates = [m["lr"] for m in read_metrics(tmp_path / "whole")]
    lr = 1e-3 if more else 2e-4  # rises over five steps, decays to zero in each stage
    assert rates == pytest.approx([lr / 5, 2 * lr / 5, lr / 3, 1e-5, 2e-5], rel=1e-5)
    more = ("--slots", 3, "--micro-tokens", 500)  # what changes memory only
    run_main(monkeypatch, "--resume", tmp_path / "parts", *more)
    args = json.loads((tmp_path / "parts/config.json").read_text())["args"]
    assert (args["slots"], args["micro_tokens"], args["batch"]) == (3, 500, 2)


def test_metrics_have_the_documented_fields(small, monkeypatch, tmp_path):
    rates = ("--lr", 1e-8, "--ppr-lr", 1e-8)  # small numbers are not rounded away
    flags = (*SHORT, "--steps", 1, "--ppr-steps", 1, *rates)
    run_main(monkeypatch, *flags, "--out", tmp_path / "r")
    documented = (
        "stage step reward_mean reward_std ndcg@10 hit@1 hit@10 valid tool_calls tool_rate_of_rewarded "
        "zero_variance_groups dropped_groups kl_sampler_trainer entropy grad_norm lr tokens seconds_rollout "
        "seconds_update"
    )
    for text in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert line.keys() >= set(documented.split())
        assert line["kl_sampler_trainer"] < 1e-4
        assert line["lr"] == 2e-9, "a fifth, in the first step"
    assert train.rounded(float("nan")) is None and train.rounded(7) == 7, (
        "JSON has none"
    )
    bound = ("--ppr-objective", "logistic", "--list-share", 0, "--steps", 0)
    run_main(monkeypatch, *flags, *bound, "--out", tmp_path / "b")
    line = json.loads((tmp_path / "b" / "metrics.jsonl").read_text())
    assert line.keys() >= set(documented.split()) and line["bound"] > 0
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["args"]["steps"] == 1
    assert config["fingerprint"]
    for name in (
        "rta/model.safetensors",
        "ppr/config.json",
        "hard_pairs.jsonl",
        "trajectories.jsonl",
    ):
        assert (tmp_path / "r" / name).stat().st_size > 0


def test_reward_rises_in_a_miniature_run(small, monkeypatch, tmp_path):
    """The agent hardly calls at first; eight updates measurably teach it that calls pay."""
    flags = ("--batch", 8, "--group-size", 8, "--steps", 8, "--lr", 4e-4)
    run_main(
        monkeypatch, *flags, "--no-eval", "--stage", "rta", "--out", tmp_path / "r"
    )
    lines = read_metrics(tmp_path / "r")
    rewards, calls = ([m[x] for m in lines] for x in ("reward_mean", "tool_calls"))
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    assert calls[-1] > 3 * calls[0]


def test_a_run_folder_is_never_clobbered(small, monkeypatch, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "precious").write_text("x")
    with pytest.raises(train.ModelError, match="--overwrite"):
        run_main(monkeypatch, *SHORT, "--out", tmp_path / "r")
    assert (tmp_path / "r" / "precious").exists()
    with pytest.raises(train.ModelError, match="is no run folder"):
        run_main(monkeypatch, *SHORT, "--out", tmp_path / "r", "--overwrite")
    # every Hugging Face folder has a config.json: that alone is no reason to delete it
    (tmp_path / "r" / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(train.ModelError, match="is no run folder"):
        run_main(monkeypatch, *SHORT, "--out", tmp_path / "r", "--overwrite")
    with pytest.raises(train.ModelError, match="no config.json of a run"):
        run_main(monkeypatch, "--resume", tmp_path / "r")
    (tmp_path / "r" / "config.json").write_text('{"args": {}}')
    bad = ("--out", tmp_path / "r", "--overwrite", "--model", "assets/tiny-agnet")
    with pytest.raises(train.ModelError, match="tiny-agnet: cannot be loaded"):
        run_main(monkeypatch, *SHORT, *bad)
    own = ("--out", tmp_path / "r", "--overwrite", "--model", tmp_path / "r" / "rta")
    with pytest.raises(train.ModelError, match="--overwrite would delete .*rta"):
        run_main(monkeypatch, *SHORT, *own)
    assert (tmp_path / "r" / "precious").exists()


def test_a_run_without_git_is_moved_and_resumed(small, monkeypatch, tmp_path):
    """A new agent's start is looked for in the run's own folder; git is only asked for the commit."""
    step = train.warmup_step

    def stopping(run, number):
        signal.raise_signal(signal.SIGTERM)
        return step(run, number)

    flags = ("--stage", "warmup", "--width", 64, "--layers", 1, "--warmup-steps", 2)
    flags += ("--batch", 2, "--group-size", 1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("PATH", "")
        patch.setattr(train, "warmup_step", stopping)
        run_main(patch, *flags, "--out", tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["commit"] is None
    del config["args"]["ask_again"]  # as if the run were older than the flag
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    (tmp_path / "r").rename(tmp_path / "moved")
    run_main(monkeypatch, "--resume", tmp_path / "moved")
    assert [m["step"] for m in read_metrics(tmp_path / "moved")] == [1, 2]
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert config["args"]["ask_again"] == 0.0, "eval.py reads it there"


def test_without_hard_pairs_stage_2_is_left_out(small, monkeypatch, tmp_path, capsys):
    """An agent that ranks every positive first has learned all that it can be asked: no error, stage 1 stands."""
    monkeypatch.setattr(train, "mine", lambda *_: [])
    flags = (*SHORT, "--steps", 1, "--ppr-steps", 1)
    run_main(monkeypatch, *flags, "--out", tmp_path / "r")
    run_main(monkeypatch, "--resume", tmp_path / "r")
    told = "".join(capsys.readouterr())
    assert "stage 2 is left out: the policy ranked every positive first" in told
    assert (tmp_path / "r" / "rta").is_dir() and not (tmp_path / "r" / "ppr").exists()
    assert [m["stage"] for m in read_metrics(tmp_path / "r")] == ["rta"]


def test_a_resumed_run_takes_newer_flags_from_its_own_preset(monkeypatch, tmp_path):
    paper = {"preset": "paper", "model": "x"}  # as if list_share were newer
    (tmp_path / "config.json").write_text(json.dumps({"args": paper}))
    seen = []
    monkeypatch.setattr(train, "open_run", lambda args: seen.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, "--resume", tmp_path)
    assert (seen[0].list_share, seen[0].greedy_answer, seen[0].model) == (0, False, "x")


def test_adapters_of_the_papers_preset_learn_faster():
    """At its 1e-6 nearly all merged weights would stay the same numbers in bf16."""
    flags = ["--preset", "paper", "--lora-rank", "4"]
    args = train.parse_args([*flags, "--ppr-lr", "3e-5"])
    assert (args.lr, args.ppr_lr, args.warmup_lr) == (1e-4, 3e-5, 1e-4)
    assert train.parse_args(flags[:2]).lr == 1e-6
    assert train.parse_args(flags[2:]).lr == 2e-4


def test_a_new_agent_is_warmed_up_at_length_however_it_is_asked_for():
    for flags in (
        ["--stage", "warmup"],
        ["--stage", "warmup", "--model", "new"],
        ["--stage", "warmup", "--model", "new", "--warmup-steps", "4500"],
        ["--model", "new"],
    ):
        args = train.parse_args(flags)
        found = args.model, args.warmup_steps, args.exercise_steps
        assert found == ("new", 4500, 750), flags
    args = train.parse_args(["--model", "new", "--warmup-steps", "60"])
    assert (args.warmup_steps, args.exercise_steps) == (60, 10)
    args = train.parse_args(["--model", "x", "--warmup-steps", "60"])
    assert (args.warmup_steps, args.exercise_steps) == (60, 0)


def test_bfloat16_is_for_machines_that_multiply_it(monkeypatch):
    able = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | able)
    assert train.parse_args(["--device", "cpu"]).dtype == "float32"
    able["avx512_bf16"] = True
    assert train.parse_args(["--device", "cpu:0"]).dtype == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for there, dtype in (True, "bfloat16"), (False, "float32"):
        supported = MagicMock(return_value=there)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert train.parse_args(["--device", "cuda:0"]).dtype == dtype
        supported.assert_called_with(including_emulation=False)


def test_the_tools_sasrec_is_fitted_before_the_agents_training_samples(world, monkeypatch, tmp_path):  # fmt: skip
    fits = []

    def fit(ds, end, progress):
        fits.append((end, progress))
        return SASRec(2)

    monkeypatch.setattr(train, "train_sasrec", fit)
    args = train.parse_args(["--without-tool", "get_similar_items"])
    args.resumed = False
    train.prepare(args, tmp_path / "r", world)
    assert fits == [(world.fit_end, "training sasrec")]
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (
        len(config["tools"]) == len(train.ALL_TOOLS) - 1
        and "get_similar_items" not in config["tools"]
    )


def test_a_rank_rewards_what_it_sampled_before_all_get_it(world, ctx, policy, monkeypatch, tmp_path):  # fmt: skip
    """A reward that is not the same twice (a judge) would give each rank a gradient of its own."""
    args = train.parse_args(["--max-new-tokens", "8"])
    run, seen = train.Run(args, tmp_path, world, ctx, policy), []

    def gather(own):
        seen.extend(t.reward for group in own for t in group)
        return [own]

    monkeypatch.setattr(train, "reward", lambda ctx, t, k, bonus: 7)
    monkeypatch.setattr(train, "gather_list", gather)
    tasks = [train.Task(s) for s in world.splits["train"][:2]]
    train.sample_groups(run, tasks, (0,), 2, 3)
    assert seen == [7.0] * 6


def test_no_rankings_are_asked_for_without_a_share(world, tmp_path):
    args = train.parse_args(["--batch", "5", "--list-share", "0"])
    run = train.Run(args, tmp_path, world, None, None)
    samples = world.splits["train"][:9]
    run.pairs = [train.HardPair(s.id, s.target + 1, 3, 3) for s in samples]
    assert all(task.pair for task in train.stage_tasks(run, "ppr", 0))


def test_no_ranking_is_asked_for_twice_in_a_step(world, tmp_path):
    """Equal tasks have equal seeds: their groups would be the same trajectories."""
    args = train.parse_args(["--batch", "24"])
    run = train.Run(args, tmp_path, world, None, None)
    samples = world.splits["train"][:9]
    run.pairs = [train.HardPair(s.id, s.target + 1, 3, 3) for s in samples]
    for step in range(40):
        tasks = train.stage_tasks(run, "ppr", step)
        keys = [task.key for task in tasks]
        assert len(keys) == len(set(keys)) == 24


@pytest.mark.parametrize("n_pairs", [1, 4, 7, 30])
def test_rankings_keep_their_share_where_pairs_are_few(world, n_pairs, tmp_path):
    args = train.parse_args([])
    run = train.Run(args, tmp_path, world, None, None)
    samples = [world.splits["train"][i] for i in range(n_pairs)]
    run.pairs = [
        train.HardPair(s.id, s.target + 1, 20 - s.target % 20, 3) for s in samples
    ]
    for step in range(3):
        tasks = train.stage_tasks(run, "ppr", step)
        questions = [t for t in tasks if t.pair]
        rankings = [t for t in tasks if not t.pair]
        assert (len(questions), len(rankings)) == (2 * min(3, n_pairs), 6)
        own = {t.sample.id for t in rankings} & {s.id for s in samples}
        assert len(own) >= min(6, max(0, n_pairs - 3))


@pytest.mark.parametrize(
    "flags",
    [
        ("--group-size", "1"),
        ("--lr", "-1"),
        ("--k", "21"),
        ("--temperature", "0"),
        ("--ask-again", "2"),
        ("--steps", "x"),
    ],
)
def test_impossible_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_args(list(flags))
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        ("", {}),
        ("--baseline loo", {"baseline": "loo"}),
        ("--divide-by-std", {"divide_by_std": True}),
        ("--token-mean", {"token_mean": True}),
        ("--keep-negative-groups", {"drop_negative": False}),
        ("--no-teach-form", {"teach_form": False}),
    ],
)
def test_each_variants_flag_reaches_the_estimator(monkeypatch, tmp_path, flags, change):
    seen = []

    def watching(policy, groups, objective, *_):
        seen.append(objective)
        return {}

    monkeypatch.setattr(train, "policy_gradient", watching)
    run = train.Run(train.parse_args(flags.split()), tmp_path, None, None, None)
    train.backward(run, [[Trajectory(Task(SAMPLE), [0])]])
    assert seen == [replace(Objective(), **change)]


def test_a_run_is_evaluated_before_and_after_and_a_warm_up_is_not(small, monkeypatch):
    """Nor does a warm-up have profiles written: its demonstrations show the template's."""
    done = []

    def open_run(args):
        policy = SimpleNamespace(model=torch.nn.Linear(1, 1), device="cpu")
        return SimpleNamespace(stage="", out=args.out, policy=policy)

    def command(words, check):
        done.append(" ".join(words[3:]))  # behind python, eval.py and the folder
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(train, "open_run", open_run)
    monkeypatch.setattr(train, "write_profiles", lambda run: done.append("profiles"))
    monkeypatch.setattr(train, "train_stage", lambda run, stage: done.append(stage))
    monkeypatch.setattr(train.subprocess, "run", command)
    before, after = "--samples 500 --rows frozen", "--samples 500"
    for stage, wanted in (
        ("rta", ["profiles", before, "rta", after]),
        ("all", ["profiles", before, "rta", "ppr", after]),
        ("warmup", ["warmup"]),
    ):
        done.clear()
        run_main(monkeypatch, "--stage", stage, "--profiles", "llm")
        assert done == wanted
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(train.ModelError, match="try: python eval.py runs/office-0"):
        run_main(monkeypatch, "--stage", "rta")


def test_an_epoch_goes_through_all_samples_and_all_questions(world, tmp_path):
    args = train.parse_args(["--preset", "paper", "--batch", "8"])
    run = train.Run(args, tmp_path, world, None, None)
    samples = world.splits["train"]
    epoch = len(samples) // 8
    assert train.stage_steps(run, "rta") == 3 * epoch
    tasks = [train.stage_tasks(run, "rta", step) for step in range(2 * epoch)]
    ids = [t.sample.id for some in tasks for t in some]
    first, second = ids[: 8 * epoch], ids[8 * epoch :]
    assert len(set(first)) == len(set(second)) == 8 * epoch and first != second
    run.pairs = [train.HardPair(s.id, 1, 2, 2) for s in samples[:20]]
    assert train.stage_steps(run, "ppr") == 40 / 8
    args.list_share = 0.5
    assert train.stage_steps(run, "ppr") == 40 / 4
    args.ppr_directions = "more"
    assert train.stage_steps(run, "ppr") == 20 / 4


@pytest.mark.parametrize(
    ("device", "dtype", "kind"),
    [
        ("cpu", "float32", Float32Muon),
        ("cpu:0", "float32", Float32Muon),
        ("cpu", "bfloat16", Muon),
        ("cuda", "float32", Muon),
    ],
)
def test_a_warm_up_has_muon_for_the_layers_matrices(policy, tmp_path, device, dtype, kind):  # fmt: skip
    """In float32 where bfloat16 would be emulated; embeddings and norms are AdamW's."""
    args = train.parse_args(["--stage", "warmup", "--device", device, "--dtype", dtype])
    run = train.Run(args, tmp_path, None, None, policy)
    muon, adam = train.make_optimizers(run, "warmup")
    assert type(muon) is kind
    matrices, rest = ([p for g in x.param_groups for p in g["params"]] for x in (muon, adam))  # fmt: skip
    assert [p.ndim for p in matrices] == [2] * 7 * 2
    table = policy.model.get_input_embeddings().weight
    assert [p is table for p in rest if p.ndim == 2] == [True]


def test_help_tells_defaults_that_are_zero_too(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for text in (
        "samples and SASRec stay the same (default: 0)",
        "again with a chance of 1/2 (default: 0.0)",
        "which stages to run (default: all)",
        "steps of stage 1 (tiny: 24)",
    ):
        assert text in told
    assert "default: False" not in told and "default: None" not in told


def test_memory_is_told_and_nothing_is_begun(monkeypatch, capsys):
    parts = ("weights", "bf16 copy", "keys, values", "peak")
    monkeypatch.setattr(train, "memory_need", lambda *_: dict.fromkeys(parts, 2.0))
    monkeypatch.setattr(train, "open_run", lambda args: pytest.fail("a run was begun"))
    run_main(monkeypatch, "--preset", "paper", "--memory")
    head, _, first, *others = capsys.readouterr().out.splitlines()
    assert head.endswith("| peak | evaluation |") and len(others) == 7
    assert first == "| Qwen3-0.6B | 1 GPU | 2 | 2 | 2 | 2 | 4 |"


def test_epochs_decide_unless_steps_are_given():
    assert train.parse_args([]).steps == 24
    args = train.parse_args(["--epochs", "2"])
    assert (args.steps, args.epochs, args.ppr_steps) == (None, 2, 6)
    both = train.parse_args(["--preset", "paper", "--steps", "7"])
    assert both.steps == 7


def test_without_tools_the_answer_is_sampled():
    """Nothing else is left to chance, so that a greedy answer would leave nothing to learn."""
    assert train.parse_args([]).greedy_answer
    assert not train.parse_args(["--no-tools"]).greedy_answer
    none = [x for name in train.ALL_TOOLS for x in ("--without-tool", name)]
    assert not train.parse_args(none).greedy_answer
    assert train.parse_args(["--no-tools", "--greedy-answer"]).greedy_answer


def test_the_warm_up_stresses_the_end_of_pairs(small, monkeypatch, tmp_path):
    seen, original = [], train.accumulate

    def watching(policy, prompts, rows, weights, *more, **how):
        at = 0
        for row in rows:
            ids = [i for i, m in zip(row.ids, row.action_mask) if m]
            ending = ids[ids.index(policy.encode("<answer>")[0]) :]
            pair = re.fullmatch(
                r"<answer>\d+:\d+ \d+:\d+ [AB]>[AB]; (MORE|LESS)=([AB]) \\boxed{\2}</answer>",
                policy.decode(ending),
            )
            seen.append((bool(pair), len(ending), weights[at : at + len(ids)]))
            at += len(ids)
        assert at == len(weights)
        return original(policy, prompts, rows, weights, *more, **how)

    monkeypatch.setattr(train, "accumulate", watching)
    flags = ("--stage", "warmup", "--model", "assets/tiny-agent", "--warmup-steps", 1)
    flags += ("--dtype", "float32", "--batch", 6, "--group-size", 1)
    run_main(monkeypatch, *flags, "--out", tmp_path / "r")
    assert {pair for pair, *_ in seen} == {True, False}
    for _, ending, weights in seen:
        assert weights[-ending:] == [2.0] * ending
        assert set(weights[:-ending]) <= {1.0}
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["args"]["dataset"] == "office-sim", "whatever office comes to mean"


def test_a_new_agent_has_the_width_and_layers_asked_for(small, monkeypatch, tmp_path):
    flags = ("--stage", "warmup", "--width", 64, "--layers", 1, "--warmup-steps", 1)
    flags += ("--batch", 2, "--group-size", 1, "--no-eval", "--out", tmp_path / "r")
    run_main(monkeypatch, *flags)
    config = json.loads((tmp_path / "r/warmup/config.json").read_text())
    sizes = [config[f"num_{x}"] for x in ("attention_heads", "key_value_heads")]
    assert (config["hidden_size"], config["num_hidden_layers"], sizes) == (
        64,
        1,
        [2, 1],
    )


def test_cuda_graphs_reach_the_policy(small, tmp_path):
    for wanted in (False, True):
        args = train.parse_args(["--out", str(tmp_path / f"{wanted}")])
        args.cuda_graphs, args.resumed = wanted, False
        assert train.open_run(args).policy.graphs == wanted


def test_an_exercise_adds_up_the_lists_it_shows():
    policy = train.load_policy(str(train.HERE / "assets/tiny-agent"))
    for seed in range(20):
        t = add_up(policy, np.random.default_rng(seed), 3, k=10)
        given = policy.decode([x for x, m in zip(t.ids, t.action_mask) if not m])
        asked = policy.decode([x for x, m in zip(t.ids, t.action_mask) if m])
        total = dict.fromkeys(map(str, range(1, 21)), 0)
        for n, score in re.findall(r"(\d+):(\d)", given):
            total[n] += int(score)
        listed, _, boxed = asked.partition("\\boxed")
        sums = {n: int(x) for n, x in re.findall(r"(\d+):(\d+)", listed)}
        assert sums == total and list(sums) == list(total)
        best = sorted(total, key=lambda n: -total[n])[:10]  # ties by number
        assert re.findall(r"\d+", boxed) == best
        assert parse_answer(asked, Task(SAMPLE), 10) == [*map(int, best)]


def test_an_exercise_finds_the_titles_of_a_series(ctx):
    policy = train.load_policy(str(train.HERE / "assets/tiny-agent"))
    sample, other = ctx.ds.splits["train"][0], ctx.ds.splits["train"][1]
    t = Trajectory(Task(sample), [0])
    find_series(policy, ctx, t, np.random.default_rng(0), other.candidates)
    found = re.findall("<think>Series (.*?)</think>", policy.decode(t.ids), re.DOTALL)
    words = [ctx.titles[c].split()[1] for c in sample.candidates]
    last = ctx.titles[ctx.ds.item[history(ctx.ds, sample)[-1]]].split()[1]
    assert len(found) > len(set(words)) and found[-1].split()[0] == last
    for text in found:
        word, listed, scores = text.split()[0], *text.split("\n")
        numbers = [str(i) for i, x in enumerate(words, 1) if x == word]
        assert re.findall(r"\d+", listed) == numbers
        assert listed.count("none") == (not numbers)
        assert listed.count(word) == max(1, len(numbers))
        assert scores.split() == [f"{n}:9" for n in numbers]
    asked = policy.decode([x for x, m in zip(t.ids, t.action_mask) if m])
    assert asked.count("Series") == 1
    assert asked.endswith(f"<think>Series {found[-1]}</think>")


@pytest.mark.parametrize("series", ["", "in", "Series"])
def test_exercises_are_for_any_titles(ctx, policy, monkeypatch, series):
    """Two words have no series; one that is part of the thought's own words is not mistaken for them."""
    names = [f"Acme {f'{series} ' * (i % 2)}Pen" for i in range(len(ctx.ds.items))]
    monkeypatch.setattr(ctx, "titles", [" ".join(name.split()) for name in names])
    rng, pool = np.random.default_rng(0), ctx.ds.splits["train"]
    for t in train.exercises(policy, ctx, pool, rng, 12, 2, 10):
        assert t.ids and sum(t.action_mask)
        thoughts = re.findall("<think>Series (.*?)</think>", policy.decode(t.ids), re.DOTALL)  # fmt: skip
        assert {x.split()[0] for x in thoughts} <= {series, "Duo"} - {""}
        given = [x for x, m in zip(t.ids, t.action_mask) if not m]
        asked = policy.decode(given).rpartition("<think>")[2]
        assert not asked or t.ending or asked == f"Series {series}"


def test_the_answer_weighs_double_whatever_the_tokens_of_its_tag(
    small, monkeypatch, tmp_path, texts
):
    """A chat model's tokenizer writes <answer> in several tokens, of which other tags share the first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet))
    agent = train.build_tiny_agent(texts, train.tiny_shape(256, 1))
    agent.tokenizer = type(agent.tokenizer)(
        tokenizer_object=plain,
        eos_token="!",
        chat_template=agent.tokenizer.chat_template,
    )
    train.save_policy(agent, tmp_path / "agent")
    seen, original = [], train.accumulate

    def watching(policy, prompts, rows, weights, *more, **how):
        ids = [i for r in rows for i, m in zip(r.ids, r.action_mask) if m]
        assert len(ids) == len(weights)
        seen.extend(zip(ids, weights))
        return original(policy, prompts, rows, weights, *more, **how)

    monkeypatch.setattr(train, "accumulate", watching)
    flags = ("--stage", "warmup", "--model", tmp_path / "agent", "--warmup-steps", 1)
    flags += ("--dtype", "float32", "--batch", 4, "--group-size", 1)
    run_main(monkeypatch, *flags, "--out", tmp_path / "r")
    tokenizer = agent.tokenizer
    heavy = tokenizer.decode([i for i, w in seen if w == 2])
    light = tokenizer.decode([i for i, w in seen if w == 1])
    assert heavy.count("<answer>") == heavy.count("</answer>") == 4
    assert "<think>" not in heavy and "<think>" in light and "answer" not in light


def test_a_new_agents_warm_up_has_the_batch_of_the_bundled_one():
    for flags, batch in (["--stage", "warmup"], (8, 5)), ([], (12, 8)):
        args = train.parse_args(flags)
        assert (args.batch, args.group_size) == batch
    given = train.parse_args(["--stage", "warmup", "--batch", "3"])
    assert (given.batch, given.group_size) == (3, 5)


def test_no_steps_of_stage_2_need_no_pairs(small, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "mine_pairs", lambda run: pytest.fail("mined"))
    flags = (*SHORT, "--steps", 0, "--ppr-steps", 0, "--no-eval")
    run_main(monkeypatch, *flags, "--out", tmp_path / "r")
    assert (tmp_path / "r/rta").is_dir() and not (tmp_path / "r/ppr").exists()


def test_a_runs_commit_tells_edits_that_are_not_committed(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "HERE", tmp_path)
    assert train.surroundings()["commit"] is None
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "a.py").write_text("1")
    for more in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "v1"]):
        subprocess.run([*git, *more], check=True)
    clean = train.surroundings()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "a.py").write_text("2")
    assert train.surroundings()["commit"] == f"{clean}-dirty"


def test_exercises_come_first_in_a_warm_up(small, monkeypatch, tmp_path):
    flags = ("--stage", "warmup", "--model", "assets/tiny-agent", "--warmup-steps", 2)
    flags += ("--exercise-steps", 1, "--batch", 2, "--group-size", 2)
    run_main(monkeypatch, *flags, "--out", tmp_path / "r")
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    practice, demonstrations = map(json.loads, lines)
    assert "answer_loss" not in practice and "answer_loss" in demonstrations


def test_the_answers_loss_is_of_rows_that_answer(small, monkeypatch, tmp_path):
    """Exercises that look for a series have no answer: they neither add to it nor thin it out."""
    flags = ("--stage", "warmup", "--model", "assets/tiny-agent", "--warmup-steps", 20)
    flags += ("--exercise-steps", 1, "--batch", 2, "--group-size", 4)
    monkeypatch.setattr(train, "stage_steps", lambda *_: 2)
    original, lengths = train.warmup_demonstrations, []

    def watching(run, step):
        found = original(run, step)
        lengths[:] = [t.ending for t in found[2] if t.ending and not t.task.pair]
        assert len(lengths) < len(found[2])
        return found

    def one_nat_a_token(policy, prompts, rows, weights, n, **how):
        return torch.full((len(weights),), -1.0), None

    monkeypatch.setattr(train, "warmup_demonstrations", watching)
    monkeypatch.setattr(train, "accumulate", one_nat_a_token)
    run_main(monkeypatch, *flags, "--out", tmp_path / "r")
    mean = sum(lengths) / len(lengths)
    assert read_metrics(tmp_path / "r")[-1]["answer_loss"] == pytest.approx(mean)


def test_a_warm_up_asks_again_if_told(small, monkeypatch, tmp_path):
    calls, original = [], train.demonstrate

    def watching(*how):
        calls.append(original(*how))
        return calls[-1]

    monkeypatch.setattr(train, "demonstrate", watching)
    flags = ("--stage", "warmup", "--model", "assets/tiny-agent", "--warmup-steps", 1)
    flags += ("--batch", 8, "--group-size", 4, "--overwrite", "--out", tmp_path / "r")
    run_main(monkeypatch, *flags)
    assert max(len(t.calls) for t in calls) == 1  # of a step that shows one piece
    calls.clear()
    run_main(monkeypatch, *flags, "--ask-again", 1)
    assert max(len(t.calls) for t in calls) == 2


def test_three_updates_that_are_not_finite_end_the_run(small, monkeypatch, tmp_path):
    def poisoned(policy, *_, **__):
        for p in policy.model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        return {
            "zero_variance_groups": 0,
            "dropped_groups": 0,
            "kl_sampler_trainer": 0.0,
            "entropy": 0.0,
        }

    monkeypatch.setattr(train, "policy_gradient", poisoned)
    with pytest.raises(train.ModelError, match="not finite"):
        run_main(
            monkeypatch, *SHORT, "--stage", "rta", "--steps", 9, "--out", tmp_path / "r"
        )
    assert len(read_metrics(tmp_path / "r")) == 3
    assert (tmp_path / "r" / "last" / "state.json").exists()


def test_the_papers_preset_tells_its_memory_need_before_any_download(
    monkeypatch, capsys, tmp_path
):
    told = []

    def download(*_):
        told.append(capsys.readouterr().out)
        raise train.ModelError("no network")

    monkeypatch.setattr(train, "load_policy", download)
    flags = ("--dataset", "office-sim", "--preset", "paper", "--out", tmp_path / "run")
    with pytest.raises(train.ModelError):
        run_main(monkeypatch, *flags)
    first, line = told[0].splitlines()
    assert "SIMULATED" in first
    parts = dict(re.findall(r"(?:^|, )(.+?) (\d+)(?=,|$)", line.partition("GB: ")[2]))
    # 4.02e9 weights: fp32, their gradients and Adam's two moments, and a bf16 copy to sample from
    assert [int(parts[p]) for p in ("weights", "gradients", "Adam", "bf16 copy")] == [16, 16, 32, 8]  # fmt: skip
    assert int(parts["peak"]) > 72
    args = train.parse_args(["--preset", "paper"])
    paper = {"batch": 64, "group_size": 8, "lr": 1e-6, "temperature": 0.6, "max_new_tokens": 6144, "k": 10, "epochs": 3, "ppr_epochs": 1}  # fmt: skip
    assert {name: getattr(args, name) for name in paper} == paper
    assert (args.model, args.steps, args.ppr_steps) == (
        "Qwen/Qwen3-4B-Instruct-2507",
        None,
        None,
    )
