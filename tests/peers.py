"""One training step three ways: ours, plain Hugging Face and TRL's GRPOTrainer, all held to one script (for bench.py).

Weights, prompts, temperature and the length of every turn come from one `Case`; nobody may stop early, and observations
are given (the time of the tools is nobody's). What is replaced to hold each to the script:
- ours: `rollout` with a subclass of `Rollout` that ends turns by counting tokens instead of reading them;
- plain: nothing. `generate` with a logits processor, the whole conversation prefilled in each turn, and an update with
  dense padded forwards of `peer_rows` sequences, logits at completions only;
- trl (pip install trl): GRPOTrainer and its own tool loop on transformers' generation, which prefills each turn too,
  with the same processor; reading calls from text and writing observations as chat are replaced by the script.
"""

import functools
import pathlib
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rollout as engine
from data import load_dataset
from grpo import policy_gradient
from model import Policy, checkpoint_layers, load_policy
from sasrec import SASRec
from tools import Context
from train import parse_args

TINY = vars(parse_args([]))  # the settings of `python train.py`
AGENT = pathlib.Path(__file__).resolve().parents[1] / "assets" / "tiny-agent"
Turn = tuple[int, list[int]]  # how many tokens are written, and the observation's ids


@dataclass
class Case:
    """The work of one step: P prompts, and for each its G rows' turns; only a row's last turn lacks an observation."""

    model: str  # folder with config and tokenizer; without weights they are drawn from seed 0
    prompts: list[list[int]]
    groups: list[list[list[Turn]]]
    temperature: float = 1.0
    micro_tokens: int = TINY["micro_tokens"]
    slots: int = 16

    @property
    def rows(self) -> list[list[Turn]]:
        return [turns for group in self.groups for turns in group]

    @property
    def longest(self) -> int:
        return max(sum(n + len(seen) for n, seen in turns) for turns in self.rows)


def uniform_case(model: str, P, G, prompt, tool_turns=(), answer=0, seed=0, **rest):
    """P random prompts of `prompt` tokens; each row writes `tool_turns` (written, observed) and then `answer` tokens."""
    rng = np.random.default_rng(seed)
    V = AutoConfig.from_pretrained(model).vocab_size
    draw = functools.partial(rng.integers, 3, V)
    turns = [[*tool_turns, (answer, 0)] for _ in range(P * G)]
    rows = [[(n, draw(size=seen).tolist()) for n, seen in row] for row in turns]
    prompts = [draw(size=prompt).tolist() for _ in range(P)]
    return Case(model, prompts, [rows[p * G : (p + 1) * G] for p in range(P)], **rest)


def main_job_case(quick: bool) -> Case:
    """The bundled agent's own prompts and turns: one rollout with the tiny preset's settings, lengths written down."""
    ds = load_dataset("office-sim")
    ctx = Context(ds, SASRec(len(ds.items)).eval())  # unfitted: only lengths matter
    tasks = [
        engine.Task(s) for s in ds.splits["train"][: 2 if quick else TINY["batch"]]
    ]
    names = ("group_size", "temperature", "greedy_answer", "max_new_tokens")
    settings = {name: TINY[name] for name in names}
    if quick:
        settings |= {"group_size": 2, "max_new_tokens": 60}
    groups = engine.rollout(load_policy(str(AGENT)), ctx, tasks, **settings)
    turns = [[split_turns(t.ids, t.action_mask) for t in group] for group in groups]
    return Case(str(AGENT), [g[0].prompt for g in groups], turns, TINY["temperature"])


def split_turns(ids: list[int], action_mask: list[int]) -> list[Turn]:
    """(tokens written, observation) of each turn."""
    turns, start = [], 0
    while start < len(ids):
        seen = action_mask.index(0, start) if 0 in action_mask[start:] else len(ids)
        end = action_mask.index(1, seen) if 1 in action_mask[seen:] else len(ids)
        turns.append((seen - start, ids[seen:end]))
        start = end
    return turns


class Stopwatch:
    """Seconds of one step's rollout and update."""

    def __init__(self, device: str):
        self.device = device
        self.begin = self.now()

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rolled(self) -> None:
        self.middle = self.now()

    def seconds(self) -> dict[str, float]:
        end = self.now()
        return {"rollout": self.middle - self.begin, "update": end - self.middle}


def check_work(case: Case, done: list[tuple[int, int]]) -> None:
    """Each row must have as many tokens, and as many of them written by the model, as the script says."""
    want = [
        (sum(n + len(seen) for n, seen in turns), sum(n for n, _ in turns))
        for turns in case.rows
    ]
    assert done == want, f"a peer did other work than the script: {done} for {want}"


# ---------------------------------------------------------------------------------------------------------------- ours


class ScriptedRollout(engine.Rollout):
    """The real rollout, except that a turn ends after a given number of tokens; its task is (id, turns of the rows)."""

    def take(self, row, token, logprob):
        super().take(row, token, logprob)  # finds no tag: `pieces` below has none
        t = row.trajectory
        if not hasattr(row, "turns"):
            row.turns = list(t.task.waiting.pop(0))
        if len(t.ids) - row.turn_start < row.turns[0][0]:
            return
        _, seen = row.turns.pop(0)
        engine.append(t, seen)
        row.pending += seen
        row.turn_start = len(t.ids)
        t.end = "" if row.turns else "answer"


@dataclass
class ScriptedTask:
    key: tuple[int]
    prompt: list[int]
    waiting: list[list[Turn]]  # turns of the rows that have not begun


def open_policy(case: Case, device: str, dtype: str) -> Policy:
    if list(pathlib.Path(case.model).glob("*.safetensors")):
        return load_policy(case.model, device, dtype)
    parts = open_model(case, device), AutoTokenizer.from_pretrained(case.model)
    return Policy(*parts, torch.device(device), getattr(torch, dtype))


def scripted_policy(case: Case, device: str, dtype: str, lora_rank: int = 0) -> Policy:
    """Our policy, with nothing in what it writes that could end a turn."""
    policy = open_policy(case, device, dtype)
    if lora_rank:
        from model import add_lora

        add_lora(policy, lora_rank)
    vocabulary = policy.model.config.vocab_size
    policy.eos, policy.pieces = set(), dict.fromkeys(range(vocabulary), ".")
    engine.Rollout = ScriptedRollout
    engine.build_prompt = scripted_prompt
    return policy


def scripted_prompt(policy, ctx, task, *_) -> list[int]:
    return task.prompt


def scripted_rollout(policy: Policy, case: Case) -> list[list[engine.Trajectory]]:
    """`rollout` on the case; every second trajectory gets a reward."""
    work = enumerate(zip(case.prompts, case.groups))
    tasks = [ScriptedTask((p,), prompt, list(rows)) for p, (prompt, rows) in work]
    groups = engine.rollout(
        policy,
        None,
        tasks,
        group_size=len(case.groups[0]),
        temperature=case.temperature,
        max_new_tokens=case.longest + 1,
        slots=case.slots,
    )
    for i, t in enumerate(t for group in groups for t in group):
        t.reward = float(i % 2)
    return groups


def ours(case: Case, args) -> list[dict]:
    """Steps of `rollout` and `policy_gradient`, with clipping and AdamW as in train.py."""
    policy = scripted_policy(case, args.device, args.dtype, args.lora_rank)
    policy.graphs = bool(args.cuda_graphs)
    if args.checkpointing:
        checkpoint_layers(policy)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    how = {"weight_decay": 0.0, "fused": args.device == "cuda"}
    optimizer = torch.optim.AdamW(parameters, 1e-6, **how)
    limits = {"temperature": case.temperature, "micro_tokens": case.micro_tokens}
    steps = []
    for _ in range(1 + args.steps):
        watch = Stopwatch(args.device)
        groups = scripted_rollout(policy, case)
        watch.rolled()
        policy_gradient(policy, groups, **limits)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(watch.seconds())
        check_work(case, [(len(t.ids), sum(t.action_mask)) for g in groups for t in g])
    return steps


# -------------------------------------------------------------------------------------------------- plain Hugging Face


def open_model(case: Case, device: str):
    """transformers' own model in fp32: the folder's weights, or random ones made on the device."""
    if list(pathlib.Path(case.model).glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
        return model.to(device)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(case.model))


class TurnLengths:
    """Logits processor: row i writes exactly lengths[i] tokens, the last one stops[0], and none of `stops` before."""

    def __init__(self, lengths: list[int], start: int, stops: list[int], device):
        self.lengths, self.start = torch.tensor(lengths, device=device), start
        self.stops = stops

    def __call__(self, ids, scores):
        last = ids.shape[1] - self.start + 1 == self.lengths
        scores[:, self.stops] = -torch.inf
        scores[:, self.stops[0]] = torch.where(last, 1e9, -torch.inf)
        return scores


def left_padded(
    sequences: list[list[int]], device
) -> tuple[torch.Tensor, torch.Tensor]:
    T = max(map(len, sequences))
    ids = torch.tensor([[0] * (T - len(s)) + s for s in sequences], device=device)
    seen = torch.tensor([[0] * (T - len(s)) + [1] * len(s) for s in sequences])
    return ids, seen.to(device)


def plain_rollout(model, case: Case) -> list[tuple[list[int], list[int]]]:
    """(ids, action mask) of each row: `generate` on everything so far, once a turn, for the rows that go on."""
    G, stop, device = len(case.groups[0]), 0, model.device
    rows = [(list(case.prompts[i // G]), []) for i in range(len(case.rows))]
    for turn in range(max(map(len, case.rows))):
        live = [i for i, turns in enumerate(case.rows) if turn < len(turns)]
        lengths = [case.rows[i][turn][0] for i in live]
        ids, seen = left_padded([rows[i][0] for i in live], device)
        out = model.generate(
            ids,
            attention_mask=seen,
            do_sample=True,
            temperature=case.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(lengths),
            eos_token_id=stop,
            pad_token_id=stop,
            logits_processor=[TurnLengths(lengths, ids.shape[1], [stop], device)],
        )
        for i, n, new in zip(live, lengths, out[:, ids.shape[1] :].tolist()):
            observation = case.rows[i][turn][1]
            rows[i][0].extend(new[:n] + observation)
            rows[i][1].extend([1] * n + [0] * len(observation))
    return [(ids[-len(mask) :], mask) for ids, mask in rows]


def plain_update(model, case: Case, rows, peer_rows: int, autocast) -> None:
    """Padded forwards of `peer_rows` prompts with completions, logits of completions, summed policy gradient."""
    G, device = len(case.groups[0]), model.device
    for a in range(0, len(rows), peer_rows):
        part = rows[a : a + peer_rows]
        C = max(len(ids) for ids, _ in part)
        right = [ids + [0] * (C - len(ids)) for ids, _ in part]
        mask = [m + [0] * (C - len(m)) for _, m in part]
        prompts = [case.prompts[i // G] for i in range(a, a + len(part))]
        ids, seen = left_padded([p + r for p, r in zip(prompts, right)], device)
        mask = torch.tensor(mask, device=device)
        for row, (written, _) in enumerate(part):
            seen[row, seen.shape[1] - C + len(written) :] = 0
        with autocast():
            logits = model(ids, attention_mask=seen, logits_to_keep=C + 1).logits
        logprobs = torch.log_softmax(logits[:, :-1].float() / case.temperature, -1)
        logprobs = logprobs.gather(2, ids[:, -C:, None])[..., 0]
        advantage = torch.arange(a, a + len(part), device=device) % 2 - 0.5
        (-(advantage[:, None] * mask * logprobs).sum() / len(rows)).backward()


def plain(case: Case, args) -> list[dict]:
    model = open_model(case, args.device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=0.0)
    dtype = getattr(torch, args.dtype)
    autocast = functools.partial(
        torch.autocast, args.device, dtype, enabled=dtype != torch.float32
    )
    steps = []
    for _ in range(1 + args.steps):
        watch = Stopwatch(args.device)
        with autocast():
            rows = plain_rollout(model, case)
        watch.rolled()
        plain_update(model, case, rows, args.peer_rows, autocast)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(watch.seconds())
        check_work(case, [(len(ids), sum(mask)) for ids, mask in rows])
    return steps


# ----------------------------------------------------------------------------------------------------------------- TRL


def look(row: int, turn: int) -> str:
    """Stands for a tool: names the observation that the script has for this call.

    Args:
        row: Index of the row.
        turn: Index of the turn.
    """
    return f"{row} {turn}"


class TrlScript:
    """Mixed into GRPOTrainer: prompts, turn lengths and observations come from the case, and rollouts are timed."""

    case: Case
    watch = None

    def _generate(self, prompts):
        """A step begins here and ends where the next begins."""
        if self.watch:
            self.steps.append(self.watch.seconds())
        self.watch = Stopwatch(self.model.device.type)
        out = super()._generate(prompts)
        self.watch.rolled()
        check_work(self.case, [(len(i), sum(m)) for i, m in zip(out[1], out[2])])
        return out

    def _tokenize_prompts(self, prompts):
        self.turn = -1
        return [self.case.prompts[int(p[0]["content"])] for p in prompts], None, {}

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.turn += 1
        rows = self.case.rows
        live = [i for i, turns in enumerate(rows) if self.turn < len(turns)]
        self.unread = list(live)
        lengths, start = (
            [rows[i][self.turn][0] for i in live],
            max(map(len, prompt_ids)),
        )
        stops = [*self.eos_token_ids, self.processing_class.pad_token_id]
        forced = TurnLengths(lengths, start, stops, self.model.device)
        self.model.generate = functools.partial(
            type(self.model).generate, self.model, logits_processor=[forced]
        )
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def read(self, *_, **__) -> dict:
        """Instead of parsing text: the next row's call, if the script has one."""
        row = self.unread.pop(0)
        call = {"name": "look", "arguments": {"row": row, "turn": self.turn}}
        more = self.turn + 1 < len(self.case.rows[row])
        calls = {"tool_calls": [{"type": "function", "function": call}]} if more else {}
        return {"role": "assistant", "content": ""} | calls

    def _get_tool_suffix_ids(self, tool_messages):
        row, turn = map(int, tool_messages[-1]["content"].split())
        return self.case.rows[row][turn][1]


TRL_TEMPLATE = (  # only for TRL's check that a template can show calls and keeps what came before
    "{% for m in messages %}<|user|>{{ m['role'] }}{{ m['content'] }}{{ m.get('tool_calls', '') }}{% endfor %}"
    "{% if add_generation_prompt %}<|agent|>{% endif %}"
)


def trl(case: Case, args) -> list[dict]:
    """GRPOTrainer for 1 + args.steps steps; it has its own optimizer and clips at 1.0 as well."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    rows = len(case.rows)
    per_forward = min(rows, args.peer_rows)
    tokenizer = AutoTokenizer.from_pretrained(AGENT)
    tokenizer.chat_template, tokenizer.response_template = TRL_TEMPLATE, {}
    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=per_forward,
        gradient_accumulation_steps=rows // per_forward,
        num_generations=len(case.groups[0]),
        max_completion_length=case.longest,
        temperature=case.temperature,
        max_steps=1 + args.steps,
        learning_rate=1e-6,
        shuffle_dataset=False,
        gradient_checkpointing=args.checkpointing,
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    messages = [[{"role": "user", "content": str(p)}] for p in range(len(case.prompts))]
    trainer = type("ScriptedTrainer", (TrlScript, GRPOTrainer), {"case": case})(
        model=open_model(case, args.device),
        reward_funcs=alternating_reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": messages}),
        processing_class=tokenizer,
        tools=[look],
    )
    trainer.steps = []
    grpo_trainer.parse_response = trainer.read
    trainer.train()
    return [*trainer.steps, trainer.watch.seconds()]


def alternating_reward(completions, **_) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]
