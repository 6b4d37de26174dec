"""Speed and memory of one training step: ours, TRL's GRPOTrainer, plain Hugging Face, and the machine's own limit.

    python tests/bench.py --json bench.json           # cases a, b, c with all peers, then the growth tables
    python tests/bench.py --quick                     # tiny shapes: does everything run?
    python tests/bench.py --cases a --peers ours trl --dtype bfloat16 --no-growth

Run by hand. a: one turn, 4 prompts x G 8, 600 prompt tokens, 340 new. b: the same prompts at 900 tokens, three tool turns
of 40 tokens with observations of 100, then 60. c: the bundled agent with the tiny preset, its own prompts and turns.
Each measurement is a process of its own (one unmeasured step, then --steps), and the peers take turns, --rounds times;
peers.py has them and says what keeps their work the same. "of limit" is the time of `least_work` at the rates measured
in the same run over the time taken. Set OMP_NUM_THREADS to choose the number of threads.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict

import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
PEERS = ("ours", "plain", "trl")
sys.path.insert(0, str(HERE.parent))

import peers
from peers import AGENT, Case, Stopwatch, main_job_case, uniform_case


def memory_mb(device: str, peak: bool = True) -> float:
    """Peak (or present) memory: of this process, or on a GPU of its tensors there."""
    if device == "cuda":
        used = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return used() / 2**20
    status = pathlib.Path("/proc/self/status").read_text()  # Linux
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 2**10


def model_sizes(case: Case) -> dict[str, int]:
    """For each token: matrix FLOPs of the layers, of the vocabulary projection, of attention to one other token.

    And numbers in all matrices, in the keys and values of one token, and in the whole model.
    """
    c = AutoConfig.from_pretrained(case.model)
    C, L, K = c.hidden_size, c.num_hidden_layers, c.num_key_value_heads
    D = getattr(c, "head_dim", None) or C // c.num_attention_heads
    H, V = c.num_attention_heads, c.vocab_size
    layers = L * (2 * C * H * D + 2 * C * K * D + 3 * C * c.intermediate_size)
    return {
        "layers": 2 * layers,
        "head": 2 * C * V,
        "attend": 4 * L * H * D,
        "matrices": layers + C * V,
        "kv": 2 * L * K * D,
        "parameters": layers + C * V * (1 if c.tie_word_embeddings else 2),
    }


def least_work(case: Case, itemsize: int) -> dict[str, float]:
    """FLOPs and bytes that no implementation can avoid; each prompt and each observation is computed once.

    known: prompts and observations while sampling; decode: written tokens, one position of all rows at a time, so that
    the matrices are read once a position, and a prompt's keys and values once for its group. train: three forwards'
    worth of both. Elementwise work, norms and sampling count as free.
    """
    m = model_sizes(case)
    known = decode = bytes_read = positions = 0
    for prompt, group in zip(case.prompts, case.groups):
        T = len(prompt)
        known += T * m["layers"] + m["attend"] * T * T / 2
        for turns in group:
            own = 0
            for n, seen in turns:
                decode += n * (
                    m["layers"] + m["head"] + m["attend"] * (T + own + n / 2)
                )
                bytes_read += itemsize * m["kv"] * n * (own + n / 2)
                own, o = own + n, len(seen)
                known += o * (m["layers"] + m["attend"] * (T + own + o / 2))
                own += o
        steps = max(sum(n for n, _ in turns) for turns in group)
        bytes_read += itemsize * m["kv"] * T * steps
        positions = max(positions, steps)
    bytes_read += itemsize * m["matrices"] * positions
    return {
        "known_flops": known,
        "decode_flops": decode,
        "decode_bytes": bytes_read,
        "decode_set": bytes_read / positions,
        "train_flops": 3 * (known + decode),
        "optimizer_bytes": 7 * 4 * m["parameters"],  # AdamW: read p, g, m, v, write 3
        "optimizer_set": 4 * 4 * m["parameters"],
    }


def best_seconds(work, device: str, at_least: float = 1.0) -> float:
    """Least seconds of one call of `work`, of as many as fit in `at_least` seconds."""
    seconds = []
    while sum(seconds) < at_least or len(seconds) < 5:
        watch = Stopwatch(device)
        work()
        watch.rolled()
        seconds.append(watch.middle - watch.begin)
    return min(seconds)


def limits(case: Case, args) -> dict[str, float]:
    """This machine's FLOP/s of square matrix products and bytes/s of reading the sets that `least_work` names."""
    out, n = {}, 512 if args.quick else 8192 if args.device == "cuda" else 2048
    for name in ("float32", "bfloat16"):
        x = torch.randn(n, n, device=args.device, dtype=getattr(torch, name))
        seconds = best_seconds(functools.partial(torch.mm, x, x), args.device)
        out[f"flops_{name}"] = 2 * n**3 / seconds
    work = least_work(case, getattr(torch, args.dtype).itemsize)
    for name in ("decode", "optimizer"):
        # 8 GB tell the rate of any larger set
        rows = min(2**21, max(1, int(work[f"{name}_set"] / 4 / 1024)))
        x, y = (torch.ones(*s, device=args.device) for s in ((rows, 1024), (1024,)))
        reads = (functools.partial(torch.mv, x, y), x.sum)
        seconds = min(best_seconds(read, args.device, 0.5) for read in reads)
        out[f"bytes_{name}"] = 4 * x.numel() / seconds
    return out


def least_seconds(case: Case, args, rates: dict[str, float]) -> dict[str, float]:
    """The time `least_work` takes at the machine's rates, arithmetic and reading perfectly overlapped."""
    work = least_work(case, getattr(torch, args.dtype).itemsize)
    flops, read = rates[f"flops_{args.dtype}"], rates["bytes_decode"]
    decode = max(work["decode_flops"] / flops, work["decode_bytes"] / read)
    optimizer = work["optimizer_bytes"] / rates["bytes_optimizer"]
    return {
        "rollout": work["known_flops"] / flops + decode,
        "update": work["train_flops"] / flops + optimizer,
    }


def measure(args) -> None:
    """Inside a process of its own: one peer on the case in a file; the last line printed is JSON."""
    case = Case(**json.loads(pathlib.Path(args.case_file).read_text()))
    torch.manual_seed(0)
    if args.measure == "limits":
        print(json.dumps(limits(case, args)))
        return
    before = memory_mb(args.device, peak=False)
    steps = getattr(peers, args.measure)(case, args)
    mean = {k: statistics.mean(s[k] for s in steps[1:] or steps) for k in steps[0]}
    mean["step"] = mean["rollout"] + mean["update"]
    print(json.dumps(mean | {"peak_mb": memory_mb(args.device), "start_mb": before}))


def in_process(what: str, case: Case, args) -> dict | None:
    """Run `measure` in a new process; None (and why, in a line) if it fails, such as for lack of memory."""
    command = [sys.executable, str(HERE / "bench.py"), "--measure", what]
    for flag in ("dtype", "device", "steps", "peer_rows", "lora_rank", "cuda_graphs"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    command += ["--quick"] * args.quick + ["--checkpointing"] * args.checkpointing
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(case), file)
        file.flush()
        command += ["--case-file", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        print(f"{what} failed: {why[:300]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case, args) -> dict:
    """All peers on one case, `args.rounds` times in turn: the median of each figure, and the range of the step."""
    found = {what: [] for what in ("limits", *args.peers)}
    for _ in range(args.rounds):
        for what, results in found.items():
            results += filter(None, [in_process(what, case, args)])
    rates = {k: max(r[k] for r in found["limits"]) for k in found["limits"][0]}
    least = least_seconds(case, args, rates)
    out = {"limits": rates, "least_seconds": least, "peers": {}}
    for peer in args.peers:
        runs = found[peer]
        if runs:
            row = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
            row["step_range"] = [f(r["step"] for r in runs) for f in (min, max)]
            row["trajectories_per_s"] = len(case.rows) / row["step"]
            row |= {f"{k}_of_limit": least[k] / row[k] for k in least}
            out["peers"][peer] = row
    return out


# ------------------------------------------------------------------------------------------------------------- tables


def print_comparison(name: str, result: dict) -> None:
    rates = result["limits"]
    prompt = " · ".join(f"{k} {v / 1e9:.0f}" for k, v in rates.items())
    print(f"\n## {name}\nmachine, G/s: {prompt}")
    print(
        "| | rollout s | update s | step s (range) | trajectories/s | peak MB (at start) "
        "| rollout, of limit | update, of limit | ours is faster | ours' memory |"
    )
    print("|---" * 10 + "|")
    mine = result["peers"].get("ours")
    for peer, r in result["peers"].items():
        low, high = r["step_range"]
        line = (
            f"| {peer} | {r['rollout']:.2f} | {r['update']:.2f} | {r['step']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {r['trajectories_per_s']:.2f} | {r['peak_mb']:.0f} ({r['start_mb']:.0f}) "
            f"| {r['rollout_of_limit']:.0%} | {r['update_of_limit']:.0%} |"
        )
        if mine:
            line += f" {r['step'] / mine['step']:.1f}x | {mine['peak_mb'] / r['peak_mb']:.2f} |"
        print(line, flush=True)
    least = result["least_seconds"]
    print(f"| least | {least['rollout']:.2f} | {least['update']:.2f} |" + " |" * 7)


def growth_cases(folder: str, quick: bool) -> dict[str, dict[str, Case]]:
    """Case a's model while one quantity doubles; turns write 40 tokens and see 100, the rest write 64 at once."""
    small = 8 if quick else 1  # divides all lengths
    base = {"P": 4, "G": 8, "prompt": 600 // small, "answer": 64 // small}
    make = functools.partial(uniform_case, folder)
    tool_turn = (40 // small, 100 // small)
    return {
        "G": {str(G): make(**base | {"G": G}) for G in (2, 4, 8, 16)},
        "prompt": {
            str(T): make(**base | {"prompt": T // small})
            for T in (300, 600, 1200, 2400, 4800)
        },
        "turns": {
            str(n): make(**base, tool_turns=[tool_turn] * n) for n in (1, 2, 4, 8)
        },
        "rows": {str(8 * P): make(**base | {"P": P}) for P in (4, 8, 16, 32, 64)},
    }


def print_growth(axis: str, results: dict[str, dict], cases: dict[str, Case]) -> None:
    """Seconds beside the arithmetic that cannot be avoided; each x compares with the line above."""
    print(
        f"\n## Growth with {axis}, ours\n| {axis} | rollout s | x | update s | x ",
        end="",
    )
    print("| least work x | peak MB |\n" + "|---" * 7 + "|")
    before = None
    for label, r in results.items():
        r["flops"] = least_work(cases[label], 4)["train_flops"]
        x = {k: f"{r[k] / before[k]:.2f}" if before else "" for k in r}
        print(
            f"| {label} | {r['rollout']:.2f} | {x['rollout']} | {r['update']:.2f} "
            f"| {x['update']} | {x['flops']} | {r['peak_mb']:.0f} |",
            flush=True,
        )
        before = r


# ------------------------------------------------------------------------------------------------------------ running


def write_model(folder: str) -> str:
    """A random Qwen3 of 3.7M parameters with the bundled tokenizer."""
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(AGENT).save_pretrained(folder)
    return folder


def comparison_cases(folder: str, quick: bool) -> dict[str, Case]:
    """The three cases that all peers run."""
    n = 20 if quick else 1
    tool_turns = [(40 // n, 100 // n)] * 3
    P, G = (2, 2) if quick else (4, 8)
    return {
        "a": uniform_case(folder, P, G, 600 // n, answer=340 // n),
        "b": uniform_case(folder, P, G, 900 // n, tool_turns, answer=60 // n),
        "c": main_job_case(quick),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=["a", "b", "c"], choices="abc")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--no-growth", dest="growth", action="store_false")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--rounds", type=int, default=3, help="processes a peer")
    parser.add_argument("--steps", type=int, default=1, help="measured steps a process")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of compute"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--peer-rows",
        type=int,
        default=32,
        help="sequences a forward in peers' updates",
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute layers (ours, TRL)"
    )
    parser.add_argument("--lora-rank", type=int, default=0, help="of ours")
    parser.add_argument("--cuda-graphs", type=int, default=0, help="of ours: 0 or 1")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--case-file", help=argparse.SUPPRESS)
    return parser.parse_args()


def save(results: dict, file: str | None) -> None:
    if file:
        pathlib.Path(file).write_text(json.dumps(results, indent=1))


def main() -> None:
    args = parse_args()
    if args.measure:
        measure(args)
        return
    if "trl" in args.peers and not importlib.util.find_spec("trl"):
        print("trl is not installed (pip install trl): it is left out")
        args.peers = [p for p in args.peers if p != "trl"]
    args.rounds = 1 if args.quick else args.rounds
    print(f"{args.dtype} on {args.device}, {torch.get_num_threads()} threads")
    results = {"args": vars(args), "threads": torch.get_num_threads(), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        cases = comparison_cases(write_model(folder), args.quick)
        for name in args.cases:
            results["cases"][name] = compare(cases[name], args)
            print_comparison(name, results["cases"][name])
            save(results, args.json)
        growth = growth_cases(folder, args.quick) if args.growth else {}
        for axis, points in growth.items():
            found = {label: in_process("ours", c, args) for label, c in points.items()}
            results[f"growth with {axis}"] = found
            print_growth(axis, found, points)
            save(results, args.json)


if __name__ == "__main__":
    main()
