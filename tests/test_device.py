"""No operation mixes tensors of the CPU and of another device, and a run there is the same: on an emulated device."""

import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_train import SHORT, read_metrics, run_main, small  # noqa: F401

HERE = pathlib.Path(__file__).parent
RUNS = {
    "both stages": "--steps 2 --ppr-steps 1 --lr 1e-3",
    "adapters, bound": "--steps 1 --ppr-steps 1 --lora-rank 4 --grad-checkpoint "
    "--ppr-objective logistic --profiles llm --test-samples 2",
    "warm-up": "--stage warmup --model assets/tiny-agent --warmup-steps 2 "
    "--exercise-steps 1 --warmup-lr 1e-3",
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
@pytest.mark.usefixtures("small")
def test_another_device_gives_the_same_run(monkeypatch, tmp_path, flags):
    flags = [*map(str, SHORT), *flags.split()]
    emulated = [sys.executable, HERE / "other_device.py", "--device", "emu"]
    how = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([*emulated, *flags, "--out", "there"], check=False, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    run_main(monkeypatch, *flags, "--out", tmp_path / "here")
    for there, here in zip(*(read_metrics(tmp_path / x) for x in ("there", "here"))):
        numbers = [k for k, x in here.items() if isinstance(x, float)]
        assert {k: there[k] for k in numbers} == pytest.approx(
            {k: here[k] for k in numbers}, rel=1e-2, abs=1e-4
        )
    for file in (tmp_path / "here").glob("*/model.safetensors"):
        here = load_file(file)
        there = load_file(tmp_path / "there" / file.relative_to(tmp_path / "here"))
        for name, x in here.items():
            torch.testing.assert_close(there[name], x, atol=1e-3, rtol=1e-3)


def test_the_emulated_device_refuses_to_mix():
    code = (
        "import torch, other_device as d; d.install()\n"
        "with d.Device(): torch.ones(2, device='emu') + torch.ones(2)"
    )
    how = {"capture_output": True, "text": True, "cwd": HERE}
    done = subprocess.run([sys.executable, "-c", code], check=False, **how)
    assert "tensors of shape [(2,)] are on the CPU" in done.stderr
