"""The policy: a Hugging Face causal LM whose rollout and update share the prompt's keys and values in a group.

G trajectories of one prompt have one prefix. `RaggedBatch` (sampling) and `token_logprobs` (training) compute it once and let
every row attend to it beside its own suffix; suffixes grow at their own pace and nothing is ever prefilled again.

How: transformers hands attention to a function registered by name and passes unknown keyword arguments of `forward`
on to it. Ours, `shared_prefix_attention`, receives `past`, which says what each new token may see. This works for any
decoder of transformers that uses the attention interface without sliding windows (Llama, Qwen2/3, SmolLM, ...).

The last prompt token is not part of the prefix: it is the first input of every row, so that its output predicts the
first action token. Shapes: P prompts, G rows a prompt, B = P*G, T tokens, H heads, K kv heads, D head size, V vocabulary.
"""

import json
import pathlib
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

LayerKV = tuple[torch.Tensor, torch.Tensor]


class ModelError(ValueError):
    """A model that cannot be used: one line that says why and what to do."""


# ----------------------------------------------------------------------------------------------------------- attention


@dataclass
class Past:
    """What the tokens of one forward see before them; one of four kinds of forward, by `kind`.

    prefill: rows are prompts; causal. suffix: row b sees prompt `owner[b]` and its own tokens up to `position`.
    decode: like suffix with one token a row, rows in P x G order, without copying the prompts' keys.
    packed (training): all sequences lie in one row without padding, `lengths` long; sequence i is causal and also
    sees all of prompt `owners[i]`, if there are prompts.
    """

    kind: str
    prompts: list[LayerKV] = field(
        default_factory=list
    )  # a layer: [P, K, T, D] keys and values (packed: lists of [K, T, D])
    own: list[LayerKV] | None = (
        None  # a layer: [B, K, S, D] buffers that sampling writes into
    )
    lengths: list[int] | None = None
    owners: list[int] | None = None
    owner: torch.Tensor | None = None  # [b] prompt of each row
    rows: torch.Tensor | None = None  # [b] which buffer rows these are
    position: torch.Tensor | None = (
        None  # [b, T] place of each token in its row's suffix
    )
    span: int = 0  # buffer columns in use
    prompt_mask: torch.Tensor | None = None  # [P, T] True where a prompt has a token
    mask: torch.Tensor | None = (
        None  # [b, 1, T, T_prompt + span] for suffix; [B, 1, 1, span] for decode
    )


def shared_prefix_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, past=None, **_
):
    """Attention of [b, H, T, D] queries as `past` says; without `past` plain causal attention. Returns [b, T, H, D]."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary left them in fp32
    repeat = query.shape[1] // key.shape[1]
    if past is None or past.kind == "prefill":
        if past is not None:
            past.prompts.append((key, value))
        out = F.scaled_dot_product_attention(
            query, *widen(key, value, repeat), is_causal=True, scale=scaling
        )
    elif past.kind == "packed":
        out = packed_attention(query, key, value, past, module.layer_idx, scaling)
    elif past.kind == "suffix":
        (prompt_k, prompt_v), (own_k, own_v) = (
            past.prompts[module.layer_idx],
            past.own[module.layer_idx],
        )
        at = (past.rows[:, None], slice(None), past.position)
        own_k[at], own_v[at] = key.transpose(1, 2), value.transpose(1, 2)
        key = torch.cat([prompt_k[past.owner], own_k[past.rows, :, : past.span]], 2)
        value = torch.cat([prompt_v[past.owner], own_v[past.rows, :, : past.span]], 2)
        out = F.scaled_dot_product_attention(
            query, *widen(key, value, repeat), attn_mask=past.mask, scale=scaling
        )
    else:
        out = decode_attention(query, key, value, past, module.layer_idx, scaling)
    return out.transpose(1, 2).contiguous(), None


def widen(key: torch.Tensor, value: torch.Tensor, repeat: int) -> LayerKV:
    """Repeat each kv head for the query heads that share it."""
    if repeat == 1:
        return key, value
    return key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)


def packed_attention(
    query, key, value, past: Past, layer: int, scaling: float
) -> torch.Tensor:
    """Attention of sequences packed in one row [1, H, N, D], each after its prompt; gradients reach shared prompts.

    One matrix product a sequence, small enough to stay in the cache; `split` (not slicing) keeps the backward linear.
    """
    queries, keys, values = (
        x[0].split(past.lengths, 1) for x in (query, key, value)
    )  # [H or K, S, D] each
    mask = past.mask  # [S, T + S] of the longest: False where a token may not look
    T_max = mask.shape[1] - mask.shape[0]
    out = []
    for i, (q, k, v) in enumerate(zip(queries, keys, values)):
        if past.owners is not None:
            prompt_k, prompt_v = past.prompts[layer]
            k, v = (
                torch.cat([prompt_k[past.owners[i]], k], 1),
                torch.cat([prompt_v[past.owners[i]], v], 1),
            )
        (H, S, D), (K, T, _) = q.shape, k.shape
        visible = mask[:S, T_max - (T - S) : T_max + S]
        if (
            H * S * T > 2**25
        ):  # too large to hold: let torch choose a kernel that never does
            k, v = widen(k[None], v[None], H // K)
            out.append(
                F.scaled_dot_product_attention(
                    q[None], k, v, attn_mask=visible, scale=scaling
                )[0]
            )
            continue
        scores = (q.reshape(K, -1, D) * scaling) @ k.transpose(1, 2)  # K, H/K * S, T
        weight = scores.view(K, -1, S, T).masked_fill(~visible, -torch.inf).softmax(-1)
        out.append((weight.view(K, -1, T) @ v).view(H, S, D))
    if past.owners is None:
        past.prompts.append((keys, values))
    return torch.cat(out, 1)[None]


def decode_attention(
    query, key, value, past: Past, layer: int, scaling: float
) -> torch.Tensor:
    """One token a row: scores against the group's prompt and the row's suffix, one softmax over both. [B, H, 1, D]"""
    (prompt_k, prompt_v), (own_k, own_v) = past.prompts[layer], past.own[layer]
    B, H, _, D = query.shape
    P, K, T, _ = prompt_k.shape
    G, R, S = B // P, H // K, past.span
    position = past.position[:, 0]
    own_k[past.rows, :, position], own_v[past.rows, :, position] = (
        key[:, :, 0],
        value[:, :, 0],
    )
    own_k, own_v = own_k[:, :, :S], own_v[:, :, :S]
    q = query.view(B, K, R, D) * scaling
    grouped = q.view(P, G, K, R, D).transpose(1, 2).reshape(P, K, G * R, D)
    to_prompt = (grouped @ prompt_k.transpose(2, 3)).masked_fill(
        ~past.prompt_mask[:, None, None], -torch.inf
    )
    to_prompt = to_prompt.view(P, K, G, R, T).transpose(1, 2).reshape(B, K, R, T)
    to_own = (q @ own_k.transpose(2, 3)).masked_fill(
        ~past.mask, -torch.inf
    )  # B, K, R, S
    weight = (
        torch.cat([to_prompt, to_own], -1)
        .softmax(-1, dtype=torch.float32)
        .to(query.dtype)
    )
    on_prompt = (
        weight[..., :T].view(P, G, K, R, T).transpose(1, 2).reshape(P, K, G * R, T)
        @ prompt_v
    )
    on_prompt = on_prompt.view(P, K, G, R, D).transpose(1, 2).reshape(B, K, R, D)
    return (on_prompt + weight[..., T:] @ own_v).reshape(B, H, 1, D)


AttentionInterface.register("shared_prefix", shared_prefix_attention)


# -------------------------------------------------------------------------------------------------------------- policy


@dataclass
class Policy:
    """A model with its tokenizer; `pieces` caches each token's text for finding stop tags."""

    model: torch.nn.Module
    tokenizer: object
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the computation; the weights stay fp32
    pieces: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        self.model.set_attn_implementation("shared_prefix")
        self.eos = (
            self.model.generation_config.eos_token_id
            if self.model.generation_config
            else None
        )
        self.eos = {
            self.tokenizer.eos_token_id,
            *(self.eos if isinstance(self.eos, list) else [self.eos]),
        } - {None}
        windows = {getattr(m, "sliding_window", None) for m in self.model.modules()} - {
            None
        }
        self.window = min(windows, default=None)
        added = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, added))) if added else None

    def piece(self, token: int) -> str:
        """Text of one token, for looking at the tail of a turn."""
        if token not in self.pieces:
            self.pieces[token] = self.tokenizer.decode([token])
        return self.pieces[token]

    def defuse(self, text: str) -> str:
        """Text from data with any string that the tokenizer would turn into a special token broken up."""
        return (
            self.added.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
            if self.added
            else text
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of text that continues a sequence (no BOS)."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, tags and special tokens kept."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def autocast(self):
        """bf16 compute over fp32 weights: at a learning rate of 1e-6 bf16 weights would swallow the update."""
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32
        )


def load_policy(path: str, device: str = "cpu", dtype: str = "float32") -> Policy:
    """Load a Hugging Face folder or hub id from safetensors, weights in fp32, without remote code."""
    folder = pathlib.Path(path)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{path}: no *.safetensors; convert the weights (pickles are not loaded)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be loaded: {str(e).splitlines()[0]}") from e
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{path}: the tokenizer has no chat template; use an instruct model or set one"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"{path}: {len(tokenizer)} tokens but {model.get_input_embeddings().num_embeddings} embeddings"
        )
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise ModelError(
            f"{path}: some weights are not finite; the checkpoint is damaged"
        )
    return Policy(
        model.to(device).eval(), tokenizer, torch.device(device), getattr(torch, dtype)
    )


def save_policy(policy: Policy, folder: pathlib.Path) -> None:
    """Write a folder that AutoModelForCausalLM loads."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def pad_ids(
    sequences: list[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, T] ids padded with 0 on the right, and the [n, T] mask of real tokens."""
    T = max(1, max(len(s) for s in sequences))
    ids = torch.tensor([s + [0] * (T - len(s)) for s in sequences], device=device)
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    return ids, torch.arange(T, device=device)[None] < lengths[:, None]


# ------------------------------------------------------------------------------------------------------------ sampling


class RaggedBatch:
    """Keys and values of `slots` prompts with `group` rows each, while sampling.

    Row r belongs to slot r // group. `prefill` puts prompts into slots, `extend` feeds several known tokens to some
    rows, `decode` feeds one token to every row and returns the logits of the next.
    """

    def __init__(self, policy: Policy, slots: int, group: int):
        self.policy, self.slots, self.group = policy, slots, group
        self.prompts: list[LayerKV] = []
        self.own: list[LayerKV] = []
        self.prompt_length = torch.zeros(slots, dtype=torch.long, device=policy.device)
        self.length = torch.zeros(
            slots * group, dtype=torch.long, device=policy.device
        )  # tokens in each suffix
        self.longest = (
            0  # of the suffixes, so that no step waits for the device to tell
        )

    @torch.inference_mode()
    def prefill(self, slots: list[int], prompts: list[list[int]]) -> None:
        """Compute the prompts' keys and values (all but their last token) and empty the slots' rows."""
        ids, _ = pad_ids([p[:-1] for p in prompts], self.policy.device)
        past = Past("prefill")
        with self.policy.autocast():
            self.policy.model.model(ids, use_cache=False, past=past)
        new_T = ids.shape[1]
        if not self.prompts:
            shape = [(k.shape[1], k.shape[3], k.dtype) for k, _ in past.prompts]
            self.prompts = [self._pair(self.slots, K, new_T, D, t) for K, D, t in shape]
            self.own = [
                self._pair(self.slots * self.group, K, 64, D, t) for K, D, t in shape
            ]
        if new_T > self.prompts[0][0].shape[2]:
            self.prompts = [grow(pair, new_T) for pair in self.prompts]
        for (k, v), (new_k, new_v) in zip(self.prompts, past.prompts):
            k[slots, :, :new_T], v[slots, :, :new_T] = new_k, new_v
        for slot, prompt in zip(slots, prompts):
            self.prompt_length[slot] = len(prompt) - 1
            self.length[slot * self.group : (slot + 1) * self.group] = 0
        self.longest = int(self.length.max())

    def _pair(self, n: int, heads: int, T: int, D: int, dtype: torch.dtype) -> LayerKV:
        empty = torch.zeros(n, heads, T, D, dtype=dtype, device=self.policy.device)
        return empty, empty.clone()

    def _past(self, kind: str, position: torch.Tensor, rows: torch.Tensor) -> Past:
        buffers = {"prompts": self.prompts, "own": self.own}
        return Past(kind, **buffers, rows=rows, position=position, span=self.longest)

    def _reserve(self, n: int) -> None:
        self.longest += n
        if self.longest > self.own[0][0].shape[2]:
            self.own = [grow(pair, 2 * self.longest) for pair in self.own]

    @torch.inference_mode()
    def extend(self, rows: list[int], tokens: list[list[int]]) -> None:
        """Append known tokens (an observation) to some rows, each at its own position."""
        ids, real = pad_ids(tokens, self.policy.device)
        self._reserve(ids.shape[1])
        at = torch.tensor(rows, device=self.policy.device)
        owner = at // self.group
        position = self.length[at, None] + torch.arange(
            ids.shape[1], device=ids.device
        )  # b, T
        past = self._past("suffix", position, at)
        past.owner = owner
        past.mask = suffix_mask(
            self.prompt_length,
            self.prompts[0][0].shape[2],
            owner,
            position,
            self.longest,
        )
        with self.policy.autocast():
            self.policy.model.model(
                ids,
                position_ids=self.prompt_length[owner, None] + position,
                use_cache=False,
                past=past,
            )
        self.length[at] += real.sum(1)
        self.longest = int(self.length.max())

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Feed [B] tokens, one a row, and return [B, V] fp32 logits; rows not `active` [B] are left as they were."""
        self._reserve(1)
        position = self.length[:, None]
        T = self.prompts[0][0].shape[2]
        past = self._past(
            "decode", position, torch.arange(len(tokens), device=tokens.device)
        )
        past.prompt_mask = (
            torch.arange(T, device=tokens.device)[None] < self.prompt_length[:, None]
        )
        past.mask = (
            torch.arange(self.longest, device=tokens.device)[None] <= position
        )[:, None, None]
        places = self.prompt_length.repeat_interleave(self.group)[:, None] + position
        with self.policy.autocast():
            out = self.policy.model.model(
                tokens[:, None], position_ids=places, use_cache=False, past=past
            )
            logits = self.policy.model.lm_head(out.last_hidden_state[:, 0])
        self.length += active
        return logits.float()


def grow(pair: LayerKV, T: int) -> LayerKV:
    """Buffers with room for T positions and the same content."""
    return tuple(F.pad(x, (0, 0, 0, T - x.shape[2])) for x in pair)


def suffix_mask(
    prompt_length, T_prompt: int, owner, position, span: int
) -> torch.Tensor:
    """[b, 1, T, T_prompt + span]: a token sees its prompt and its row's suffix up to its own position."""
    device = position.device
    prompt = (
        torch.arange(T_prompt, device=device)[None] < prompt_length[owner, None]
    )  # b, T_prompt
    own = (
        torch.arange(span, device=device)[None, None] <= position[..., None]
    )  # b, T, span
    return torch.cat([prompt[:, None].expand(-1, own.shape[1], -1), own], -1)[:, None]


def sample_tokens(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, V] logits to [B] tokens and [B] log-probabilities at `temperature`; 0 is greedy (log-probabilities at 1).

    Inverse-CDF sampling from one uniform number a row, so that a row's tokens do not depend on its neighbours.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        tokens = (
            torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:])
            .squeeze(1)
            .clamp(max=logits.shape[1] - 1)
        )
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class TrainRow:
    """One trajectory for the update: its suffix ids, its action mask, and the index of its prompt."""

    prompt: int
    ids: list[int]
    action_mask: list[int]


def token_logprobs(
    policy: Policy,
    prompts: list[list[int]],
    rows: list[TrainRow],
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [N] (with gradient) and entropies [N] of all action tokens, row after row.

    Each prompt's forward runs once and its keys and values are shared, with gradient, by its rows; the vocabulary
    projection runs at action positions only. The shift from logits to tokens happens here and nowhere else.
    """
    device = policy.device
    assert min(map(len, prompts)) > 1, "a prompt needs at least 2 tokens"
    prefixes = [p[:-1] for p in prompts]
    inputs = [[prompts[r.prompt][-1], *r.ids[:-1]] for r in rows]
    starts = [len(prefixes[r.prompt]) for r in rows]
    is_action = torch.tensor(
        [m for r in rows for m in r.action_mask], device=device
    ).bool()
    targets = torch.tensor([t for r in rows for t in r.ids], device=device)[is_action]
    longest = max(max(map(len, inputs)), max(map(len, prefixes)))
    column = torch.arange(longest + max(map(len, prefixes)), device=device)
    mask = column[None] <= column[:longest, None] + max(map(len, prefixes))
    shared = Past("packed", lengths=[len(p) for p in prefixes], mask=mask)
    suffix = Past(
        "packed",
        shared.prompts,
        lengths=[len(i) for i in inputs],
        owners=[r.prompt for r in rows],
        mask=mask,
    )
    with policy.autocast():
        for past, ids, first in (
            (shared, prefixes, [0] * len(prefixes)),
            (suffix, inputs, starts),
        ):
            flat = torch.tensor([[t for s in ids for t in s]], device=device)
            places = torch.cat(
                [torch.arange(f, f + len(s), device=device) for f, s in zip(first, ids)]
            )[None]
            out = policy.model.model(
                flat, position_ids=places, use_cache=False, past=past
            )
        hidden = out.last_hidden_state[0, is_action]  # N, C
        return project(policy.model.lm_head, hidden, targets, temperature)


def project(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
):
    """Log-probability and entropy of `targets` [N] from [N, C] states, in chunks so that few logits exist at once."""
    size = max(64, 2**25 // head.out_features)
    parts = []
    for a in range(0, len(targets), size):
        arguments = (head, hidden[a : a + size], targets[a : a + size], temperature)
        chunked = len(targets) > size and torch.is_grad_enabled()
        parts.append(
            checkpoint(project_chunk, *arguments, use_reentrant=False)
            if chunked
            else project_chunk(*arguments)
        )
    return tuple(torch.cat(p) for p in zip(*parts))


def project_chunk(head, hidden, targets, temperature):
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # n, V
    logprobs = torch.log_softmax(logits / temperature, -1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def micro_batches(prompts: list[list[int]], rows: list[TrainRow], micro_tokens: int):
    """Split into (prompts, rows) parts of at most about `micro_tokens` padded tokens, rows of a prompt together."""
    by_prompt: dict[int, list[TrainRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    part_prompts, part_rows, longest = [], [], 0
    for index, group in by_prompt.items():
        for row in group:
            new = not part_prompts or part_prompts[-1] is not prompts[index]
            width = max(longest, len(row.ids))
            tokens = (
                width * (len(part_rows) + 1)
                + sum(map(len, part_prompts))
                + new * len(prompts[index])
            )
            if part_rows and tokens > micro_tokens:
                yield part_prompts, part_rows
                part_prompts, part_rows, longest, new = [], [], 0, True
            if new:
                part_prompts.append(prompts[index])
            longest = max(longest, len(row.ids))
            part_rows.append(TrainRow(len(part_prompts) - 1, row.ids, row.action_mask))
    if part_rows:
        yield part_prompts, part_rows


# ------------------------------------------------------------------------------------------------------ the tiny agent

TAGS = ("think", "tool_call", "observation", "answer")
TINY_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|agent|>{% endif %}"
)
TINY_PIECES = (  # what the byte-level BPE may not merge across: a call, a score, a number and a word are units
    r'\{"name": "[a-z_]+", "arguments": \{(?:"[a-z_]+": ")?|"?\}\}|\\boxed\{\[?|\]\}|:\d(?!\d) ?| \(\d\)|'
    r" ?\d{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"
)


def build_tiny_agent(
    texts: list[str], size: dict | None = None, vocabulary: int = 1024, seed: int = 0
) -> Policy:
    """A randomly initialised small Qwen3 with a byte-level BPE trained on `texts`; any text encodes.

    Tags are single tokens and so are the candidate numbers; the chat template leaves the long system prompt out.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from tokenizers import decoders as token_decoders
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(TINY_PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = token_decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|agent|>"] + [
        f"<{s}{t}>" for t in TAGS for s in ("", "/")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tags = re.compile(f"</?(?:{'|'.join(TAGS)})>")
    tokenizer.train_from_iterator(
        (part for text in texts for part in tags.split(text)), trainer
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TINY_TEMPLATE,
    )
    shape = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    } | (size or {})
    config = Qwen3Config(
        vocab_size=len(wrapped),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        bos_token_id=None,
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return Policy(model.eval(), wrapped, torch.device("cpu"))


def config_line(policy: Policy) -> str:
    """Architecture and size in a few words."""
    n = sum(p.numel() for p in policy.model.parameters())
    return f"{json.loads(policy.model.config.to_json_string()).get('model_type')} {n / 1e6:.1f}M parameters"
