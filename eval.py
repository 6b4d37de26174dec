"""Metrics with confidence intervals, baselines, and the report: everything the README's tables and figures come from.

    python eval.py runs/NAME                      # all rows on the test split -> table, eval.json, report.html
    python eval.py runs/NAME --show 3             # read trajectories in the terminal; --user USER_ID for one user's
    python eval.py runs/NAME --split valid --samples 300 --temperature 1

Every row ranks the same candidates of the same samples. Intervals are 95% bootstrap intervals over users (10,000
resamples, the same ones for every row, so differences are paired). Each finished row is kept in RUN/rows/ and not
computed again. Rows: random, popularity, sasrec, tool:NAME, fusion, learned_fusion, oracle, frozen_r (no tools),
frozen, rta, ppr.
"""

import argparse
import json
import pathlib
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Dataset, DatasetError, Sample, load_dataset
from grpo import list_reward, ndcg, rank_of_positive
from model import ModelError, load_policy
from rollout import ALL_TOOLS, Task, Trajectory, rollout
from sasrec import load_sasrec
from tools import Context, popularity, tool_scores

HERE = pathlib.Path(__file__).parent
METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5", "ndcg@10", "mrr")
KEPT_TEXTS = 60  # trajectories a row keeps for reading


@dataclass
class Row:
    """One ranker's result: the positive's rank (None: not in the top k) for each sample, and an agent's behaviour."""

    ranks: list[int | None]
    valid: float | None = None
    tool_calls: float | None = None
    calls: dict[str, float] | None = None  # calls of each tool per trajectory
    ms: float | None = None  # per request
    tokens: float | None = None  # sampled per request
    texts: list[dict] | None = None


# ------------------------------------------------------------------------------------------------------------- metrics


def metric(name: str, rank: int | None, k: int) -> float:
    """One of METRICS for a positive at `rank`; anything beyond k, the length of the ranking, counts as not ranked."""
    kind, _, at = name.partition("@")
    rank = rank if rank is not None and rank <= k else None
    if kind == "mrr":
        return 1 / rank if rank else 0.0
    return (
        float(rank is not None and rank <= int(at))
        if kind == "hit"
        else ndcg(rank, int(at))
    )


def bootstrap(
    values: np.ndarray, users: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Mean of [n] values and its 95% interval over resampled users; equal arguments resample equally."""
    _, owner = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(0, resamples, 500):
        drawn = rng.multinomial(
            len(sums), np.full(len(sums), 1 / len(sums)), size=500
        )  # 500, users
        means.append((drawn @ sums) / (drawn @ counts))
    lo, hi = np.quantile(np.concatenate(means)[:resamples], [0.025, 0.975])
    return {"mean": float(values.mean()), "lo": float(lo), "hi": float(hi)}


def ranks_from_scores(scores: np.ndarray, samples: list[Sample]) -> list[int]:
    """[n, 20] scores to the positives' ranks; ties are broken at random, seeded by the sample."""
    ranks = []
    for s, row in zip(samples, scores):
        noise = np.random.default_rng([9, s.id]).random(len(row))
        order = np.lexsort((noise, -np.asarray(row, float)))
        ranks.append(int(np.flatnonzero(order == s.target)[0]) + 1)
    return ranks


# ----------------------------------------------------------------------------------------------------------- baselines


def all_tool_scores(ctx: Context, samples: list[Sample], title: str) -> np.ndarray:
    """[n, tools, 20] every tool's own rating of the candidates."""
    scores = [
        [tool_scores(ctx, t, s) for t in ALL_TOOLS]
        for s in tqdm(samples, desc=title, leave=False)
    ]
    return np.array(scores)


def fit_fusion(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights [tools] of a linear list-wise softmax over [n, tools, 20] scores, fitted by maximum likelihood."""
    x, y = torch.tensor(scores, dtype=torch.float64), torch.tensor(targets)
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = (
            F.cross_entropy(torch.einsum("ntc,t->nc", x, weights), y)
            + 1e-4 * weights.square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach().numpy()


def baseline_scores(
    ctx: Context, out: pathlib.Path, samples: list[Sample]
) -> dict[str, np.ndarray]:
    """[n, 20] scores of every row that is not an agent."""
    ds = ctx.ds
    candidates = np.array([s.candidates for s in samples])
    take = lambda table: np.take_along_axis(table, candidates, 1)
    counts = popularity(ds, ds.train_end)
    sasrec = load_sasrec(out / "sasrec_baseline.safetensors", len(ds.items))
    states = sasrec.states([ds.item[ds.before(s.user, s.time)] for s in samples])
    rows = {
        "random": np.zeros(candidates.shape),
        "popularity": counts[candidates],
        "sasrec": take(sasrec.scores(states).numpy()),
    }
    tools = all_tool_scores(ctx, samples, "tools")
    rows |= {f"tool:{name}": tools[:, i] for i, name in enumerate(ALL_TOOLS)}
    train = ds.splits["train"][:3000]
    weights = fit_fusion(
        all_tool_scores(ctx, train, "learned fusion"),
        np.array([s.target for s in train]),
    )
    rows |= {
        "fusion": tools.sum(1),
        "learned_fusion": np.einsum("ntc,t->nc", tools, weights),
    }
    if ds.utility is not None:
        rows["oracle"] = take(ds.utility[[s.id for s in samples]])
    return rows


# -------------------------------------------------------------------------------------------------------------- agents


def agent_row(
    args,
    ctx: Context,
    path: str,
    samples: list[Sample],
    tools: tuple[str, ...],
    title: str,
) -> Row:
    """Roll one checkpoint out once over the samples."""
    policy = load_policy(path, args.device, args.dtype)
    began = time.perf_counter()
    with tqdm(total=len(samples), desc=title, unit="sample", leave=False) as bar:
        groups = rollout(
            policy, ctx, [Task(s) for s in samples], group_size=1, k=args.k, temperature=args.temperature,
            max_new_tokens=args.max_new_tokens, seed=(args.seed, 99), tools=tools, slots=128,
            progress=lambda group: bar.update(),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    done = [g[0] for g in groups]
    n = len(done)
    return Row(
        ranks=[rank_of_positive(t) for t in done],
        valid=sum(t.valid for t in done) / n,
        tool_calls=sum(len(t.calls) for t in done) / n,
        calls={
            name: sum(c.name == name for t in done for c in t.calls) / n
            for name in ALL_TOOLS
        },
        ms=1000 * seconds / n,
        tokens=sum(sum(t.action_mask) for t in done) / n,
        texts=[readable(ctx, policy, t, args.k, args.bonus) for t in done[:KEPT_TEXTS]],
    )


def readable(ctx: Context, policy, t: Trajectory, k: int, bonus: float) -> dict:
    """A trajectory as text, for --show and the report."""
    s = t.task.sample
    return {
        "sample": s.id,
        "user": ctx.ds.users[s.user],
        "positive": s.target + 1,
        "title": ctx.title(s.candidates[s.target]),
        "prompt": policy.decode(t.prompt),
        "text": policy.decode(t.ids),
        "answer": t.answer,
        "end": t.end,
        "reward": list_reward(t, k, bonus),
        "rank": rank_of_positive(t),
    }


def agent_rows(
    out: pathlib.Path, config: dict
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The run's agents: name -> (checkpoint, tools). Frozen is the model that stage 1 started from."""
    args = config["args"]
    base = out / "warmup" if (out / "warmup").is_dir() else args["model"]
    base = HERE / base if (HERE / base).is_dir() else base
    rows = {"frozen_r": (str(base), ()), "frozen": (str(base), ALL_TOOLS)}
    return rows | {
        s: (str(out / s), ALL_TOOLS) for s in ("rta", "ppr") if (out / s).is_dir()
    }


# -------------------------------------------------------------------------------------------------------------- output


def summarize(rows: dict[str, Row], samples: list[Sample], args) -> dict:
    """eval.json: every row's metrics with intervals, and paired differences of each agent to each other row."""
    users = np.array([s.user for s in samples])
    values = {
        n: {m: np.array([metric(m, r, args.k) for r in row.ranks]) for m in METRICS}
        for n, row in rows.items()
    }
    result = {
        "split": args.split,
        "n": len(samples),
        "k": args.k,
        "temperature": args.temperature,
        "rows": {},
    }
    for name, row in rows.items():
        result["rows"][name] = {m: bootstrap(v, users) for m, v in values[name].items()}
        result["rows"][name] |= {"valid": row.valid, "tool_calls": row.tool_calls}
        if row.calls is not None:
            result["rows"][name] |= {
                "calls": row.calls,
                "ms": row.ms,
                "tokens": row.tokens,
            }
    agents = [n for n in ("frozen", "rta", "ppr") if n in rows]
    result["paired"] = {
        f"{a}-{b}": {
            m: bootstrap(values[a][m] - values[b][m], users)
            for m in ("hit@1", "ndcg@10")
        }
        for a in agents
        for b in rows
        if a != b
    }
    return result


def table(result: dict) -> str:
    """The comparison as text, best agent last."""
    shown = [m for m in METRICS if m != "mrr"]
    head = f"{'':26}" + "".join(
        f"{m.replace('hit', 'H').replace('ndcg', 'N'):>19}" for m in shown
    )
    lines = [
        f"{result['split']} split, {result['n']} samples, 95% intervals over users",
        head + f"{'valid':>8}{'calls':>7}",
    ]
    for name, row in result["rows"].items():
        cells = "".join(
            f"{row[m]['mean']:.3f} {row[m]['lo']:.3f}–{row[m]['hi']:.3f}".rjust(19)
            for m in shown
        )
        agent = (
            ""
            if row["valid"] is None
            else f"{row['valid']:8.1%}{row['tool_calls']:7.2f}"
        )
        lines.append(f"{name:26}{cells}{agent}")
    last = next((n for n in ("ppr", "rta", "frozen") if n in result["rows"]), None)
    if last and len(result["rows"]) > 1:
        lines.append(f"\nN@10 of {last} minus each other row (paired):")
        for pair, difference in result["paired"].items():
            if pair.startswith(f"{last}-"):
                d = difference["ndcg@10"]
                lines.append(
                    f"  {pair[len(last) + 1 :]:26}{d['mean']:+.3f} [{d['lo']:+.3f}, {d['hi']:+.3f}]"
                )
    return "\n".join(lines)


def write_report(
    out: pathlib.Path, result: dict, rows: dict[str, Row], config: dict
) -> None:
    """report.html: the template with the run's figures and trajectories as escaped JSON."""
    metrics = out / "metrics.jsonl"
    payload = {
        "title": config["dataset"],
        "eval": result,
        "metrics": [json.loads(x) for x in metrics.read_text().splitlines()]
        if metrics.exists()
        else [],
        "texts": {name: row.texts for name, row in rows.items() if row.texts},
    }
    safe = (
        json.dumps(payload)
        .replace("<", "\\u003c")
        .replace("\u2028", "")
        .replace("\u2029", "")
    )
    page = (HERE / "assets" / "report.html").read_text(encoding="utf-8")
    (out / "report.html").write_text(
        page.replace("__PAYLOAD__", safe), encoding="utf-8"
    )


def show(rows: dict[str, Row], count: int, user: str | None) -> None:
    """Print trajectories of the last agent: prompt, what it wrote and read, and what the user really bought."""
    name = next(n for n in ("ppr", "rta", "frozen") if n in rows)
    texts = [t for t in rows[name].texts if user is None or t["user"] == user]
    if not texts:
        raise ModelError(f"user {user}: not among the {KEPT_TEXTS} kept trajectories")
    for t in texts[:count]:
        print(
            f"\n=== {name}, user {t['user']}, bought {t['positive']} ({t['title']}): rank {t['rank']}, reward {t['reward']:.3f}"
        )
        print(
            t["prompt"],
            t["text"]
            .replace("</observation>", "</observation>\n")
            .replace("</tool_call>", "</tool_call>\n"),
            sep="\n",
        )


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder made by train.py")
    parser.add_argument("--split", choices=["valid", "test"], default="test")
    parser.add_argument(
        "--samples",
        type=int,
        default=1000,
        help="how many samples of the split (0: all)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="of the agents (default: the run's; 0 is greedy)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the agents' sampling")
    parser.add_argument("--rows", nargs="+", help="only these rows, e.g. frozen")
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="DIR",
        help="more checkpoints to compare",
    )
    parser.add_argument("--device", help="default: the run's")
    parser.add_argument(
        "--show", type=int, metavar="N", help="print N trajectories and stop"
    )
    parser.add_argument("--user", help="with --show: only this user's")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = pathlib.Path(args.run)
    if not (out / "config.json").exists():
        raise ModelError(f"{out}: no config.json; give a run folder that train.py made")
    config = json.loads((out / "config.json").read_text())
    for name in ("device", "temperature"):
        setattr(
            args,
            name,
            config["args"][name]
            if getattr(args, name) is None
            else getattr(args, name),
        )
    for name in ("k", "bonus", "dtype", "max_new_tokens"):
        setattr(args, name, config["args"][name])
    ds: Dataset = load_dataset(config["args"]["dataset"], config["args"]["data_dir"])
    ctx = Context(ds, load_sasrec(out / "sasrec.safetensors", len(ds.items)))
    pool = ds.splits[args.split]
    order = np.random.default_rng(0).permutation(len(pool))[: args.samples or None]
    samples = [pool[i] for i in order]
    agents = agent_rows(out, config) | {
        f"model:{pathlib.Path(m).name}": (m, ALL_TOOLS) for m in args.models
    }
    rows: dict[str, Row] = {}
    if not args.rows:
        for name, scores in baseline_scores(ctx, out, samples).items():
            rows[name] = Row(ranks_from_scores(scores, samples))
    for name, (path, tools) in agents.items():
        if args.rows and name not in args.rows:
            continue
        file = (
            out
            / "rows"
            / f"{name.replace(':', '-')}-{args.split}-{len(samples)}-{args.temperature:g}-{args.seed}.json"
        )
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            row = agent_row(args, ctx, path, samples, tools, f"evaluating {name}")
            file.with_suffix(".new").write_text(json.dumps(row.__dict__))
            file.with_suffix(".new").rename(file)
        rows[name] = Row(**json.loads(file.read_text()))
    if args.show or args.user:
        return show(rows, args.show or 10, args.user)
    result = summarize(rows, samples, args)
    print(table(result))
    if not args.rows:
        (out / "eval.json").write_text(json.dumps(result, indent=1))
        write_report(out, result, rows, config)
        print(f"\nwritten: {out / 'eval.json'}, {out / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (DatasetError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
