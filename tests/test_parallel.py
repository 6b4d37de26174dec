"""Several processes, memory, and the flags of the experiments.

Two gloo ranks run under torchrun itself, each as `rank.py`.
"""

import copy
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_train import SHORT, read_metrics, run_main, small  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import train
from model import (
    LOGITS,
    QWEN3,
    SPARE,
    Policy,
    RaggedBatch,
    TrainRow,
    add_lora,
    backward_prompts,
    build_tiny_agent,
    checkpoint_layers,
    covered,
    forward_packed,
    load_policy,
    memory_need,
    memory_table,
    project,
    qwen3_config,
    reserve,
    room,
    share_prompts,
    token_logprobs,
)
from ppr import bound_gradient, letter_rows
from rollout import ALL_TOOLS, Task, demonstrate, trained_tools
from tools import Call, run_call

RANK = pathlib.Path(__file__).with_name("rank.py")
pytestmark = pytest.mark.usefixtures("small")
FLAGS = (*SHORT, "--batch", 3, "--steps", 2, "--ppr-steps", 1, "--save-every", 1)
FLAGS += ("--lr", 1e-3)


def torchrun(n, *command):
    """Exit status and errors of `torchrun --nproc_per_node n command`."""
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n]
    command = [sys.executable, *module, *command]
    how = {"capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([str(x) for x in command], check=False, **how)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Where the run of one process goes; made by the first test that needs it."""
    return tmp_path_factory.mktemp("alone") / "run"


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """Where the runs lie that two ranks were stopped in; each made by the first test that needs it."""
    return tmp_path_factory.mktemp("halted")


SHARD = ("--shard", "--grad-checkpoint")


@pytest.mark.parametrize(("more", "then"), [((), 1), (SHARD, 2), (SHARD, 1)])
def test_two_ranks_equal_one_and_resume(monkeypatch, tmp_path, alone, halted, more, then):  # fmt: skip
    """Two ranks are stopped in stage 1 and `then` many go on, data parallel or sharded: all as if never parallel.

    The ranks have the fused AdamW that a GPU has.
    """
    if not alone.exists():
        run_main(monkeypatch, *FLAGS, "--out", alone)
    kept, out = halted / "".join(["run", *more]), tmp_path / "run"
    if not kept.exists():
        fault = "stop:0" if more else "stop:1"
        status, said = torchrun(2, RANK, fault, *FLAGS, *more, "--out", kept)
        assert status and "exitcode  : 143" in said, said
    shutil.copytree(kept, out)
    if then > 1:
        status, said = torchrun(then, RANK, "none", "--resume", out)
        assert status == 0, said
    else:  # what torchrun with one process comes to
        run_main(monkeypatch, "--resume", out)
    for one, two in zip(read_metrics(alone), read_metrics(out), strict=True):
        assert two.pop("stage") == one.pop("stage")
        assert two == pytest.approx(one, rel=2e-3, abs=1e-5), "one log, same figures"
    assert (alone / "hard_pairs.jsonl").read_text() == (out / "hard_pairs.jsonl").read_text()  # fmt: skip
    start = load_file(train.HERE / "assets/tiny-agent/model.safetensors")
    for stage in ("rta", "ppr"):
        one = load_file(alone / stage / "model.safetensors")
        two = load_file(out / stage / "model.safetensors")
        assert one.keys() == two.keys()
        assert max(float((one[k] - start[k]).abs().max()) for k in one) > 3e-4
        assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5


def test_a_rank_that_dies_ends_the_job_and_leaves_the_checkpoint(tmp_path):
    fault = f"die:1:{tmp_path / 'died'}"
    flags = (*FLAGS, "--stage", "rta", "--out", tmp_path / "r")
    status, said = torchrun(2, RANK, fault, *flags)
    assert status and "out of luck" in said, said
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    state = json.loads((tmp_path / "r" / "last" / "state.json").read_text())
    assert state["step"] == 1
    assert load_file(tmp_path / "r" / "last" / "model.safetensors")
    assert len(read_metrics(tmp_path / "r")) == 1


def test_sharded_ranks_whose_prompts_begin_alike_or_not():
    """A forward of a common beginning on one rank alone paired its gathers with another's of other layers."""
    status, said = torchrun(2, RANK.with_name("shard_prompts.py"))
    assert status == 0, said


# -------------------------------------------------------------------------------------------------------------- memory


def test_known_models_have_their_published_sizes():
    """Parameters in billions as the model cards say."""
    for name, billions in zip(QWEN3, (0.6, 1.7, 4.0, 8.2), strict=True):
        need = memory_need(qwen3_config(name), 4, False, 8, 1, 64, 64)
        assert need["weights"] / 4 == pytest.approx(billions, abs=0.05)
        split = memory_need(qwen3_config(name), 4, True, 8, 1, 64, 64)
        for part in ("weights", "gradients", "Adam"):
            assert split[part] == pytest.approx(need[part] / 4)


def test_memory_table_has_each_model_alone_and_sharded():
    def need_of(name, n, sharded):
        return {"weights": 100.4 * n + sharded, "peak": len(name)}

    head, rule, *lines = memory_table(need_of).splitlines()
    assert head == "| model | GPUs | weights | peak |" and rule == "|---|---|---|---|"
    assert len(lines) == 2 * len(QWEN3)
    assert lines[0] == "| Qwen3-0.6B | 1 GPU | 100 | 15 |"
    assert lines[1] == "| Qwen3-0.6B | 4 GPUs, --shard | 403 | 15 |"


def test_memory_counts_mining_and_the_evaluation():
    """Both sample one answer a prompt, 32 at once, where a rollout of the paper's preset shares 4 prompts."""
    name, flags = "Qwen/Qwen3-4B-Instruct-2507", ["--preset", "paper"]
    need = train.memory(train.parse_args(flags), name, 4, True)
    rta = train.memory(train.parse_args([*flags, "--stage", "rta"]), name, 4, True)
    token = 2 * 2 * 36 * 8 * 128 / 1e9  # keys and values, 36 layers, 8 kv heads, bf16
    answers = 32 * (6144 + 256)
    assert need["keys, values"] == pytest.approx(token * (answers + 32 * 2756))
    assert rta["keys, values"] == pytest.approx(token * (answers + 4 * 2756))
    copied = 4 * need["weights"] / 2  # bf16 for fp32, of four GPUs
    copied += 4 * 151_936 * 2560 / 1e9  # embeddings in fp32, and the head beside them
    assert need["evaluation"] == pytest.approx(copied + need["keys, values"])


def test_memory_of_the_whole_copy_is_what_sampling_from_it_holds(policy):
    """Under --shard: bf16 matrices, embeddings in fp32, and once more in bf16 the head that is tied to them."""
    whole = copy.deepcopy(policy)
    whole.dtype = torch.bfloat16
    run = types.SimpleNamespace(whole=whole, policy=whole)
    with train.gathered(run) as sampled:
        held = [*sampled.model.parameters(), *sampled.sampler().parameters()]
        vectors = sum(p.numel() for p in sampled.model.parameters() if p.ndim == 1)
        held = sum({p.data_ptr(): p.nbytes for p in held}.values())
    need = memory_need(policy.model.config, 4, True, 6, 3, 67, 1)["bf16 copy"] * 1e9
    assert need == pytest.approx(held - 2 * vectors)  # norms stay in fp32


def test_buffers_on_a_gpu_have_rows_of_whole_16_bytes():
    for T in range(1, 600):
        assert room(T, True) % 64 == 0 and T < room(T, True) <= T + SPARE[1]


def test_buffers_on_a_cpu_grow_seldom_and_are_computed_with_as_far_as_needed():
    buffers, sizes = [(torch.zeros(1, 1, 0, 2),) * 2], set()
    for T in range(1, 1001):
        reserve(buffers, T)
        sizes.add(buffers[0][0].shape[-2])
        assert T <= covered(buffers, T) <= min(buffers[0][0].shape[-2], T + SPARE[0])
    assert len(sizes) <= 9  # by 32 positions at a time it would be 31


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cpu"])
def test_the_optimizer_is_fused_on_every_gpu(policy, tmp_path, device):
    args = train.parse_args(["--device", device, "--dtype", "float32"])
    run = train.Run(args, tmp_path, None, None, policy)
    (optimizer,) = train.make_optimizers(run, "rta")
    assert optimizer.defaults["fused"] == (device != "cpu")


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(train.ModelError, match="cuda:1 with several processes"):
        train.join_ranks("cuda:1")


def test_memory_of_keys_and_values_is_what_sampling_allocates(policy, monkeypatch):
    monkeypatch.setattr("model.PROMPT", 9)
    monkeypatch.setattr("model.SPARE", (32, 32))
    monkeypatch.setattr("model.room", lambda T, on_gpu: T + 32)  # as on a GPU
    batch = RaggedBatch(policy, 3, 2)
    batch.prefill([0, 1, 2], [[1] * 10] * 3)
    for _ in range(67):  # more columns are made for tokens 1, 34 and 67
        batch.decode(list(range(6)), [1] * 6)
    held = sum(x.nbytes for pair in batch.prompts + batch.own for x in pair)
    need = memory_need(policy.model.config, 1, False, 6, 3, 67, 1)
    assert need["keys, values"] * 1e9 == held / 2, "bf16, held here in fp32"


def saved_for_backward(policy) -> int:
    """Bytes that autograd keeps in a bf16 update of 256 tokens, without weights and their bf16 copies."""
    policy.dtype, model = torch.bfloat16, policy.model
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes, saved = {p.shape for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights and x.shape not in shapes:
            saved[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    rows = [TrainRow(0, [1] * 16, [0] * 15 + [i == 0]) for i in range(15)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_logprobs(policy, [[1] * 17], rows)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_activations_is_what_autograd_saves(
    texts, checkpointing, monkeypatch
):
    """Two more layers; attention scores and lengths rounded up, which are not counted, are small for such sequences."""
    monkeypatch.setattr("model.SHAPE_STEP", 16)
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    one, three = (
        build_tiny_agent(texts, shape | {"num_hidden_layers": n}) for n in (1, 3)
    )
    how = (1, False, 1, 1, 1, 256, 0, checkpointing)
    need = [
        memory_need(p.model.config, *how)["activations"] * 1e9 for p in (one, three)
    ]
    sizes = [sum(p.numel() for p in x.model.parameters()) for x in (one, three)]
    held = 2 * 2 * (sizes[1] - sizes[0])  # bf16 matrices, left out, of two forwards
    if checkpointing:
        checkpoint_layers(one)
        checkpoint_layers(three)
        held = 2 * 256 * 4 * 32  # keys and values, which no hook sees
    measured = saved_for_backward(three) - saved_for_backward(one) + held
    assert need[1] - need[0] == pytest.approx(measured, rel=0.05)


class Held(TorchDispatchMode):
    """Bytes of all tensors that exist at once, at most."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = isinstance(x, torch.Tensor) and x.untyped_storage()
            if storage and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


def flash(query, key, value, scaling):
    """The operation that a GPU has for bf16, on tensors that hold nothing."""
    how = {"is_causal": True, "return_debug_mask": False, "scale": scaling}
    op = torch.ops.aten._scaled_dot_product_flash_attention
    return op(query, key, value, 0.0, **how)[0]


@pytest.mark.parametrize("more", [(0, False), (16, False), (0, True)])
def test_memory_covers_the_peak_of_an_update(monkeypatch, more):
    """Tensors without content go through an update of Qwen3-4B with three layers as on a GPU, where gradients are already.

    Two prompts of 2,500 tokens, the first 1,000 the same, and 4 rows of 700 each.
    """
    monkeypatch.setattr("model.whole_attention", flash)
    monkeypatch.setattr("model.LOGITS", (LOGITS[1], LOGITS[1]))
    config = qwen3_config("Qwen/Qwen3-4B-Instruct-2507")
    config.num_hidden_layers, config.layer_types = 3, config.layer_types[:3]
    prompts = [[1] * 1000 + [i] * 1500 for i in range(2)]
    rows, ids = [[1] * 700] * 8, torch.ones(8 * 700, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        network = AutoModelForCausalLM.from_config(config).eval()
        network.set_attn_implementation("shared_prefix")
        policy = Policy.__new__(Policy)
        policy.model, policy.device = network, torch.device("cpu")
        policy.dtype = torch.bfloat16
        if more[0]:
            add_lora(policy, more[0])
        if more[1]:
            checkpoint_layers(policy)
        for _ in range(2):
            held.peak, cuts = held.now, []
            shared = share_prompts(policy, prompts, cuts)
            before = [[p for p in own for _ in range(4)] for own in shared]
            hidden, _ = forward_packed(policy, network, rows, [2499] * 8, before)
            with policy.autocast():  # as token_logprobs does, whose mask has to be real
                logprobs, _ = project(network.lm_head, hidden, ids, 1.0)
            logprobs.sum().backward()
            del hidden, logprobs, shared, before
            backward_prompts(cuts)
    n_tokens = 1000 + 2 * 1500 + 8 * 700
    need = memory_need(config, 1, False, 8, 2, 700, n_tokens, *more)
    parts = ("weights", "gradients", "bf16 copy", "activations")
    assert 0.85 < held.peak / 1e9 / sum(need[part] for part in parts) < 1


def test_memory_of_adapters(policy):
    """Gradients and Adam of the adapters alone, counted on a model that has them."""
    how = (policy.model.config, 1, False, 1, 1, 1, 1)
    whole, need = memory_need(*how), memory_need(*how, 4)
    before = sum(p.numel() for p in policy.model.parameters())
    add_lora(policy, 4)
    after = sum(p.numel() for p in policy.model.parameters())
    assert whole["gradients"] * 1e9 == pytest.approx(4 * before)
    assert need["weights"] * 1e9 == pytest.approx(4 * after)
    for part, size in (("gradients", 4), ("Adam", 8)):
        assert need[part] * 1e9 == pytest.approx(size * (after - before))


# ------------------------------------------------------------------------------------------------- flags of experiments


@pytest.fixture
def questions(policy, ctx):
    """Two pairs in both directions, two trajectories each, with observations."""
    rng = np.random.default_rng(0)
    tasks = [
        Task(s, (s.target + 1, (s.target + 3) % 20 + 1), more)
        for s in ctx.ds.splits["train"][:2]
        for more in (True, False)
    ]
    return [[demonstrate(policy, ctx, t, 10, rng, 2) for _ in "ab"] for t in tasks]


def test_the_bound_s_gradient_is_that_of_proposition_2(policy, questions):
    """Micro-batched two-pass gradient against autograd through the formula; right letters by hand."""
    found = bound_gradient(policy, questions, micro_tokens=900)
    got = [p.grad.clone() for p in policy.model.parameters()]
    policy.model.zero_grad()
    total = 0.0
    for t in (t for group in questions for t in group):
        rows = letter_rows(policy, t, 0)
        letters = [policy.decode(r.ids[-1:]) for r in rows]
        assert letters == list("AB" if t.task.more else "BA"), "the positive is A"
        evidence = "</observation>" if t.calls else ""
        assert policy.decode(rows[0].ids[:-1]).endswith(evidence + "<answer>\\boxed{")
        assert [sum(r.action_mask) for r in rows] == [1, 1]
        right, wrong = token_logprobs(policy, [t.prompt], rows)[0]
        total = total + F.softplus(wrong - right) / (2 * 2)  # two pairs, G = 2
    total.backward()
    assert found["bound"] == pytest.approx(float(total.detach()), rel=1e-4)
    for a, p in zip(got, policy.model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)


def test_stage_2_runs_with_one_direction_the_bound_and_fewer_tools(
    monkeypatch, tmp_path
):
    asked = []
    original = train.rollout

    def watching(policy, ctx, tasks, **how):
        asked.append(([t.more for t in tasks if t.pair], how["tools"]))
        assert max(map(len, ctx.titles)) == 12
        return original(policy, ctx, tasks, **how)

    monkeypatch.setattr(train, "rollout", watching)
    flags = (*SHORT, "--batch", 4, "--steps", 0, "--ppr-steps", 1, "--ppr-lr", 1e-3)
    flags += ("--ppr-directions", "less", "--ppr-objective", "logistic")
    flags += (
        "--without-tool",
        "candidates_analyze",
        "--title-chars",
        12,
        "--out",
        tmp_path / "r",
    )
    run_main(monkeypatch, *flags)
    (line,) = read_metrics(tmp_path / "r")
    assert (
        line["bound"] > 0 and 0 <= line["pair_accuracy"] <= 1 and line["grad_norm"] > 0
    )
    assert asked[-1][0] == [False, False], "half of four prompts, all LESS"
    assert all(
        set(ALL_TOOLS) - set(tools) == {"candidates_analyze"} for _, tools in asked
    )
    assert trained_tools(vars(train.parse_args(["--no-tools"]))) == ()


def test_profiles_are_written_once_and_shown(monkeypatch, tmp_path):
    flags = ("--stage", "rta", "--steps", 2, "--save-every", 1, "--profiles", "llm")
    flags = (*SHORT, *flags, "--test-samples", 3, "--out", tmp_path / "r")
    made, shown = [], []

    def texts(policy, prompts, limit=80):
        made.extend(policy.decode(p) for p in prompts)
        return [f"likes <b>{i}" for i in range(len(prompts))]

    def step(run, stage, number):
        sample = train.stage_tasks(run, stage, number)[0].sample
        shown.append(run_call(run.ctx, sample, Call("get_user_profile", {})).text)
        run.stop = signal.SIGTERM * (number == 0)
        return {"stage": stage, "step": number + 1, "loss": 0.0}, []

    monkeypatch.setattr(train, "complete", texts)
    monkeypatch.setattr(train, "grpo_step", step)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *flags)
    run_main(monkeypatch, "--resume", tmp_path / "r")
    assert len(made) == 2 * 2 + 3, (
        "two steps of two prompts and three test samples, once"
    )
    assert all("long-term taste" in prompt for prompt in made)
    assert all(text.startswith("likes ‹b›") for text in shown) and len(shown) == 2


def test_completions_do_not_depend_on_their_neighbours(ctx):
    policy = load_policy(str(train.HERE / "assets/tiny-agent"))
    prompts = [train.profile_prompt(policy, ctx, s) for s in ctx.ds.splits["test"][:3]]
    together = train.complete(policy, prompts, 12)
    assert together == [train.complete(policy, [p], 12)[0] for p in prompts]
    assert any(together)
