"""The engine on one GPU: tokens/s of the rollout, FLOPs utilisation of the update, peak memory, beside plain Hugging Face.

    python tests/bench_gpu.py --json gpu.json                    # all models; see --models, --peers to split it
    python tests/bench_gpu.py --models smollm2-135m --peers ours
    python tests/bench_gpu.py --quick --device cpu               # tiny shapes: does everything run?

Run by hand on a GPU with 80 GB. Random weights in the shapes of SmolLM2-135M and Qwen3 0.6B, 1.7B and 4B; bf16 compute over
fp32 weights; 4 prompts of 2,500 tokens x G 8; 4 turns of 250 tokens written, with 100 observed between them. TRL joins
where it is installed (--peers ours plain trl). Above a billion parameters ours recomputes its layers (--grad-checkpoint);
what does not fit fails with a line and is left out. Utilisation: FLOPs of `least_work` (bench.py: each prompt once for its group)
over the time taken and the rate of a large bf16 product measured in the same run. Ours samples with CUDA graphs too, on a
GPU. "busy" is the share of a rollout's time without them in which the GPU runs a kernel: they can save at most the rest.
"""

import argparse
import copy
import pathlib
import sys
import tempfile
import time

import torch
from transformers import AutoTokenizer, LlamaConfig, Qwen3Config

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench
import peers

QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
MODELS = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "qwen3-0.6b": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        **QWEN3,
    ),
    "qwen3-1.7b": Qwen3Config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        **QWEN3,
    ),
    "qwen3-4b": Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        **QWEN3,
    ),
}
QUICK = {"vocab_size": 1100, "hidden_size": 64, "intermediate_size": 96}
QUICK |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_config(config, folder: str, quick: bool) -> str:
    """A folder with the shape and a small tokenizer, without weights: each process draws the same on its device."""
    config = copy.deepcopy(config)
    config.update({"max_position_embeddings": 8192, "tie_word_embeddings": True})
    config.update({"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None})
    if quick:
        layers = getattr(config, "layer_types", None)  # Qwen3's, one a layer
        config.update(QUICK | {"head_dim": 16, "layer_types": layers and layers[:2]})
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(peers.AGENT).save_pretrained(folder)
    return folder


def busy_share(case: peers.Case, args) -> float | None:
    """Kernel time over wall time in a short rollout, or None without a GPU."""
    if args.device != "cuda":
        return None  # the profiler counts kernels
    policy = peers.scripted_policy(case, args.device, args.dtype)
    peers.scripted_rollout(policy, case)  # warm
    began = time.perf_counter()
    peers.scripted_rollout(policy, case)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        peers.scripted_rollout(policy, case)
        torch.cuda.synchronize()
    kernels = sum(e.self_device_time_total for e in profile.key_averages())  # us
    return kernels / 1e6 / seconds


def peer_runs(args) -> list[tuple[str, str, dict]]:
    """What is measured: a row's name, the peer, and the flags it has of its own."""
    usual = {"lora_rank": 0, "cuda_graphs": 0}
    runs = [(peer, peer, dict(usual)) for peer in args.peers]
    if args.device == "cuda" and "ours" in args.peers:
        runs.append(("ours, CUDA graphs", "ours", usual | {"cuda_graphs": 1}))
    if args.lora_rank and "ours" in args.peers:
        adapters = {"lora_rank": args.lora_rank}
        runs.append((f"ours, LoRA {args.lora_rank}", "ours", usual | adapters))
    return runs


def bench_model(case: peers.Case, args) -> list[dict]:
    """A result for each of `peer_runs`; those that fail are left out."""
    rates = bench.in_process("limits", case, args)
    assert rates, "the machine's limits could not be measured"
    flops = bench.least_work(case, getattr(torch, args.dtype).itemsize)["train_flops"]
    written = sum(n for turns in case.rows for n, _ in turns)
    large = bench.model_sizes(case)["parameters"] > 1e9
    out = []
    for name, peer, how in peer_runs(args):
        if peer == "ours" and large:
            how["checkpointing"] = True
        flags = argparse.Namespace(**vars(args) | how)
        r = bench.in_process(peer, case, flags)
        if r:
            r |= {"name": name, "tokens_per_s": written / r["rollout"]}
            r["utilisation"] = flops / r["update"] / rates[f"flops_{args.dtype}"]
            out.append(r | {"rates": rates})
    return out


def print_result(name: str, results: list[dict], busy: float | None) -> None:
    print(f"\n## {name}")
    if busy is not None:
        print(f"GPU busy while sampling: {busy:.0%}")
    print("| | rollout s | tokens/s | update s | utilisation | peak GB |")
    print("|---" * 6 + "|")
    for r in results:
        print(
            f"| {r['name']} | {r['rollout']:.2f} | {r['tokens_per_s']:.0f} "
            f"| {r['update']:.2f} | {r['utilisation']:.1%} | {r['peak_mb'] / 1024:.2f} |"
        )
    rates = results[0]["rates"] if results else {}
    print(
        "machine, G/s:", *(f"{k} {v / 1e9:.0f}" for k, v in rates.items()), flush=True
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--peers", nargs="+", default=["ours", "plain"])
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--micro-tokens", type=int, default=16_384, help="of ours")
    parser.add_argument(
        "--lora-rank", type=int, default=16, help="of ours with LoRA; 0: leave it out"
    )
    parser.add_argument(
        "--peer-rows", type=int, default=2, help="sequences a forward in peers' updates"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute layers (ours, TRL)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1,
        help="measured steps after the first; 0: measure the first",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", help="write all figures to this file")
    parser.set_defaults(cuda_graphs=0)  # `peer_runs` turns them on
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    n = 50 if args.quick else 1
    shape = {"P": args.prompts, "G": 8, "prompt": 2500 // n}
    turns = {"tool_turns": [(250 // n, 100 // n)] * 3, "answer": 250 // n}
    found = {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model = write_config(MODELS[name], folder, args.quick)
            case = peers.uniform_case(
                model, **shape, **turns, micro_tokens=args.micro_tokens
            )
            short = peers.uniform_case(model, **shape, answer=32 // min(n, 8))
            results = bench_model(case, args)
            busy = busy_share(short, args)
            torch.cuda.empty_cache()  # the next model's processes need it
        found[name] = {"results": results, "busy": busy}
        print_result(name, results, busy)
        bench.save({"args": vars(args), "models": found}, args.json)


if __name__ == "__main__":
    main()
