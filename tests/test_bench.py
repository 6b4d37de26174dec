"""The scripts beside the tests import; the benchmarks run, hold every peer to the same work, and count the least work right."""

import argparse
import importlib.util
import json
import pathlib
import sys

import bench
import bench_gpu
import peers
import pytest
from transformers import Qwen3Config

import rollout as engine

HERE = pathlib.Path(__file__).parent
SCRIPTS = [p.stem for p in HERE.glob("*.py") if p.stem.partition("_")[0] != "test"]


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {"conftest"}))
def test_script_imports(script):
    """The suite does not run them all: at least what they import must exist."""
    importlib.import_module(script)


@pytest.fixture
def in_one_process(monkeypatch):
    """Peers run here instead of in processes of their own, and what they replace in the engine is put back."""
    monkeypatch.setattr(engine, "Rollout", engine.Rollout)
    monkeypatch.setattr(engine, "build_prompt", engine.build_prompt)

    def run(what, case, args):
        if what == "limits":
            names = "flops_float32 flops_bfloat16 bytes_decode bytes_optimizer"
            return dict.fromkeys(names.split(), 1e10)
        step = getattr(peers, what)(case, args)[-1]
        step["step"] = step["rollout"] + step["update"]
        return step | {"peak_mb": 512.0, "start_mb": 256.0}

    monkeypatch.setattr(bench, "in_process", run)


def write_tiny(folder, **shape) -> str:
    Qwen3Config(vocab_size=1100, **shape).save_pretrained(folder)
    return str(folder)


def test_gpu_script_prints_every_model_and_peer_on_a_cpu(
    in_one_process, monkeypatch, capsys, tmp_path
):
    """Tiny shapes; each peer checks that it did the work of the script, token for token."""
    file = tmp_path / "gpu.json"
    flags = f"--quick --device cpu --prompts 1 --steps 0 --json {file}"
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *flags.split()])
    bench_gpu.main()
    told = capsys.readouterr().out
    found = json.loads(file.read_text())["models"]
    assert list(found) == list(bench_gpu.MODELS)
    for name, model in found.items():
        assert f"## {name}\n" in told
        rows = {r["name"]: r for r in model["results"]}
        assert list(rows) == ["ours", "plain", "ours, LoRA 16"]
        assert all(
            r["tokens_per_s"] > 0 and r["utilisation"] > 0 for r in rows.values()
        )


def test_gpu_script_measures_with_and_without_graphs():
    args = argparse.Namespace(peers=["ours", "plain"], device="cuda", lora_rank=4)
    found = {name: (peer, how) for name, peer, how in bench_gpu.peer_runs(args)}
    assert list(found) == ["ours", "plain", "ours, CUDA graphs", "ours, LoRA 4"]
    assert found["ours"] == ("ours", {"lora_rank": 0, "cuda_graphs": 0})
    graphs = found["ours, CUDA graphs"]
    assert graphs == ("ours", {"lora_rank": 0, "cuda_graphs": 1})


def test_a_comparison_has_ratios_and_shares_of_the_limit(
    in_one_process, capsys, tmp_path
):
    model = bench.write_model(str(tmp_path))
    case = peers.uniform_case(model, 1, 2, 6, [(3, 2)], answer=4)
    args = argparse.Namespace(
        peers=["ours", "plain"], rounds=1, steps=0, dtype="float32", device="cpu",
        lora_rank=0, cuda_graphs=0, peer_rows=2, checkpointing=True,
    )  # fmt: skip
    result = bench.compare(case, args)
    bench.print_comparison("tiny", result)
    for r in result["peers"].values():
        assert r["trajectories_per_s"] == pytest.approx(2 / r["step"])
        least = result["least_seconds"]["update"]
        assert r["update_of_limit"] == pytest.approx(least / r["update"])
    ratio = result["peers"]["plain"]["step"] / result["peers"]["ours"]["step"]
    assert f"| {ratio:.1f}x | 1.00 |" in capsys.readouterr().out


def test_the_whole_benchmark_prints_its_tables(
    in_one_process, monkeypatch, capsys, tmp_path, world
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "load_dataset", lambda _: world)
    monkeypatch.setattr(bench, "memory_mb", lambda *_, **__: 300.0)
    every = bench.growth_cases

    def two_of_each(*how):  # to save time
        return {
            axis: dict([*points.items()][:2]) for axis, points in every(*how).items()
        }

    monkeypatch.setattr(bench, "growth_cases", two_of_each)
    flags = f"--quick --steps 0 --cases b --json {tmp_path / 'b.json'}"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    bench.main()
    told = capsys.readouterr().out
    assert "trl is not installed (pip install trl): it is left out" in told
    found = json.loads((tmp_path / "b.json").read_text())
    assert set(found["cases"]["b"]["peers"]) == {"ours", "plain"}
    for axis in ("G", "prompt", "turns", "rows"):
        assert f"## Growth with {axis}, ours" in told
        flops = [r["flops"] for r in found[f"growth with {axis}"].values()]
        assert flops == sorted(flops)
    doubled = found["growth with G"]
    assert doubled["4"]["flops"] < 2 * doubled["2"]["flops"], "the prompt is shared"


def test_work_that_differs_from_the_script_is_refused(tmp_path):
    model = bench.write_model(str(tmp_path))
    case = peers.uniform_case(model, 1, 2, 6, [(3, 2)], answer=4)
    peers.check_work(case, [(9, 7), (9, 7)])
    with pytest.raises(AssertionError, match="did other work"):
        peers.check_work(case, [(9, 7), (9, 8)])


def test_least_work_by_hand(tmp_path):
    """Hidden 8, inner 12, 2 heads and 1 kv head of 4, 1 layer: 8*8 + 2*8*4 + 8*8 + 3*8*12 = 480 numbers and a head of 8,800."""
    folder = write_tiny(
        tmp_path, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    row = [(2, [5, 6, 7]), (1, [])]  # 2 written, 3 observed, 1 written
    case = peers.Case(folder, [[3, 4, 5, 6]], [[row, row]])
    work = bench.least_work(case, 4)
    attend = 4 * 2 * 4  # scores and sums over values, of one token to another
    prompt = 4 * 2 * 480 + attend * 4 * 4 / 2
    observation = 3 * (2 * 480 + attend * (4 + 2 + 1.5))
    assert work["known_flops"] == prompt + 2 * observation
    written = 2 * (2 * 480 + 2 * 8800 + attend * (4 + 1))
    written += 1 * (2 * 480 + 2 * 8800 + attend * (4 + 5 + 0.5))
    assert work["decode_flops"] == 2 * written
    assert work["train_flops"] == 3 * (work["known_flops"] + work["decode_flops"])
    kv = 2 * 4  # keys and values of a token
    own = 2 * (2 * 1 + 1 * 5.5)  # rows times, for each turn, tokens it reads on average
    assert work["decode_bytes"] == 4 * (kv * own + kv * 4 * 3 + 3 * (480 + 8800))
