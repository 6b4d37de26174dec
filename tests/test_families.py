"""Chat models of the Llama, Qwen2, Qwen3, Gemma and SmolLM families, small and untrained, with the families' own habits.

Each has its family's template, its special tokens and a tokenizer that knows no tags. What differs: a BOS that both the template
and the tokenizer would add, a pad token that is missing or is the EOS, an EOS that only generation_config.json or only
the template names, more embeddings than tokens, no system role.
"""

import shutil
import string
from dataclasses import dataclass, replace

import huggingface_hub
import pytest
import torch
import transformers
from test_engine import dense_logprobs, scripted
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as ev
from model import ModelError, Policy, TrainRow, load_policy, save_policy, token_logprobs
from rollout import STOPS, Rollout, Task, build_prompt, check_context, rollout

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ START }}{% endif %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SMOLLM = "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n"
LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


@dataclass(frozen=True)
class Family:
    """What its checkpoints say; `ends` are all the tokens that end a turn, `opens` and `asks` frame the user's part."""

    kind: str  # of the configuration
    template: str
    special: tuple[str, ...]
    eos: str  # the tokenizer's
    pad: str | None
    bos: str | None
    generation_eos: tuple[str, ...]
    ends: set[str]
    opens: str
    asks: str
    more: dict


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
ASKS = "<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {
    "llama": Family(
        "Llama", LLAMA3, ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        "<|eot_id|>", None, "<|begin_of_text|>", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}},
    ),
    "qwen2": Family(
        "Qwen2", CHATML.replace("{{ START }}", ""), IM, "<|im_end|>", "<|endoftext|>", None, ("<|im_end|>", "<|endoftext|>"),
        {"<|im_end|>", "<|endoftext|>"}, "<|im_start|>system\n", ASKS, {"extra": 40},
    ),
    "qwen3": Family(
        "Qwen3", CHATML.replace("{{ START }}", ""), IM + QWEN3_TAGS, "<|im_end|>", "<|endoftext|>", None, ("<|im_end|>", "<|endoftext|>"),
        {"<|im_end|>", "<|endoftext|>"}, "<|im_start|>system\n", ASKS, {"extra": 40, "head_dim": 24, "tie_word_embeddings": True},
    ),
    "gemma": Family(
        "Gemma", GEMMA, ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<pad>", "<bos>", ("<eos>",),
        {"<eos>", "<end_of_turn>"}, "<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", {"head_dim": 24},
    ),
    "smollm": Family(
        "Llama", CHATML.replace("{{ START }}", SMOLLM), IM, "<|im_end|>", "<|im_end|>", "<|im_start|>", ("<|im_end|>",),
        {"<|im_end|>"}, "<|im_start|>system\n", ASKS, {"tie_word_embeddings": True},
    ),
}  # fmt: skip


def make_tokenizer(family: Family, texts: list[str]):
    """A small BPE, byte-level or (Gemma) of characters with its word separator; a BOS is added as the family does."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = list(string.printable)
    if family.kind == "Gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁]+"), "isolated")
        tokenizer.decoder = decoders.Replace("▁", " ")
    else:
        split = pre_tokenizers.Split(Regex(WORDS), "isolated")
        whole = pre_tokenizers.ByteLevel(False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(family.special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([t + "\n" for t in texts], trainer)
    if family.kind == "Gemma" or family.bos == "<|begin_of_text|>":
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        chat_template=family.template,
    )


def make_policy(family: Family, texts: list[str], **more) -> Policy:
    tokenizer = make_tokenizer(family, texts)
    ids = tokenizer.convert_tokens_to_ids
    more = family.more | more
    config = getattr(transformers, f"{family.kind}Config")(
        vocab_size=len(tokenizer) + more.pop("extra", 0),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=ids(family.bos) if family.bos else None,
        eos_token_id=ids(family.eos),
        pad_token_id=ids(family.pad) if family.pad else None,
        **more,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [ids(t) for t in family.generation_eos]
    return Policy(model.eval(), tokenizer, torch.device("cpu"))


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def agent(family, texts, tmp_path):
    """The family's policy as it comes from a folder, with sampling settings that must not leak in."""
    policy = make_policy(family, texts)
    policy.model.generation_config.update(do_sample=True, temperature=9.0, top_k=3)
    save_policy(policy, tmp_path / "first")
    return load_policy(str(tmp_path / "first"))


def test_a_family_from_its_template_to_reloading(family, agent, ctx, monkeypatch, tmp_path):  # fmt: skip
    tasks = [Task(s) for s in ctx.ds.splits["train"][:4]]
    prompt = build_prompt(agent, ctx, tasks[0], ("get_user_profile",), 10)
    text, bos = agent.decode(prompt), agent.tokenizer.bos_token_id
    assert text.startswith(family.opens + "You are a recommender.")
    assert text.endswith("Rank." + family.asks)
    assert text.count("You are a recommender") == text.count("History:\n") == 1
    if family.bos and family.bos != "<|im_start|>":
        assert prompt.count(bos) == 1 and prompt[0] == bos
    assert agent.eos == set(agent.tokenizer.convert_tokens_to_ids(sorted(family.ends)))
    known = set(QWEN3_TAGS) & set(family.special)
    assert all((len(agent.encode(t)) == 1) == (t in known) for t in STOPS)

    greedy = rollout(agent, ctx, tasks[:2], group_size=2, temperature=0, max_new_tokens=12)  # fmt: skip
    agent.model.generation_config.update(do_sample=False, temperature=None, top_k=None)
    save_policy(agent, tmp_path / "second")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert tokenizer.get_vocab() == agent.tokenizer.get_vocab()
    for group in greedy:
        ids = torch.tensor([group[0].prompt])
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
        assert group[0].ids == group[1].ids == out[ids.shape[1] :]

    scripted(agent, ctx, monkeypatch)
    groups = rollout(agent, ctx, tasks, group_size=2, slots=2, max_new_tokens=3000)
    everyone = [t for group in groups for t in group]
    assert all(t.end == "answer" and t.valid for t in everyone)
    assert len({len(t.calls) for t in everyone}) > 1
    rows = [TrainRow(p, t.ids, t.action_mask) for p, g in enumerate(groups) for t in g]
    prompts = [group[0].prompt for group in groups]
    sampled = [x for t in everyone for x, m in zip(t.logprobs, t.action_mask) if m]
    with torch.no_grad():
        dense = dense_logprobs(agent, prompts, rows)
        shared, _ = token_logprobs(agent, prompts, rows)
    assert torch.allclose(torch.tensor(sampled), dense, atol=1e-4)
    assert torch.allclose(shared, dense, atol=1e-4)


def test_a_window_that_slides_is_the_limit_and_soft_caps_are_refused(texts, tmp_path):
    gemma = FAMILIES["gemma"]
    kinds = {"3Text": {"sliding_window": 512}, "2": {}}
    third, second = (
        make_policy(replace(gemma, kind="Gemma" + kind), texts, **more)
        for kind, more in kinds.items()
    )
    check_context(third, 400, 112)
    with pytest.raises(ModelError, match="sliding attention window of 512 by 1"):
        check_context(third, 400, 113)
    save_policy(second, tmp_path)
    with pytest.raises(ModelError) as e:
        load_policy(str(tmp_path))
    told = "attn_logit_softcapping and final_logit_softcapping of gemma2 is not supported"  # fmt: skip
    assert str(e.value) == f"{tmp_path}: {told}"


def test_scaled_logits_are_refused(texts, tmp_path):
    """Granite divides its logits after lm_head: sampling from lm_head's would be at another temperature."""
    size = {
        "vocab_size": 2000,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "logits_scaling": 8.0}
    config = transformers.GraniteConfig(**size, **heads)
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer(FAMILIES["qwen2"], texts).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="granite does not compute as our engine does"):
        load_policy(str(tmp_path))


LFM2 = {"layer_types": ["conv", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "more"), [("DiffLlama", {}), ("Lfm2", LFM2), ("StableLm", {})]
)
def test_layers_that_do_not_attend_as_ours_are_refused(kind, more, texts, tmp_path):
    """Without the check the first samples wrong text silently, the others fail in the first rollout."""
    tokenizer = make_tokenizer(FAMILIES["qwen2"], texts)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, kind + "Config")
    torch.manual_seed(1)
    config = config(**sizes, **heads, **more, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not compute as our engine does"):
        load_policy(str(tmp_path))


def test_a_template_that_drops_the_system_prompt_is_refused(policy, tmp_path):
    """The bundled agent's does so on purpose; any other model would never hear of its tools."""
    save_policy(policy, tmp_path)
    assert load_policy(str(tmp_path))
    policy.tokenizer.chat_template += " "
    save_policy(policy, tmp_path)
    with pytest.raises(ModelError, match="leaves the system prompt out silently"):
        load_policy(str(tmp_path))


def test_a_template_may_open_the_first_thought(ctx, policy):
    """Qwen3's thinking models: the tag is in the prompt, and what stands in the thought is neither call nor answer."""
    policy.tokenizer.chat_template += "<think>"
    task, k = Task(ctx.ds.splits["train"][0]), 3
    rollouts = Rollout(policy, ctx, [task], group_size=1, k=k)
    (row,) = rollouts.begin(task)
    turn = "I can write <tool_call> or <answer> now.</think><answer>\\boxed{[4,20,6]}</answer>"
    row.trajectory.ids = policy.encode(turn)
    rollouts.respond(row, "</answer>")
    assert (row.trajectory.end, row.trajectory.answer) == ("answer", [4, 20, 6])


def test_an_unknown_architecture_is_refused_in_one_line(texts, tmp_path):
    sizes = {"vocab_size": 500, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    make_tokenizer(FAMILIES["qwen2"], texts).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the architecture of gpt2 is not supported"):
        load_policy(str(tmp_path))


def test_a_space_that_the_decoder_strips_is_no_stop_tag(texts):
    """Llama 2 and Mistral: the decoder drops the first token's space, so that "< /answer>" would look like the tag."""
    policy = make_policy(FAMILIES["smollm"], texts)
    backend = Tokenizer(models.BPE({"▁/": 0, "<": 1, "answer": 2, ">": 3}, []))
    strip = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    policy.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert policy.decode([0]) == "/"
    assert "".join(map(policy.piece, [1, 0, 2, 3])) == "< /answer>"


def test_no_special_token_survives_in_data_however_short(policy):
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["!", "<|x|>"]})
    policy = replace(policy)
    for special in ("!", "<|x|>"):
        (forbidden,) = policy.encode(special)
        ids = policy.encode(policy.defuse(f"Pen{special} now"))
        assert forbidden not in ids and policy.decode(ids).startswith("Pen")


def test_a_hub_id_is_read_from_the_cache(tmp_path, monkeypatch):
    """Without a network: as `--model owner/name` after a download; eval.py tells its versions apart by the commit."""
    repo, commit = tmp_path / "models--owner--tiny", "0123456789" * 4
    shutil.copytree(ev.HERE / "assets" / "tiny-agent", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_policy("owner/tiny").describe() == "qwen3 2.6M parameters"
    assert ev.identity("owner/tiny") == f"owner/tiny@{commit}"
    with pytest.raises(ModelError) as e:
        load_policy("owner/other")
    assert str(e.value).startswith("owner/other: cannot be loaded: ")
    assert str(e.value).endswith("; no such folder, and no hub id in reach")
