"""Two ranks of test_parallel.py, `torchrun --nproc_per_node 2 tests/shard_prompts.py`: prompts that begin alike, sharded.

Rank 0 has two prompts that share 100 tokens, rank 1 has one that shares none. Their gradient is compared with that of one
process; it must not matter that only rank 0 could compute a beginning once.
"""

import pathlib
import sys
import types

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import train
from grpo import accumulate
from model import TrainRow, find_model, load_policy

rng = np.random.default_rng(0)
COMMON, *OWN = (rng.integers(300, 900, n).tolist() for n in (100, 3, 9, 70))
PROMPTS = [COMMON + OWN[0], COMMON + OWN[1], OWN[2]]
ROWS = [
    TrainRow(p, rng.integers(300, 900, 20 + p).tolist(), [1] * (20 + p))
    for p in (0, 0, 1, 1, 2, 2)
]


def gradients(mine: range) -> dict[str, torch.Tensor]:
    """Each parameter's gradient of the ranks' rows together; rows of a prompt pull in opposite directions."""
    policy = load_policy(find_model("assets/tiny-agent"))
    flags = types.SimpleNamespace(device="cpu")
    run = types.SimpleNamespace(policy=policy, args=flags)
    if dist.is_initialized():
        train.shard(run)
    rows = [ROWS[i] for i in mine]
    weights = [(-1.0) ** i for i in mine for _ in ROWS[i].ids]
    accumulate(policy, PROMPTS, rows, weights)
    named = policy.model.named_parameters()
    return {name: train.whole(p.grad) for name, p in named}


if __name__ == "__main__":
    torch.set_num_threads(1)
    alone = gradients(range(6))
    dist.init_process_group("gloo")
    sharded = gradients(range(4) if dist.get_rank() == 0 else range(4, 6))
    gap = max(float((alone[n] - x).abs().max()) for n, x in sharded.items())
    size = max(float(x.abs().max()) for x in alone.values())
    assert gap < 1e-5 * size, (
        f"gradients differ by {gap:.1e}, the largest is {size:.1e}"
    )
    dist.destroy_process_group()
