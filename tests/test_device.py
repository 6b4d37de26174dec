"""No operation mixes tensors of the CPU and of another device, and a run there is the same: on an emulated device."""

import json
import pathlib
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from test_train import SHORT, read_metrics, run_main, small  # noqa: F401

import train

HERE = pathlib.Path(__file__).parent
RUNS = {
    "both stages": "--steps 1 --ppr-steps 1 --lr 1e-3 --mine-samples 4",
    "adapters, bound": "--stage ppr --ppr-steps 1 --lora-rank 4 --grad-checkpoint "
    "--ppr-objective logistic --profiles llm --test-samples 2 --mine-samples 4",
    "warm-up": "--stage warmup --model assets/tiny-agent --warmup-steps 2 "
    "--exercise-steps 1 --warmup-lr 1e-3",
}
SCRIPT = """
import json, sys
import other_device, torch, train
other_device.install()
other_device.shrink(setattr)
with other_device.Device():
    try:
        torch.ones(2, device="emu") + torch.ones(2)
    except RuntimeError as refused:
        print(refused)
    for flags in json.loads(sys.argv[1]):
        sys.argv = ["train.py", "--device", "emu", *flags]
        train.main()
"""


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The folder of all RUNS on the emulated device, and the one process that made them."""
    folder = tmp_path_factory.mktemp("there")
    runs = [
        [*map(str, SHORT), *flags.split(), "--out", str(folder / name)]
        for name, flags in RUNS.items()
    ]
    command = [sys.executable, "-c", SCRIPT, json.dumps(runs)]
    how = {"capture_output": True, "text": True, "cwd": HERE}
    return folder, subprocess.run(command, check=False, **how)


def distance(one, other):
    """Of two models' weights."""
    return sum(float((one[k] - other[k]).norm()) ** 2 for k in one) ** 0.5


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("small")
def test_another_device_gives_the_same_run(monkeypatch, tmp_path, there, name):
    """The weights differ by less than a tenth of how far they moved."""
    folder, done = there
    assert done.returncode == 0, done.stderr[-2000:]
    here, there = tmp_path / "here", folder / name
    run_main(monkeypatch, *SHORT, *RUNS[name].split(), "--out", here)
    for mine, other in zip(read_metrics(here), read_metrics(there), strict=True):
        numbers = [k for k, x in mine.items() if isinstance(x, float)]
        assert {k: other[k] for k in numbers} == pytest.approx(
            {k: mine[k] for k in numbers}, rel=1e-2, abs=1e-4
        )
    start = load_file(train.HERE / "assets/tiny-agent/model.safetensors")
    stages = [path.parent.name for path in here.glob("*/config.json")]
    assert stages, "what was trained is saved"
    for stage in stages:
        ours, theirs = (
            load_file(run / stage / "model.safetensors") for run in (here, there)
        )
        assert ours.keys() == theirs.keys() == start.keys()
        assert distance(ours, theirs) < 0.1 * distance(ours, start), stage


def test_the_emulated_device_refuses_to_mix(there):
    assert "tensors of shape [(2,)] are on the CPU" in there[1].stdout
