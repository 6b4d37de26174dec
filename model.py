"""The policy: a Hugging Face causal LM whose rollout and update share the prompt's keys and values in a group.

G trajectories of one prompt have one prefix. `RaggedBatch` (sampling) and `token_logprobs` (training) compute it once
and let every row attend to it beside its own suffix; suffixes grow at their own pace and nothing is prefilled again.

How: transformers hands attention to a function registered by name and passes unknown keyword arguments of `forward`
on to it. Ours, `shared_prefix_attention`, receives `past`, which says what each new token may see. This works for
decoders of transformers that use the attention interface (Llama, Qwen2/3, ...), within their sliding windows if any.

The last prompt token is not part of the prefix: it is the first input of every row, so that its output predicts the
first action token. Shapes: P prompts, G rows a prompt, B = P*G, T tokens, H heads, K kv heads, D head size, V vocabulary.
"""

import copy
import json
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from os.path import commonprefix

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer

LayerKV = tuple[Tensor, Tensor]
# config fields of Gemma 2 and similar models that change attention or the logits
UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping")
SHARED_BEGINNING = 64  # a common beginning of so many tokens is worth a forward
SHAPE_STEP = 64  # lengths in bf16 attention on a CPU are rounded up to a multiple
FEW = 4  # decode rows apart from the batch when they are less than a fourth of it
BLOCK = 256  # queries at a time in attention on a CPU
SPARE = 32, 256  # positions that buffers grow by at least, on a CPU and on a GPU
LOGITS = 2**25, 2**28  # at once in the vocabulary projection, likewise


class ModelError(ValueError):
    """A model that cannot be used: one line that says why and what to do."""


# ----------------------------------------------------------------------------------------------------------- attention


class Packed:
    """Past of sequences that lie in one row without padding; each is causal and sees what is `before` it.

    before: for each layer and sequence, the keys and values ahead of it in one or more parts [K, T, D].
    bias: [S, T + S] of the longest and SHAPE_STEP more, -inf where a token may not look; on a CPU only.
    new: gathers the keys and values [K, N, D] of the row, layer by layer.
    """  # no dataclass: fully_shard copies dataclasses, and their lists, at every layer

    def __init__(self, lengths: list[int], bias: Tensor | None, before=None):
        self.lengths, self.bias, self.before = lengths, bias, before
        self.new: dict[int, LayerKV] = {}

    def attend(self, query, key, value, layer: int, scaling: float) -> Tensor:
        """Attention of [1, H, N, D] packed sequences, one at a time, so that its scores stay in the processor's cache.

        `split` (not slicing) keeps the backward linear.
        """
        self.new.setdefault(layer, (key[0], value[0]))
        parts = zip(*(x[0].split(self.lengths, 1) for x in (query, key, value)))
        out = []
        for i, (q, k, v) in enumerate(parts):
            before = self.before[layer][i] if self.before else []
            seen = zip(*before, (k, v))  # keys, values: all parts of each
            out.append(causal_attention(q, *seen, self.bias, scaling))
        return torch.cat(out, 1)[None]


@dataclass
class Decode:
    """Past of one token for each of n sampling rows; if they are `few`, each becomes a prompt of its own, P = n and G = 1."""

    prompts: list[LayerKV]  # a layer: [P, K, T or more, D] keys and values
    own: list[LayerKV]  # a layer: [P, K, G, S or more, D]; the tokens' are written here
    at: tuple[Tensor, slice, Tensor, Tensor]  # where: slot, kv heads, member, position
    few: list[tuple[int, int]]  # slot and member of each row, if they are few
    prompt_bias: Tensor  # [P*K, 1, T], -inf where a prompt has no token
    own_bias: Tensor  # [P*K*G, 1, S]

    def attend(self, query, key, value, layer: int, scaling: float) -> Tensor:
        """One token a row, [n, H, 1, D]: scores against the group's prompt and the row's suffix, one softmax over both.

        Computes all rows of the batch, since gathering many rows' suffixes costs more than unneeded scores; not if few
        are left, as at the end of a rollout.
        """
        for buffer, x in zip(self.own[layer], (key, value)):
            buffer[self.at] = x[:, :, 0]
        # the buffers may be longer
        T, S = self.prompt_bias.shape[2], self.own_bias.shape[2]
        prompt_k, prompt_v = (x[:, :, :T] for x in self.prompts[layer])
        own_k, own_v = (x[..., :S, :] for x in self.own[layer])
        n, H, (slot, heads, member, _) = *query.shape[:2], self.at
        if self.few:
            prompt_k, prompt_v = (x.index_select(0, slot) for x in (prompt_k, prompt_v))
            own_k, own_v = (
                torch.stack([x[p, :, g, None] for p, g in self.few])
                for x in (own_k, own_v)
            )
            slot, member = torch.arange(n, device=slot.device), torch.zeros_like(slot)
        P, K, G, _, D = own_k.shape
        R = H // K
        every = query.new_zeros(P, K, G, R, D)
        every[slot, heads, member] = query.view(n, K, R, D)
        q, k = every.view(P * K, G * R, D), prompt_k.view(P * K, T, D)
        to_prompt = torch.baddbmm(self.prompt_bias, q, k.mT, alpha=scaling)
        q, k = every.view(P * K * G, R, D), own_k.reshape(P * K * G, S, D)
        to_own = torch.baddbmm(self.own_bias, q, k.mT, alpha=scaling)
        scores = torch.cat([to_prompt.view(-1, R, T), to_own], -1)
        on_prompt, on_own = scores.softmax(-1).to(query.dtype).split([T, S], -1)
        out = on_prompt.reshape(P * K, G * R, T) @ prompt_v.view(P * K, T, D)
        out = torch.baddbmm(out.view(-1, R, D), on_own, own_v.reshape(-1, S, D))
        return out.view(P, K, G, R, D)[slot, heads, member].reshape(n, H, 1, D)


def causal_attention(q, keys: tuple, values: tuple, bias, scaling: float) -> Tensor:
    """[H, S, D] queries, the last S of the T tokens whose keys and values are given in parts [K, ., D].

    On a CPU one block of queries at a time, without the keys behind its last query: half of the scores never exist.
    """
    (H, S, D), K, T = q.shape, len(keys[0]), sum(x.shape[1] for x in keys)
    # elsewhere, and for long sequences, torch has kernels that never hold the scores
    if q.device.type != "cpu" or H * S * T > 2**25:
        k, v = torch.cat(keys, 1), torch.cat(values, 1)
        return whole_attention(q[None], k[None], v[None], scaling)[0]
    R, first = H // K, bias.shape[1] - bias.shape[0] - (T - S)  # column of first key
    # bf16: few different shapes, since each new one takes 0.7 ms to compile
    step = SHAPE_STEP if q.dtype == torch.bfloat16 else 1
    q = F.pad(q, (0, 0, 0, -S % step))
    spare = q.new_zeros(K, -T % step, D)
    k, v = (torch.cat([*parts, spare], 1) for parts in (keys, values))
    out = []
    for a in range(0, S, BLOCK):
        some = q[:, a : a + BLOCK]
        n = some.shape[1]
        seen = T - S + a + n
        seen = min(k.shape[1], seen + -seen % step)
        hidden = bias[a : a + n, first : first + seen].repeat(R, 1)
        some = some.reshape(K, R * n, D)
        scores = torch.baddbmm(hidden, some, k[:, :seen].mT, alpha=scaling)
        out.append((scores.softmax(-1) @ v[:, :seen]).view(H, n, D))
    return torch.cat(out, 1)[:, :S]


def whole_attention(query, key, value, scaling: float):
    """torch's attention of [b, H, S, D] queries, the last S of T tokens; a kv head serves the query heads that share it."""
    # flash attention, which a GPU has for bf16, needs no copies of the kv heads
    shared = query.is_cuda and query.dtype == torch.bfloat16
    if not shared:
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    mask = causal_lower_right(query.shape[2], key.shape[2])  # a kernel's own, on a GPU
    how = {"scale": scaling, "enable_gqa": shared}
    return F.scaled_dot_product_attention(query, key, value, mask, **how)


def shared_prefix_attention(
    module, query, key, value, attention_mask, scaling=None, past=None, **_
):
    """Attention of [b, H, T, D] queries as `past` says; without `past` plain causal attention. Returns [b, T, H, D]."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary left them in fp32
    if past is None:
        out = whole_attention(query, key, value, scaling)
    else:
        out = past.attend(query, key, value, module.layer_idx, scaling)
    return out.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("shared_prefix", shared_prefix_attention)


# -------------------------------------------------------------------------------------------------------------- policy


@dataclass
class Policy:
    """A model with its tokenizer; `pieces` caches each token's text for finding stop tags."""

    model: nn.Module
    tokenizer: object
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the computation; the weights stay fp32
    pieces: dict[int, str] = field(default_factory=dict)
    # token_logprobs where parameters are sharded: its forward gathers them
    score: Callable | None = None
    graphs: bool = False  # sampling replays CUDA graphs

    def __post_init__(self):
        self.model.set_attn_implementation("shared_prefix")
        # cuDNN's attention makes a plan for each new length of a prompt
        torch.backends.cuda.enable_cudnn_sdp(False)
        windows = [getattr(m, "sliding_window", None) for m in self.model.modules()]
        self.window = min(filter(None, windows), default=None)
        added = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, added)) or "(?!)")  # or never
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        eos = eos if isinstance(eos, list) else [eos]
        ends = {self.tokenizer.eos_token_id, self.end_of_turn(), *eos}
        self.eos = ends - {None}

    def end_of_turn(self) -> int | None:
        """The special token that the chat template puts after an answer; Gemma names it nowhere else."""
        said = {"role": "assistant", "content": "answer"}
        chat = [{"role": "user", "content": "question"}, said]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        _, found, rest = text.rpartition("answer")
        end = self.added.match(rest.strip()) if found else None
        return self.tokenizer.convert_tokens_to_ids(end[0]) if end else None

    def piece(self, token: int) -> str:
        """Text of one token, to look for stop tags in; decoded behind another one, since some decoders strip the first."""
        if token not in self.pieces:
            once, twice = self.tokenizer.batch_decode([[token], [token, token]])
            self.pieces[token] = twice[len(once) :]
        return self.pieces[token]

    def defuse(self, text: str) -> str:
        """Text from data with any string that the tokenizer would turn into a special token broken up."""
        return self.added.sub(
            lambda m: f"{m[0][0]} {m[0][1:]}" if m[0][1:] else " ", text
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of text that continues a sequence (no BOS)."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, tags and special tokens kept."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def autocast(self):
        """bf16 compute over fp32 weights: at a learning rate of 1e-6 bf16 weights would swallow the update."""
        lower = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=lower)

    def describe(self) -> str:
        """Architecture and size in a few words."""
        n = sum(p.numel() for p in self.model.parameters())
        return f"{self.model.config.model_type} {n / 1e6:.1f}M parameters"

    def sampler(self) -> nn.Module:
        """The model to sample from: autocast would cast fp32 matrices again at every token."""
        return plain_copy(self.model, self.dtype)


def check_device(device: str) -> None:
    """ModelError if torch cannot compute there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0]
        raise ModelError(f"--device {device} cannot be used: {why}") from e


def find_model(name: str, run: pathlib.Path | None = None) -> str:
    """A folder, else the repository's folder of that name (assets/tiny-agent), else a hub id; "new": made by the run."""
    if name == "new" and run:
        return str(run / "start")
    own = pathlib.Path(__file__).parent / name
    return str(own) if own.is_dir() and not pathlib.Path(name).is_dir() else name


def read_config(run: pathlib.Path) -> dict:
    """A run folder's config.json; ModelError if there is none (a model's folder has another file of that name)."""
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    if "args" not in config:
        hint = "give a folder that train.py made"
        raise ModelError(f"{run}: no config.json of a run; {hint}")
    return config


def load_policy(path: str, device: str = "cpu", dtype: str = "float32") -> Policy:
    """Load a Hugging Face folder or hub id from safetensors, weights in fp32, without remote code."""
    folder = pathlib.Path(path)
    how = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model, found = AutoModelForCausalLM.from_pretrained(path, **how)
        fault = what_is_wrong(model, tokenizer, found["missing_keys"])
        if not fault:
            model, place = model.to(device).eval(), torch.device(device)
            return Policy(model, tokenizer, place, getattr(torch, dtype))
    except Exception as e:  # a damaged folder makes transformers raise anything
        why = next(iter(str(e).splitlines()), type(e).__name__)
        if isinstance(e, OSError) and not folder.is_dir():
            why += "; no such folder, and no hub id in reach"
        raise ModelError(f"{path}: cannot be loaded: {why}") from e
    raise ModelError(f"{path}: {fault}")


def what_is_wrong(model: nn.Module, tokenizer, missing) -> str | None:
    """Why this model cannot be used, or None; `missing` are weights that its files lack."""
    kind, embeddings = model.config.model_type, model.get_input_embeddings()
    if missing:
        return f"{len(missing)} weights are not in its files, {min(missing)} is one"
    if tokenizer.chat_template is None:
        return "the tokenizer has no chat template; use an instruct model or set one"
    if len(tokenizer) > embeddings.num_embeddings:
        return f"{len(tokenizer)} tokens but {embeddings.num_embeddings} embeddings"
    told = sorted(f for f in UNSUPPORTED if getattr(model.config, f, None))
    if told or not (hasattr(model, "model") and hasattr(model, "lm_head")):
        return f"{' and '.join(told) or 'the architecture'} of {kind} is not supported"
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        return "some weights are not finite; the checkpoint is damaged"
    if drops_system(tokenizer):
        return "its chat template leaves the system prompt out silently; set another"
    if not computes_alike(model, tokenizer):
        return f"{kind} does not compute as our engine does; that is not supported"
    return None


def drops_system(tokenizer) -> bool:
    """Whether a system turn vanishes from the prompt without an error, as the tiny agent's template means it to."""
    turns = {"system": "SYSTEM", "user": "USER"}
    chat = [{"role": role, "content": text} for role, text in turns.items()]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as e:  # no system role: rollout.build_prompt gives it to the user
        if "role" not in str(e).lower():
            raise
        return False
    return "SYSTEM" not in text and tokenizer.chat_template != TINY_TEMPLATE


@torch.no_grad()
def computes_alike(model: nn.Module, tokenizer) -> bool:
    """Whether a row behind a shared prompt gets the model's own log-probabilities.

    Not where layers are recurrent (LFM2, Qwen3.5), attend in a way of their own (DeepSeek-V3, GPT-OSS) or do not pass
    `past` on (StableLM), nor where the logits are not lm_head's own (Granite and Cohere scale them).
    """
    prompts, ids = [[2, 2, 2], [0, 1, 2, 1]], [2, 0, 1]
    whole = torch.tensor([prompts[1] + ids], device=model.device)
    own = model(whole).logits[0, 3:-1].float().log_softmax(-1)[range(3), ids]
    rows = [TrainRow(0, [1, 1], [1, 1]), TrainRow(1, ids, [1, 1, 1])]
    try:
        policy = Policy(model, tokenizer, model.device)
        ours, _ = token_logprobs(policy, prompts, rows)
    except (IndexError, RuntimeError):
        return False
    return torch.allclose(ours[2:].float(), own, atol=1e-3)


def save_policy(policy: Policy, folder: pathlib.Path) -> None:
    """Write a folder that AutoModelForCausalLM loads."""
    plain_copy(policy.model, torch.float32).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


class LoRA(nn.Module):
    """A frozen linear layer with a trained low-rank addition, y = W x + scale B A x (https://arxiv.org/abs/2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float = 2.0):
        super().__init__()
        self.linear, self.scale = linear, scale
        weight = linear.weight
        self.a = nn.Parameter(weight.new_empty(rank, linear.in_features))
        self.b = nn.Parameter(weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, 5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b) * self.scale

    def merged(self) -> Tensor:
        """The weight of one layer that does the same."""
        return (self.linear.weight + self.scale * self.b @ self.a).detach()


def add_lora(policy: Policy, rank: int) -> None:
    """Freeze the model and put adapters on every linear layer of its decoder (not on the vocabulary projection)."""
    policy.model.requires_grad_(False)
    decoder = policy.model.model
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            decoder.set_submodule(name, LoRA(module, rank))


def plain_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model without adapters and with matrices in `dtype`; whatever that does not change is shared, not copied."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            module.linear.weight = nn.Parameter(module.merged().to(dtype))
            model.set_submodule(name, module.linear)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype != dtype:
            module.weight = nn.Parameter(module.weight.detach().to(dtype))
    return model


def checkpoint_layers(policy: Policy) -> None:
    """Keep only each layer's input for the backward and compute the rest again: less memory, a third more work."""
    old = policy.model.gradient_checkpointing_enable  # in older transformers
    enable = getattr(policy.model, "activation_checkpointing_enable", old)
    enable({"use_reentrant": False, "preserve_rng_state": False})
    for module in policy.model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # transformers checkpoints in training mode only


def forward_packed(
    policy: Policy, model, sequences: list[list[int]], starts: list[int], before=None
) -> tuple[Tensor, list[LayerKV]]:
    """Forward of sequences without padding, sequence i at positions `starts[i]`, ...; see Packed for `before`.

    Returns the last hidden states [N, C] and, for each layer, keys and values [K, N, D].
    """
    lengths, device = list(map(len, sequences)), policy.device
    dtype = model.dtype if policy.dtype == torch.float32 else policy.dtype
    S, behind, bias = max(lengths) + SHAPE_STEP, max(starts), None
    if device.type == "cpu":  # elsewhere attention has no need of it
        bias = torch.full((S, behind + S), -torch.inf, dtype=dtype).triu_(behind + 1)
    past = Packed(lengths, bias, before)
    ids = torch.tensor([[t for s in sequences for t in s]], device=device)
    places = [p for first, n in zip(starts, lengths) for p in range(first, first + n)]
    places = torch.tensor([places], device=device)
    with policy.autocast():
        out = model.model(ids, position_ids=places, use_cache=False, past=past)
    return out.last_hidden_state[0], list(past.new.values())


def share_prompts(
    policy: Policy,
    prompts: list[list[int]],
    cuts: list | None = None,
    model=None,
    common: bool = True,
) -> list[list[list[LayerKV]]]:
    """For each layer and prompt the keys and values of all but its last token, in one or two parts [K, T, D].

    What all begin with is computed once: chat models have the same system prompt, tools included, in every prompt; a
    short beginning is not worth a forward, and without `common` there is always one forward. With a list `cuts`,
    gradients stop there until `backward_prompts`.
    """
    assert min(map(len, prompts)) > 1, "a prompt needs at least 2 tokens"
    prompts, model = [p[:-1] for p in prompts], model or policy.model
    n = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    n = n if common and n >= SHARED_BEGINNING and len(prompts) > 1 else 0
    begin = forward_packed(policy, model, [prompts[0][:n]], [0])[1] if n else []
    begin = cut(begin, cuts)
    before = [[[pair]] * len(prompts) for pair in begin]
    rest = [prompt[n:] for prompt in prompts]
    _, new = forward_packed(policy, model, rest, [n] * len(prompts), before)
    parts = []
    for layer, pair in enumerate(cut(new, cuts)):
        own = zip(*(x.split(list(map(len, rest)), 1) for x in pair))
        parts.append([[*begin[layer : layer + 1], x] for x in own])
    return parts


def cut(pairs: list[LayerKV], cuts: list | None) -> list[LayerKV]:
    """Detached leaves in place of keys and values, where all rows' gradients add up; `cuts` gets (tensor, leaf) of each."""
    if cuts is None or not pairs or not torch.is_grad_enabled():
        return pairs
    leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in pairs]
    ends = [z for pair, own in zip(pairs, leaves) for z in zip(pair, own)]
    cuts.append([(x, leaf) for x, leaf in ends if x.requires_grad])
    return leaves


def backward_prompts(cuts: list) -> None:
    """Send the gradients gathered at the leaves on: one backward through the prompts, however many parts the rows had."""
    for ends in reversed(cuts):
        torch.autograd.backward([x for x, _ in ends], [leaf.grad for _, leaf in ends])


# ------------------------------------------------------------------------------------------------------------ sampling


class RaggedBatch:
    """Keys and values of `slots` prompts with `group` rows each, while sampling.

    Row r belongs to slot r // group. `prefill` puts prompts into slots, `extend` feeds several known tokens to some
    rows, `decode` feeds one token to some rows and returns the logits of the next.
    """

    def __init__(self, policy: Policy, slots: int, group: int):
        self.policy, self.model = policy, policy.sampler()
        self.slots, self.group = slots, group
        self.prompts: list[LayerKV] = []  # a layer: [P, K, T, D]
        self.own: list[LayerKV] = []  # a layer: [P, K, G, S, D]
        self.prompt_length = [0] * slots
        self.length = [0] * (slots * group)  # tokens in each row's suffix
        self.inputs: list[Tensor] = []  # of the captured decode step, if any

    @torch.inference_mode()
    def prefill(self, slots: list[int], prompts: list[list[int]]) -> None:
        """Compute the prompts' keys and values (all but their last token) and empty the slots' rows."""
        layers = share_prompts(self.policy, prompts, model=self.model)
        lengths = [len(p) - 1 for p in prompts]
        if not self.prompts:
            self.prompts = [self._buffers(own[0][0]) for own in layers]
            self.own = [self._buffers(own[0][0], self.group) for own in layers]
        reserve(self.prompts, max(lengths))
        for buffers, own in zip(self.prompts, layers):
            for slot, n, parts in zip(slots, lengths, own):
                for buffer, x in zip(buffers, zip(*parts)):
                    buffer[slot, :, :n] = torch.cat(x, 1)
        for slot, n in zip(slots, lengths):
            self.prompt_length[slot] = n
            self.length[slot * self.group : (slot + 1) * self.group] = [0] * self.group

    def _buffers(self, pair: LayerKV, *group: int) -> LayerKV:
        K, _, D = pair[0].shape
        return tuple(x.new_zeros(self.slots, K, *group, 0, D) for x in pair)

    @torch.inference_mode()
    def extend(self, rows: list[int], tokens: list[list[int]]) -> None:
        """Append known tokens (an observation) to some rows, each at its own position."""
        G, layers = self.group, range(len(self.own))
        ends = [self.length[r] + len(t) for r, t in zip(rows, tokens)]
        reserve(self.own, max(ends))
        starts = [self.prompt_length[r // G] + self.length[r] for r in rows]
        before = [[self._seen(layer, r) for r in rows] for layer in layers]
        _, new = forward_packed(self.policy, self.model, tokens, starts, before)
        spans = [(r, range(self.length[r], end)) for r, end in zip(rows, ends)]
        place = [(*divmod(r, G), i) for r, span in spans for i in span]
        slot, member, position = torch.tensor(place, device=self.policy.device).T
        for buffers, pair in zip(self.own, new):
            for buffer, x in zip(buffers, pair):
                buffer[slot, :, member, position] = x.transpose(0, 1)
        for r, end in zip(rows, ends):
            self.length[r] = end

    def _seen(self, layer: int, row: int) -> list[LayerKV]:
        """Views of the keys and values [K, T, D] of a row's prompt and of its suffix so far."""
        slot, member = divmod(row, self.group)
        n, own = self.prompt_length[slot], self.length[row]
        return [
            tuple(x[slot, :, :n] for x in self.prompts[layer]),
            tuple(x[slot, :, member, :own] for x in self.own[layer]),
        ]

    @torch.inference_mode()
    def decode(self, rows: list[int], tokens: list[int]) -> Tensor:
        """Feed one token to each of n rows and return [n, V] fp32 logits."""
        reserve(self.own, max(self.length) + 1)
        if self.policy.graphs:
            # one shape for every step: the other rows' token will be written over
            known = dict(zip(rows, tokens))
            everyone = range(len(self.length))
            inputs = self._inputs([*everyone], [known.get(r, 0) for r in everyone])
            logits = self._replay(inputs)[torch.tensor(rows, device=inputs[0].device)]
        else:
            logits = self._forward(*self._inputs(rows, tokens))
        for r in rows:
            self.length[r] += 1
        return logits.float()

    def _inputs(self, rows: list[int], tokens: list[int]) -> list[Tensor]:
        """What a decode step computes with: ids and places [n, 1]; slot, member and position [n]; the biases of Decode."""
        P, G, device = self.slots, self.group, self.policy.device
        K = self.prompts[0][0].shape[1]
        T = covered(self.prompts, max(self.prompt_length[r // G] for r in rows))
        S = covered(self.own, max(self.length[r] for r in rows) + 1)
        table = [(*divmod(r, G), self.length[r]) for r in rows]
        slot, member, position = torch.tensor(table, device=device).T
        length = torch.tensor(self.length, device=device).view(P, 1, G) + 1
        prompt_length = torch.tensor(self.prompt_length, device=device).view(P, 1)
        places = prompt_length[slot] + position[:, None]
        if self._few(rows):
            prompt_length, length = prompt_length[slot], position.view(-1, 1, 1) + 1
        dtype = self.own[0][0].dtype
        prompt_bias = length_bias(prompt_length.expand(-1, K), T, dtype)
        own_bias = length_bias(length.expand(-1, K, -1), S, dtype)
        ids = torch.tensor(tokens, device=device)[:, None]
        return [ids, places, slot, member, position, prompt_bias, own_bias]

    def _few(self, rows) -> bool:
        """Whether so few rows are fed that they are computed apart from the batch."""
        return FEW * len(rows) < self.slots * self.group

    def _forward(
        self, ids, places, slot, member, position, prompt_bias, own_bias
    ) -> Tensor:
        """[n, V] logits of a decode step; see `_inputs`."""
        at = (slot, slice(None), member, position)
        few = list(zip(slot.tolist(), member.tolist())) if self._few(ids) else []
        past = Decode(self.prompts, self.own, at, few, prompt_bias, own_bias)
        with self.policy.autocast():
            out = self.model.model(ids, position_ids=places, use_cache=False, past=past)
            return self.model.lm_head(out.last_hidden_state[:, 0])

    def _replay(self, inputs: list[Tensor]) -> Tensor:
        """`_forward` from a graph, captured anew when a buffer has grown, which the biases' shapes show."""
        if [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            self.inputs = inputs
            self.graph, self.logits = capture(partial(self._forward, *inputs))
        for x, new in zip(self.inputs, inputs):
            x.copy_(new)
        self.graph.replay()
        return self.logits


def capture(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of `step`, all of whose kernels one call then starts, and the tensor that gets the result.

    ModelError where the step reads a number from the GPU on its way, as some rotary embeddings do.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # libraries set themselves up
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, stream=stream):
            out = step()
    except RuntimeError as e:
        why = str(e).partition("\n")[0]
        raise ModelError(f"--cuda-graphs cannot be used here: {why}") from e
    return graph, out


def reserve(buffers: list[LayerKV], T: int) -> None:
    """Make room for T positions in buffers [..., T, D] and some to spare, so that they seldom grow."""
    x = buffers[0][0]
    if T > x.shape[-2]:
        more = room(T, x.is_cuda) - x.shape[-2]
        for layer, pair in enumerate(buffers):
            buffers[layer] = tuple(F.pad(x, (0, 0, 0, more)) for x in pair)


def room(T: int, on_gpu: bool) -> int:
    """How many positions a buffer gets where T are needed."""
    if not on_gpu:
        return T + max(SPARE[0], T // 2)
    # no freed block can hold a larger buffer, so it seldom grows; and matrix products
    # are fast with rows of whole 16 bytes
    size = T + SPARE[1]
    return size - size % 64


def covered(buffers: list[LayerKV], T: int) -> int:
    """How many of the buffers' positions a decode step that needs T computes with: few different numbers.

    On a GPU all of them, so that a captured step's shapes last.
    """
    x = buffers[0][0]
    return x.shape[-2] if x.is_cuda else min(x.shape[-2], T + -T % SPARE[0])


def length_bias(length: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """[n, 1, T] for `length` of n entries: 0 for the first `length` positions of each, -inf after them."""
    absent = torch.arange(T, device=length.device) >= length.reshape(-1, 1, 1)
    return torch.zeros_like(absent, dtype=dtype).masked_fill_(absent, -torch.inf)


def sample_tokens(
    logits: Tensor, temperature: float, uniform: Tensor, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """[B, V] logits to [B] tokens and [B] log-probabilities at `temperature`; 0 is greedy (log-probabilities at 1).

    Rows in the [B] mask `greedy` take the likeliest token. Inverse-CDF sampling from one uniform number a row, so that
    a row's tokens do not depend on its neighbours beyond rounding.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
    cdf = logprobs.exp().cumsum(-1)
    tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:]).squeeze(1)
    tokens = tokens.clamp(max=logits.shape[1] - 1)
    tokens = torch.where(greedy | (temperature == 0), logits.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def complete(policy: Policy, prompts: list[list[int]], limit: int = 80) -> list[str]:
    """Greedy continuations up to EOS or `limit` tokens, without what was thought before them."""
    if not prompts:
        return []
    live = list(range(len(prompts)))
    batch = RaggedBatch(policy, len(prompts), 1)
    batch.prefill(live, prompts)
    written = [[prompt[-1]] for prompt in prompts]
    for _ in range(limit):
        logits = batch.decode(live, [written[i][-1] for i in live])
        for i, token in zip(live, logits.argmax(-1).tolist()):
            written[i].append(token)
        live = [i for i in live if written[i][-1] not in policy.eos]
        if not live:
            break
    texts = (policy.tokenizer.decode(x[1:], skip_special_tokens=True) for x in written)
    return [text.rpartition("</think>")[2].strip() for text in texts]


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class TrainRow:
    """One trajectory for the update: its suffix ids, its action mask, and the index of its prompt."""

    prompt: int
    ids: list[int]
    action_mask: list[int]


def up_to_last_action(row: TrainRow) -> TrainRow:
    """The row without what comes after its last action; at least one token."""
    n = max((i for i, m in enumerate(row.action_mask, 1) if m), default=1)
    return replace(row, ids=row.ids[:n], action_mask=row.action_mask[:n])


def token_logprobs(
    policy: Policy,
    prompts: list[list[int]],
    rows: list[TrainRow],
    temperature: float = 1.0,
    shared: list | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] (with gradient) and entropies [N] of all action tokens, row after row.

    Each prompt's forward runs once (or has run: `shared` is from share_prompts) and its keys and values are shared, with
    gradient, by its rows; the vocabulary projection runs at action positions only. Training shifts logits to the next
    token here and nowhere else.
    """
    inputs = [[prompts[r.prompt][-1], *r.ids[:-1]] for r in rows]
    # all ranks of a sharded model must make equally many forwards, whatever their prompts
    layers = shared or share_prompts(policy, prompts, common=False)
    before = [[own[r.prompt] for r in rows] for own in layers]
    starts = [len(prompts[r.prompt]) - 1 for r in rows]
    hidden, _ = forward_packed(policy, policy.model, inputs, starts, before)
    mask = torch.tensor([m for r in rows for m in r.action_mask], device=policy.device)
    ids = torch.tensor([t for r in rows for t in r.ids], device=policy.device)
    chosen = mask.bool()
    with policy.autocast():
        return project(policy.model.lm_head, hidden[chosen], ids[chosen], temperature)


def project(head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float):
    """Log-probability and entropy of `targets` [N] from [N, C] states, in chunks so that few logits exist at once."""
    few = max(64, 2**18 // head.out_features)
    most = LOGITS[hidden.is_cuda] // head.out_features
    # multiples of `few`: freed memory of an odd size would not serve the next chunk
    size = max(few, most - most % few)
    run = project_chunk
    if len(targets) > size and torch.is_grad_enabled():
        run = partial(checkpoint, project_chunk, use_reentrant=False)
    chunks = zip(hidden.split(size), targets.split(size))
    parts = [run(head, *chunk, temperature, few) for chunk in chunks]
    return tuple(torch.cat(x) for x in zip(*parts))


def project_chunk(head, hidden, targets, temperature, few):
    """What `project` returns, of one chunk; a few rows at a time, whose fp32 copies stay in the processor's cache."""
    logits = head(hidden)  # n, V
    rows = zip(logits.split(few), targets.split(few))
    parts = [of_targets(*x, temperature) for x in rows]
    return tuple(torch.cat(x) for x in zip(*parts))


def of_targets(logits: Tensor, targets: Tensor, temperature: float):
    """Log-probabilities of `targets` [n] at `temperature`, and entropies, from [n, V] logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = torch.log_softmax(logits / temperature, -1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def micro_batches(prompts: list[list[int]], rows: list[TrainRow], micro_tokens: int):
    """Yield prompts and their rows, these in one or more parts; a prompt's rows must be adjacent.

    As many whole groups as `micro_tokens` hold, or one that is larger: its rows come in parts that fit beside the prompt.
    """
    groups = [list(group) for _, group in groupby(rows, key=lambda r: r.prompt)]
    lengths = [sum(len(r.ids) for r in g) + len(prompts[g[0].prompt]) for g in groups]
    for batch in fill(groups, lengths, micro_tokens):
        own = [prompts[group[0].prompt] for group in batch]
        members = [replace(r, prompt=i) for i, g in enumerate(batch) for r in g]
        left = micro_tokens - sum(map(len, own))
        yield own, list(fill(members, [len(r.ids) for r in members], left))


def fill(items: list, sizes: list[int], limit: int):
    """Split items, in order, into lists of at most `limit` in all, or of a single item."""
    part, total = [], 0
    for item, size in zip(items, sizes):
        if part and total + size > limit:
            yield part
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield part


class Float32Muon(Muon):
    """Muon in float32: torch's multiplies in bfloat16, which takes a CPU without such instructions five times as long."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                x = p.grad.lerp(buffer, momentum)  # Nesterov's
                x = orthogonalized(x, group["ns_coefficients"], group["ns_steps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(x, alpha=-0.2 * lr * max(p.shape) ** 0.5)  # "match_rms_adamw"


def orthogonalized(x: Tensor, coefficients: tuple, steps: int) -> Tensor:
    """[m, n] -> [m, n] with singular values near 1: Newton-Schulz, aX + b(XX')X + c(XX')²X in each step."""
    a, b, c = coefficients
    wide = x if len(x) <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if len(x) <= x.shape[1] else wide.T


def muon_and_adamw(model: nn.Module, lr: float, float32: bool) -> list[Optimizer]:
    """Muon for the weight matrices and AdamW for the rest; used by the warm-up only."""
    muon = Float32Muon if float32 else Muon
    matrices, rest = [], []
    for name, p in model.named_parameters():
        vectors = p.ndim != 2 or "embed" in name or "lm_head" in name
        (rest if vectors else matrices).append(p)
    return [
        muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


# ------------------------------------------------------------------------------------------------------ the tiny agent

TAGS = ("think", "tool_call", "observation", "answer")
TINY_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|agent|>{% endif %}"
)
TINY_PIECES = (  # what the byte-level BPE may not merge across: a call, a score, a number and a word are units
    r'\{"name": "[a-z_]+", "arguments": \{(?:"[a-z_]+": ")?|"?\}\}|\\boxed\{\[?|\]\}|:\d{1,2}(?!\d) ?| \(\d\)|'
    r" ?\d{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"
)


SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"


def tiny_shape(width: int, layers: int) -> dict[str, int]:
    """Sizes of a Qwen3 of this hidden size, a multiple of 64."""
    sizes = (width, 2 * width, layers, width // 32, width // 64, 32)
    return dict(zip(SIZES.split(), sizes, strict=True))


def tiny_tokenizer(texts: list[str]):
    """A byte-level BPE trained on `texts`; tags are single tokens and so are the candidate numbers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = pre_tokenizers.Split(Regex(TINY_PIECES), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|agent|>", *tags],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (part for text in texts for part in re.split("|".join(tags), text))
    tokenizer.train_from_iterator(parts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TINY_TEMPLATE,
    )


def build_tiny_agent(texts: list[str], size: dict[str, int]) -> Policy:
    """A randomly initialised small Qwen3 with a tokenizer trained on `texts`; any text encodes."""
    tokenizer = tiny_tokenizer(texts)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config)
    return Policy(model.eval(), tokenizer, torch.device("cpu"))


# -------------------------------------------------------------------------------------------------------------- memory

QWEN3 = {  # hidden size, intermediate size, layers, heads, embeddings shared with the head
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B-Instruct-2507": (2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
}
PROMPT = 2500  # tokens of a long prompt
# bytes saved for the backward pass by a token in a layer, for each unit of: width, heads, kv heads, inner size
SAVED = (26, 14, 14, 8)


def qwen3_config(name: str) -> PretrainedConfig:
    """The configuration of a known model, without a download."""
    *sizes, tied = QWEN3[name]
    shape = dict(zip(SIZES.split(), (*sizes, 8, 128), strict=True))
    return Qwen3Config(vocab_size=151_936, tie_word_embeddings=tied, **shape)


def memory_need(
    config: PretrainedConfig,
    n: int,
    sharded: bool,
    rows: int,
    prompts: int,
    new_tokens: int,
    micro_tokens: int,
    lora_rank: int = 0,
    grad_checkpoint: bool = False,
) -> dict[str, float]:
    """GB (10^9 bytes) that each of `n` GPUs needs at most, by part; weights in fp32, computation in bf16, AdamW.

    `prompts` of PROMPT tokens with `rows` answers of `new_tokens` are sampled at once, an update holds `micro_tokens`.
    The peak is what stays plus the larger of sampling and update. "Activations" are all that an update holds for its
    backward, and a chunk of logits. Not counted: attention scores of short sequences, and a prompt's keys and values,
    which each row's attention holds once more.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() for p in model.parameters())
    linear = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    trained = lora_rank * sum(m.in_features + m.out_features for m in linear) or size
    layers, width = config.num_hidden_layers, config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    cached = prompts * (PROMPT + SPARE[1]) + rows * (new_tokens + SPARE[1])
    units = (width, heads * head_dim, kv_heads * head_dim, config.intermediate_size)
    saved = layers * sum(a * x for a, x in zip(SAVED, units, strict=True))
    if grad_checkpoint:  # each layer's input, keys and values, and all of one layer
        saved = saved // layers + layers * 4 * (width + kv_heads * head_dim)
    # each forward that waits for its backward has bf16 matrices of its own: the prompts', and that of a common beginning
    matrices = sum(m.weight.numel() for m in linear)
    waiting = 0 if grad_checkpoint else 2 * matrices * (1 if sharded else 2)
    # a chunk's logits, in bf16 and fp32, and the head's gradient before it is added
    projected = 6 * min(LOGITS[1], micro_tokens * config.vocab_size)
    projected += 2 * config.vocab_size * width * (trained == size)
    # the whole copy under --shard holds embeddings in fp32, and a head tied to them once more in bf16
    embeddings = (4 if config.tie_word_embeddings else 2) * config.vocab_size * width
    split = n if sharded else 1
    need = {
        "weights": 4 * (size + trained * (trained < size)) / split,
        "gradients": 4 * trained / split,
        "Adam": 8 * trained / split,
        "bf16 copy": 2 * size + sharded * embeddings,
        "keys, values": 2 * 2 * layers * kv_heads * head_dim * cached,
        "activations": micro_tokens * saved + waiting + projected,
    }
    need = {part: x / 1e9 for part, x in need.items()}
    *stays, sampling, updating = need.values()
    return need | {"peak": sum(stays) + max(sampling, updating)}


def memory_table(need_of: Callable[[str, int, bool], dict]) -> str:
    """All known model sizes on one GPU (each of several needs as much) and on 4 with --shard; `need_of` calls memory_need."""
    lines = []
    for name in QWEN3:
        for n, sharded in ((1, False), (4, True)):
            need = need_of(name, n, sharded)
            how = f"{n} GPU" + "s" * (n > 1) + ", --shard" * sharded
            cells = " | ".join(f"{x:.0f}" for x in need.values())
            lines.append(f"| {name.partition('/')[2]} | {how} | {cells} |")
    head = f"| model | GPUs | {' | '.join(need)} |"
    return "\n".join([head, "|---" * (len(need) + 2) + "|", *lines])
