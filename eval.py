"""Metrics with confidence intervals, baselines, probes and the report: what the README's Results show.

    python eval.py runs/NAME                      # all rows on the test split -> table, eval.json, report.html
    python eval.py runs/NAME --seeds 0 1 2 --temperature 0.6    # agents sampled three times, averaged
    python eval.py runs/NAME --models runs/R      # other runs or checkpoints in the same table
    python eval.py runs/NAME --agent plan-first   # also the paper's training-free agents: InteRecAgent's way, RecMind's
    python eval.py runs/NAME --probes --plot      # what a sceptic asks; figures for a paper (needs matplotlib)
    python eval.py runs/NAME --show 3             # read trajectories in the terminal; --user USER_ID for one user's

Every row ranks the same candidates of the same samples. Intervals are 95% bootstrap intervals over users (10,000
resamples, the same ones for every row, so differences are paired). Each trajectory is kept in RUN/rows/ as soon as it
ends and never sampled again with equal settings: an interrupted evaluation continues, a larger one adds to it.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import pathlib
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers.utils.hub import cached_file

from data import (
    Dataset,
    DatasetError,
    Sample,
    history,
    load_dataset,
    read_jsonl,
    run_main,
)
from grpo import ndcg, rank_of_positive
from model import (
    TINY_TEMPLATE,
    ModelError,
    Policy,
    check_device,
    find_model,
    load_policy,
    read_config,
)
from ppr import pair_tasks, read_pairs, reward
from rollout import ALL_TOOLS, STRATEGIES, Task, read_titles, rollout, trained_tools
from sasrec import SASRec, fit_baseline, load_sasrec
from tools import Context, load_context, tool_scores

HERE = pathlib.Path(__file__).parent
CODE = ("data", "sasrec", "tools", "model", "rollout", "grpo", "ppr")  # of a trajectory
METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@1", "ndcg@5", "ndcg@10", "mrr")
FINAL = ("ppr", "rta", "r", "frozen")  # the first of these is a run's final agent
CURVES = {
    "tool_calls": "Tool calls per trajectory",
    "tool_rate_of_rewarded": "Rewarded trajectories that used a tool",
    "hit@10": "H@10",
    "reward_mean": "Reward",
}
KEPT_PAIRS = 20  # hard pairs that the report shows
MAX_REPORT = 2_900_000  # bytes; fewer trajectories are shown where they are longer


@dataclass(frozen=True)
class Agent:
    """A row that is rolled out: a checkpoint, the tools it may call, and how it goes about it."""

    name: str
    path: str
    tools: tuple[str, ...] = ALL_TOOLS
    strategy: str = "react"


# A row's lines: for each sampling seed a list with a dict for each sample. A baseline's hold only the positive's "rank"
# (None: not in the top k), an agent's all that `record` writes.
Lines = list[list[dict]]
Rows = dict[str, Lines]


# ------------------------------------------------------------------------------------------------------------- metrics


def metric(name: str, rank: int | None, k: int) -> float:
    """One of METRICS for a positive at `rank`; anything beyond k, the length of the ranking, counts as not ranked."""
    kind, _, at = name.partition("@")
    if rank is None or rank > k:
        return 0.0
    if kind == "mrr":
        return 1 / rank
    return ndcg(rank, int(at)) if kind == "ndcg" else float(rank <= int(at))


def column(lines: Lines, name: str, k: int) -> np.ndarray:
    """[n] a metric for each sample, its mean over the sampling seeds."""
    return np.mean([[metric(name, x["rank"], k) for x in part] for part in lines], 0)


def behaviour(lines: Lines) -> dict:
    """Share of valid answers, and per request: reward, calls, sampled tokens, milliseconds in all and in tools."""
    every = [line for part in lines for line in part]
    if "valid" not in every[0]:
        return {"valid": None, "tool_calls": None}
    n, kinds = len(every), ("valid", "reward", "seconds", "tool_seconds", "tokens")
    means = (sum(x[kind] for x in every) / n for kind in kinds)
    valid, reward_mean, seconds, tools, tokens = means
    calls = Counter(name for line in every for name in line["calls"])
    return {
        "valid": valid, "reward": reward_mean, "tool_calls": calls.total() / n,
        "calls": {name: calls[name] / n for name in ALL_TOOLS},
        "ms": 1000 * seconds, "tool_ms": 1000 * tools, "tokens": tokens,
    }  # fmt: skip


def intervals(columns: dict, users: np.ndarray, resamples=10_000, seed=0) -> dict:
    """{name: mean and 95% interval} of {name: [n] values} over resampled users, the same ones for every column."""
    _, owner = np.unique(users, return_inverse=True)
    values = np.stack(list(columns.values()), 1).astype(float)  # n, columns
    counts = np.bincount(owner)  # samples of each user
    sums = np.stack([np.bincount(owner, column) for column in values.T], 1)
    equal = np.full(len(counts), 1 / len(counts))
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, resamples, 500):
        drawn = rng.multinomial(len(counts), equal, 500).astype(float)  # 500, users
        means.append((drawn @ sums) / (drawn @ counts)[:, None])  # 500, columns
    lo, hi = np.quantile(np.concatenate(means)[:resamples], [0.025, 0.975], axis=0)
    found = zip(columns, values.mean(0).tolist(), lo.tolist(), hi.tolist())
    return {name: {"mean": m, "lo": a, "hi": b} for name, m, a, b in found}


def ranks_from_scores(scores: np.ndarray, samples: list[Sample]) -> list[int]:
    """[n, 20] scores to the positives' ranks; ties are broken at random, seeded by the sample."""
    ranks = []
    for s, row in zip(samples, np.asarray(scores, float)):
        noise = np.random.default_rng([9, s.id]).random(len(row))
        ranks.append(np.lexsort((noise, -row)).tolist().index(s.target) + 1)
    return ranks


# ----------------------------------------------------------------------------------------------------------- baselines


def item_knn(ds, samples: list[Sample]) -> np.ndarray:
    """[n, 20] cosine of each candidate with the items of the history, by who bought both before `train_end`."""
    bought = slice(np.searchsorted(ds.time, ds.train_end))
    buyers: list[set[int]] = [set() for _ in ds.items]
    for user, item in zip(ds.user[bought].tolist(), ds.item[bought].tolist()):
        buyers[item].add(user)
    scores = np.zeros((len(samples), len(samples[0].candidates)))
    for row, s in zip(scores, samples):
        for i in set(ds.item[history(ds, s)].tolist()):
            both = [len(buyers[i] & buyers[c]) for c in s.candidates]
            size = [len(buyers[i]) * len(buyers[c]) for c in s.candidates]
            row += np.array(both) / np.sqrt(np.maximum(size, 1))
    return scores


def evidence_scores(ctx: Context, samples: list[Sample], title: str) -> np.ndarray:
    """[n, tools + 1, 20] every tool's own rating of the candidates; last, 1 for those of the last purchase's series."""
    bar = tqdm(samples, desc=title, leave=False)
    tools = [[tool_scores(ctx, t, s) for t in ALL_TOOLS] for s in bar]
    titles = [[read_titles(ctx, s)[1] / 9] for s in samples]
    return np.concatenate([tools, titles], 1)


def fusion_loss(solver, weights, scores, targets) -> torch.Tensor:
    """Cross entropy of the targets under a softmax of the weighted scores, with its gradient; large weights cost."""
    solver.zero_grad()
    logits = torch.einsum("ntc,t->nc", scores, weights)
    loss = cross_entropy(logits, targets) + 1e-4 * weights @ weights
    loss.backward()
    return loss


def fit_fusion(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights [tools] of a linear list-wise softmax over [n, tools, 20] scores, by L-BFGS on its convex loss."""
    weights = torch.zeros(scores.shape[1], dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    known = torch.from_numpy(scores), torch.from_numpy(targets)
    solver.step(functools.partial(fusion_loss, solver, weights, *known))
    return weights.detach().numpy()


def best_subset(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights [tools] of 0 and 1: the tools whose equal-weight sum has the best NDCG on [n, tools, 20] scores.

    It is what an agent that trusts all tools alike can learn: which to ask. Equal sums share their places' mean.
    """
    found = []
    for on in itertools.product((0.0, 1.0), repeat=scores.shape[1]):
        total = np.einsum("ntc,t->nc", scores, on)
        own = np.take_along_axis(total, targets[:, None], 1)
        ahead, equal = (total > own).sum(1), (total == own).sum(1) - 1
        found.append((np.mean(1 / np.log2(2 + ahead + equal / 2)), on))
    return np.array(max(found)[1])


def baseline_sasrec(run: pathlib.Path, ds: Dataset) -> SASRec:
    """SASRec on the whole 80%, fitted when an evaluation of this run first needs it."""
    path = run / "sasrec_baseline.safetensors"
    if not path.exists():
        new = path.with_name(path.name + ".new")  # a kill leaves no half file
        save_file(fit_baseline(ds, "training sasrec_baseline").state_dict(), new)
        new.replace(path)
    return load_sasrec(path, len(ds.items))


def baseline_scores(ctx: Context, out: pathlib.Path, samples: list[Sample]) -> dict:
    """[n, 20] scores of every row that is not an agent."""
    ds = ctx.ds
    candidates = np.array([s.candidates for s in samples])
    bought = ds.item[: np.searchsorted(ds.time, ds.train_end)]
    sasrec = baseline_sasrec(out, ds)
    states = sasrec.states([ds.item[ds.before(s.user, s.time)] for s in samples])
    rows = {
        "random": np.zeros(candidates.shape),
        "popularity": np.bincount(bought, minlength=len(ds.items))[candidates],
        "itemknn": item_knn(ds, samples),
        "sasrec": sasrec.scores(states, torch.from_numpy(candidates)).numpy(),
    }
    # most candidates of sparse data share no buyer with the history: popularity orders them
    rows["itemknn_popular"] = rows["itemknn"] + 1e-9 * rows["popularity"]
    shown = evidence_scores(ctx, samples, "tools")
    tools = shown[:, :-1]
    rows |= {f"tool:{name}": tools[:, i] for i, name in enumerate(ALL_TOOLS)}
    train = ds.splits["train"][:3000]
    fitted = evidence_scores(ctx, train, "fusions")
    targets = np.array([s.target for s in train])
    rows["fusion"] = tools.sum(1)
    for name, fit in (("subset_fusion", best_subset), ("learned_fusion", fit_fusion)):
        rows[name] = np.einsum("ntc,t->nc", tools, fit(fitted[:, :-1], targets))
    # what no tool shows but the agent may read; beside it what weights could make of all
    rows["titles"] = shown[:, -1]
    rows["titles_fusion"] = np.einsum("ntc,t->nc", shown, fit_fusion(fitted, targets))
    if ds.utility is not None:
        utility = ds.utility[[s.id for s in samples]]
        rows["oracle"] = np.take_along_axis(utility, candidates, 1)
    return rows


# -------------------------------------------------------------------------------------------------------------- agents


def own_tools(folder: pathlib.Path) -> tuple[str, ...]:
    """The tools that a run trained with; all of them in a folder that is no run."""
    config = run_config(folder)
    then = config.get("tools", ALL_TOOLS)  # without those that were written since
    return tuple(name for name in trained_tools(config["args"]) if name in then)


def run_config(folder: pathlib.Path) -> dict:
    """A run's config.json; one without flags for a folder that is no run."""
    try:
        return read_config(folder)
    except ModelError:
        return {"args": {}}


def note_differences(flags: dict, folder: pathlib.Path) -> None:
    """Print where another run, if it is one, was trained with other settings than it is evaluated with here."""
    other = run_config(folder)["args"]
    names = "dataset k title_chars max_new_tokens greedy_answer profiles"
    for name in names.split():
        here, there = flags.get(name), other.get(name)
        if other and here != there:
            how = f"was trained with {name} {there}; here it is {here}"
            print(f"note: {folder} {how}")


def run_agents(args: argparse.Namespace, config: dict) -> list[Agent]:
    """The run's, those of --models and of --agent; "frozen" is what stage 1 started from, "r" trained without tools."""
    own, tools = config["args"]["model"], own_tools(args.out)
    warmed = args.out / "warmup"
    base = str(warmed) if warmed.is_dir() else find_model(own, args.out)
    agents = [Agent("frozen_r", base, ()), Agent("frozen", base, tools or ALL_TOOLS)]
    for stage in ("rta", "ppr"):
        if (args.out / stage).is_dir():
            name = "r" if stage == "rta" and not tools else stage
            agents.append(Agent(name, str(args.out / stage), tools))
    for path in map(pathlib.Path, args.models):
        # row "r" is stage 1's agent
        stages = ("ppr", "rta") if own_tools(path) else ("rta", "ppr")
        found = (path / stage for stage in (*stages, "warmup"))
        path = next((stage for stage in found if stage.is_dir()), path)
        tools = own_tools(path.parent)
        note_differences(config["args"], path.parent)
        trained_r = not tools and "r" not in [a.name for a in agents]
        name = "r" if trained_r else "model:" + "/".join(path.parts[-2:])
        if name in [a.name for a in agents]:
            name = f"model:{path}"
        agents.append(Agent(name, str(path), tools))
    plain = [a for a in agents if a.tools and re.match("frozen|model:", a.name)]
    for strategy in (x for x in STRATEGIES if x in args.agent and x != "react"):
        for agent in plain:
            name = re.sub("^(frozen|model)", strategy.replace("-", "_"), agent.name)
            agents.append(replace(agent, name=name, strategy=strategy))
    return agents


@functools.cache
def identity(path: str | pathlib.Path) -> str:
    """Hash of a file, those of a folder's files, or a hub id with its commit."""
    folder = pathlib.Path(path)
    if folder.is_dir():
        return " ".join(identity(p) for p in sorted(folder.iterdir()) if p.is_file())
    if not folder.is_file():  # the hub's cache has a folder for each commit
        try:
            found = cached_file(path, "config.json")
        except (OSError, ValueError) as e:
            why = "no such folder, and no hub id in reach"
            raise ModelError(f"{path}: {why}") from e
        return f"{path}@{pathlib.Path(found).parent.name}"
    with folder.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def row_file(args, ctx: Context, agent: Agent, seed: int, off: tuple) -> pathlib.Path:
    """RUN/rows/NAME-HASH.jsonl; the hash covers all that shapes a trajectory, the code included, except its task."""
    settings = [identity(agent.path), agent.tools, off, seed, ctx.ds.fingerprint()]
    seen = [identity(args.out / "sasrec.safetensors"), sorted(ctx.profiles.items())]
    settings += [*seen, args.k, args.bonus, args.temperature, args.greedy_answer]
    settings += [args.max_new_tokens, args.dtype, args.device, ctx.title_limit]
    settings += [agent.strategy] if agent.strategy != "react" else []
    settings += [identity(HERE / f"{name}.py") for name in CODE]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    return args.out / "rows" / f"{re.sub(r'[^a-z0-9_]+', '-', agent.name)}-{key}.jsonl"


def task_key(task: Task) -> str:
    """Tells a task from all others, the order of its candidates included."""
    candidates = [int(c) for c in task.sample.candidates]
    return json.dumps([task.sample.id, candidates, task.pair, task.more])


def record(args, ctx: Context, policy: Policy, file, bar, clock, group: list) -> None:
    """Write the line of a finished trajectory; its seconds count from the line before, so only their mean tells much."""
    t, now = group[0], time.perf_counter()
    s = t.task.sample
    line = {
        "task": task_key(t.task), "sample": s.id, "user": ctx.ds.users[s.user],
        "positive": s.target + 1, "title": ctx.titles[s.candidates[s.target]],
        "pair": t.task.pair, "more": t.task.more, "answer": t.answer, "end": t.end,
        "valid": t.valid, "rank": rank_of_positive(t),
        "reward": float(reward(ctx, t, args.k, args.bonus)),
        "calls": [call.name for call in t.calls], "tokens": sum(t.action_mask),
        "seconds": now - clock.pop(), "tool_seconds": t.tool_seconds,
        "prompt": policy.decode(t.prompt), "text": policy.decode(t.ids),
    }  # fmt: skip
    file.write(json.dumps(line) + "\n")
    bar.update()
    clock.append(now)


def play(args, ctx, agent: Agent, tasks: list[Task], seed: int, off=()) -> list[dict]:
    """A line for each task, from RUN/rows/ or sampled now and kept there; tools in `off` are not available."""
    file = row_file(args, ctx, agent, seed, off)
    kept = {line["task"]: line for line in read_jsonl(file)}
    missing = [task for task in tasks if task_key(task) not in kept]
    # InteRecAgent plans at temperature 0, the default for all
    temperature = 0 if agent.strategy == "plan-first" else args.temperature
    if missing:
        policy = load_policy(agent.path, args.device, args.dtype)
        policy.model = policy.sampler()  # without fp32 matrices that nobody trains
        policy.graphs = args.cuda_graphs
        ctx.unavailable = off
        ctx._memory.clear()  # so that tools take the time of a first call
        file.parent.mkdir(exist_ok=True)
        doing = "asking pairs of" if missing[0].pair else "evaluating"
        title = f"{doing} {agent.name}" + "".join(f" without {name}" for name in off)
        tiny = policy.tokenizer.chat_template == TINY_TEMPLATE
        if tiny and agent.strategy != "react":
            print(f"note: {agent.path} is shown no instructions: {agent.name} needs a chat model")  # fmt: skip
        bar = tqdm(total=len(missing), desc=title, unit="sample", leave=False)
        with bar, file.open("a", buffering=1) as f:
            f.write("\n")  # ends a line that an interruption cut
            clock = [time.perf_counter()]
            rollout(
                policy, ctx, missing, group_size=1, k=args.k, slots=args.slots,
                temperature=temperature, greedy_answer=args.greedy_answer,
                max_new_tokens=args.max_new_tokens, seed=(seed, 99), tools=agent.tools,
                strategy=agent.strategy,
                progress=functools.partial(record, args, ctx, policy, f, bar, clock),
            )  # fmt: skip
        ctx.unavailable = ()
        kept = {line["task"]: line for line in read_jsonl(file)}
    return [kept[task_key(task)] for task in tasks]


# -------------------------------------------------------------------------------------------------------------- probes

OBSERVED = re.compile(
    r'"name": ?"(\w+)"[^<]*</tool_call>\s*<observation>[^<]*?((?:\d+:\d ?)+)</observation>'
)


def copied_tool(line: dict) -> str | None:
    """The tool whose shown order of the candidates the answer repeats, if any."""
    for tool, shown in OBSERVED.findall(line["text"]) if line["valid"] else ():
        order = [int(pair.split(":")[0]) for pair in shown.split()]
        if order[: len(line["answer"])] == line["answer"]:
            return tool
    return None


def kendall(a: list[int], b: list[int]) -> float:
    """Kendall's tau-b of two rankings; items that only one of them holds tie for the other's last place."""
    items = sorted({*a, *b})
    x, y = ([r.index(i) if i in r else len(r) for i in items] for r in (a, b))
    dx, dy = (np.sign(np.subtract.outer(r, r)) for r in (x, y))
    norm = np.sqrt((dx**2).sum() * (dy**2).sum())
    return float((dx * dy).sum() / norm) if norm else 1.0


def ranked_items(line: dict) -> list[int]:
    """The catalogue indices that a ranking names, best first; none if it is not valid."""
    candidates = json.loads(line["task"])[1]
    return [candidates[n - 1] for n in line["answer"]] if line["valid"] else []


def agreement(before: list[dict], after: list[dict]) -> dict:
    """Share of equal first places and mean Kendall's tau over the n samples with two valid answers."""
    pairs = zip(map(ranked_items, before), map(ranked_items, after))
    found = [(a[0] == b[0], kendall(a, b)) for a, b in pairs if a and b]
    top1, tau = np.mean(found or [(0, 0)], 0).tolist()
    return {"n": len(found), "top1": top1, "kendall": tau}


def reshuffled(s: Sample) -> Sample:
    """The same sample with its candidates in another order."""
    order = np.random.default_rng([8, s.id]).permutation(len(s.candidates)).tolist()
    candidates = tuple(s.candidates[i] for i in order)
    return replace(s, candidates=candidates, target=order.index(s.target))


def probe(args, ctx: Context, agent: Agent, samples: list[Sample], rows: Rows) -> dict:
    """What a sceptic asks of the final agent; changes of N@10 are paired, with intervals."""
    asked, seed = samples[: args.probes], args.seeds[0]
    tasks = [Task(s) for s in asked]
    ask = functools.partial(play, args, ctx, agent)
    base = ask(tasks, seed)
    others = {"reshuffled": ask([Task(reshuffled(s)) for s in asked], seed)}
    if args.temperature:
        others["resampled"] = ask(tasks, seed + 1)  # what chance alone changes
    stable = tuple(others)
    for tool in agent.tools:  # without it, nothing changes where it was not called
        called = [task for task, x in zip(tasks, base) if tool in x["calls"]]
        again = {x["task"]: x for x in ask(called, seed, (tool,))}
        others[tool] = [again.get(x["task"], x) for x in base]
    usual = column([base], "ndcg@10", args.k)
    gain = {n: column([x], "ndcg@10", args.k) - usual for n, x in others.items()}
    found = intervals(gain, np.array([s.user for s in asked]))
    change = {name: {"ndcg@10": x} for name, x in found.items()}
    copies = Counter(filter(None, map(copied_tool, base)))
    return {
        "agent": agent.name,
        "n": len(asked),
        "copied": {tool: count / len(base) for tool, count in copies.items()},
        "stability": {n: agreement(base, others[n]) | change[n] for n in stable},
        "without_tool": {tool: change[tool] for tool in agent.tools},
    } | by_groups(args, ctx, samples, rows)


def by_groups(args, ctx: Context, samples: list[Sample], rows: Rows) -> dict:
    """N@10 by the items in a user's past (quarters) and by the positive's place among the candidates."""
    names = ("popularity", "sasrec", "learned_fusion", *FINAL[::-1])
    values = {n: column(rows[n], "ndcg@10", args.k) for n in names if n in rows}
    users, place = np.array([(s.user, s.target) for s in samples]).T
    past = np.array([len(ctx.ds.before(s.user, s.time)) for s in samples])
    quarter = np.searchsorted(np.quantile(past, [0.25, 0.5, 0.75]), past)
    found = {"by_history": {}, "by_position": {}}
    for key, group, size in zip(found, (quarter, place // 5), (past, place + 1)):
        for inside in (group == g for g in np.unique(group)):
            columns = {name: value[inside] for name, value in values.items()}
            label = f"{size[inside].min()}–{size[inside].max()}"
            parts = intervals(columns, users[inside])
            found[key][label] = {"n": int(inside.sum()), "rows": parts}
    return found


# -------------------------------------------------------------------------------------------------------------- output


def summarize(rows: Rows, samples: list[Sample], args) -> dict:
    """eval.json: every row's metrics with intervals, and paired differences of the FINAL rows to each other row."""
    value = {(n, m): column(x, m, args.k) for n, x in rows.items() for m in METRICS}
    pairs = [(a, b) for a in FINAL if a in rows for b in rows if b != a]
    value |= {(a, b, m): value[a, m] - value[b, m] for a, b in pairs for m in METRICS}
    found = intervals(value, np.array([s.user for s in samples]))
    result = {"split": args.split, "n": len(samples), "k": args.k}
    result |= {"temperature": args.temperature, "seeds": args.seeds, "rows": {}}
    for name, lines in rows.items():
        result["rows"][name] = {m: found[name, m] for m in METRICS} | behaviour(lines)
    gaps = {f"{a}-{b}": {m: found[a, b, m] for m in METRICS} for a, b in pairs}
    return result | {"paired": gaps}


def interval(x: dict[str, float]) -> str:
    """0.532 0.514–0.551, without the zeros."""
    shown = f"{x['mean']:.3f} {x['lo']:.3f}–{x['hi']:.3f}"
    return re.sub(r"\b0\.", ".", shown)


def signed(x: dict[str, float]) -> str:
    """+0.012 [-0.003, +0.026]."""
    return f"{x['mean']:+.3f} [{x['lo']:+.3f}, {x['hi']:+.3f}]"


def probe_lines(found: dict) -> list[str]:
    """The probes as text."""
    lines = [f"\nprobes of {found['agent']}, {found['n']} samples; change of N@10:"]
    for name, x in found["stability"].items():
        same = f"same first place {x['top1']:.1%}, Kendall's tau {x['kendall']:.3f}"
        lines.append(f"  {name:34}{signed(x['ndcg@10'])}, {same}")
    for name, x in found["without_tool"].items():
        lines.append(f"  {'without ' + name:34}{signed(x['ndcg@10'])}")
    copies = ", ".join(f"{n} {share:.1%}" for n, share in found["copied"].items())
    lines.append(f"  answers that repeat one tool's order: {copies or 'none'}")
    for title, key in (("items in the past", "by_history"), ("place", "by_position")):
        for label, group in found[key].items():
            if x := group["rows"].get(found["agent"]):
                n = f"{group['n']} of all samples"
                lines.append(f"  N@10 for {title} {label}: {interval(x)}, {n}")
    return lines


def cost(name: str, row: dict) -> str:
    """What an agent's request costs and which tools it calls."""
    calls = Counter({n: c for n, c in row["calls"].items() if c >= 0.005})
    used = ", ".join(f"{n} {c:.2f}" for n, c in calls.most_common())
    times = f"{row['ms']:.1f} ms a request, {row['tool_ms']:.2f} of them in tools"
    means = f"reward {row['reward']:.3f}, {row['tokens']:.0f} tokens, {times}"
    return f"{name}: {means}; calls: {used or 'none'}"


def table(result: dict) -> str:
    """The comparison as text (N@1 is H@1), what the agents do, and the final agent against every row."""
    rows, shown = result["rows"], [m for m in METRICS if m != "ndcg@1"]
    names = [m.replace("hit", "H").replace("ndcg", "N").upper() for m in shown]
    seeds = f"sampling seeds {' '.join(map(str, result['seeds']))}"
    seeds += f", rankings of {result['k']}" if result["k"] != 10 else ""
    width = 1 + max(25, *map(len, rows))
    lines = [
        f"{result['split']} split, {result['n']} samples, {seeds}, 95% intervals over users",
        " " * width + "".join(f"{n:>16}" for n in names) + f"{'valid':>8}{'calls':>7}",
    ]
    for name, row in rows.items():
        cells = "".join(f"  {interval(row[m]):>14}" for m in shown)
        if "calls" in row:  # an agent
            cells += f"{row['valid']:8.1%}{row['tool_calls']:7.2f}"
        lines.append(f"{name:{width}}{cells}")
    lines += ["", *(cost(n, row) for n, row in rows.items() if "calls" in row)]
    last = next((name for name in FINAL if name in rows), None)
    others = [name for name in rows if last and name != last]
    if others:
        lines.append(f"\nN@10 of {last} minus each other row (paired):")
    for name in others:
        gap = result["paired"][f"{last}-{name}"]["ndcg@10"]
        lines.append(f"  {name:{width}}{signed(gap)}")
    if "probes" in result:
        lines += probe_lines(result["probes"])
    return "\n".join(lines)


def thin(items: list, count: int) -> list:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[i] for i in places.astype(int)]


def payload(args, config: dict, result: dict, rows: dict, pairs: dict, kept: int):
    """What the report and the figures are drawn from; at most `kept` trajectories of each kind."""
    steps = [x for x in read_jsonl(args.out / "metrics.jsonl") if "tool_calls" in x]
    fields = ("stage", "step", *CURVES)
    groups: dict[tuple, list[dict]] = {}
    for t in read_jsonl(args.out / "trajectories.jsonl"):
        groups.setdefault((t["stage"], t["step"]), []).append(t)
    flags, commit = config["args"], config["commit"] or "unknown"
    model = f"model {flags['model']}, seed {flags['seed']}, commit {commit}"
    return {
        "title": config["dataset"],
        "run": f"{args.out}: {model}.",
        "eval": result,
        "metrics": [{x: step.get(x) for x in fields} for step in thin(steps, 800)],
        "texts": {n: x[0][:kept] for n, x in rows.items() if "text" in x[0][0]},
        "pairs": {name: lines[: 2 * (kept // 2)] for name, lines in pairs.items()},
        "training": thin(list(groups.values()), kept),
    }


def write_report(path: pathlib.Path, make: Callable[[int], dict]) -> None:
    """report.html: the template with the payload as escaped JSON, cut to MAX_REPORT."""
    template = (HERE / "assets" / "report.html").read_text(encoding="utf-8")
    for kept in (60, 30, 15, 8, 4, 2):
        safe = json.dumps(make(kept)).replace("<", "\\u003c")
        page = template.replace("__PAYLOAD__", safe)
        if len(page.encode()) <= MAX_REPORT:
            break
    path.write_text(page, encoding="utf-8")


def ask_pairs(args, ctx: Context, agents: list[Agent]) -> dict[str, list[dict]]:
    """Both questions about some hard pairs, answered by the agents before and after stage 2."""
    pairs = read_pairs(args.out / "hard_pairs.jsonl")[:KEPT_PAIRS]
    train = ctx.ds.splits["train"]
    samples = {pair.sample: train.of(pair.sample) for pair in pairs}
    tasks = pair_tasks(pairs, samples, np.random.default_rng(0))
    names = {a.name for a in agents}
    own = next(x for x in ("rta", "r", "frozen") if x in names)  # before stage 2
    asked = [a for a in agents if a.name in (own, "ppr") and tasks]
    return {a.name: play(args, ctx, a, tasks, args.seeds[0]) for a in asked}


def plot(shown: dict, folder: pathlib.Path) -> None:
    """curves.png and comparison.png from the report's payload; ModelError without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError as e:
        raise ModelError("--plot needs matplotlib: pip install matplotlib") from e
    pyplot.switch_backend("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    pyplot.rc("figure", figsize=(10, 6))
    figure, axes = pyplot.subplots(2, 2, layout="constrained")
    for axis, (key, title) in zip(axes.flat, CURVES.items()):
        axis.set(title=title, xlabel="step")
        at = 0  # where the stage starts
        for stage in dict.fromkeys(x["stage"] for x in shown["metrics"]):
            steps = [x for x in shown["metrics"] if x["stage"] == stage]
            x = at + np.array([step["step"] for step in steps])
            y = np.array([step[key] for step in steps], float)
            at = x[-1]
            (dots,) = axis.plot(x, y, ".", alpha=0.4, label=stage)
            if len(x) > 5:  # the mean of five steps
                mean = np.convolve(y, np.full(5, 0.2), "valid")
                axis.plot(x[2:-2], mean, color=dots.get_color())
        axis.set_ylim(min(0, axis.get_ylim()[0]))
        axis.legend()
    figure.savefig(folder / "curves.png", dpi=150)
    rows = shown["eval"]["rows"]
    names = sorted(rows, key=lambda name: rows[name]["ndcg@10"]["mean"])
    figure, axes = pyplot.subplots(1, 2, sharey=True, layout="constrained")
    for axis, key in zip(axes, ("ndcg@10", "hit@1")):
        found = [[rows[n][key][x] for x in ("lo", "mean", "hi")] for n in names]
        lo, mean, hi = np.array(found).T
        axis.errorbar(mean, names, xerr=(mean - lo, hi - mean), fmt="o", capsize=3)
        axis.set(title=f"{key}, 95% intervals over users")
        axis.grid(axis="x", alpha=0.4)
    figure.savefig(folder / "comparison.png", dpi=150)
    print(f"written: {folder / 'curves.png'}, {folder / 'comparison.png'}")


def show(name: str, lines: list[dict]) -> None:
    """Print trajectories: prompt, what the agent wrote and read, and what the user really bought."""
    for t in lines:
        bought = f"user {t['user']}, bought {t['positive']} ({t['title']})"
        found = f"rank {t['rank']}, reward {t['reward']:.3f}, end: {t['end']}"
        print(f"\n=== {name}, {bought}: {found}")
        print(t["prompt"])
        print(re.sub("(</observation>|</tool_call>)", r"\1\n", t["text"]))


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage="python eval.py RUN [--flag value ...]; all flags: python eval.py --help",
        description=__doc__, formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("out", type=pathlib.Path, metavar="RUN", help="run folder made by train.py")
    add("--split", choices=["valid", "test"], default="test", help="what to rank")
    add("--samples", type=int, help="of the split (0: all; default: as the run did)")
    add("--seeds", type=int, nargs="+", default=[0], help="of what the agents sample")
    add("--temperature", type=float, default=0.0, help="to sample agents (0: greedy)")
    add("--rows", nargs="+", help="print only these rows, e.g. frozen; no report")
    add("--models", nargs="+", default=[], metavar="DIR", help="other runs, more rows")
    how = {"nargs": "+", "choices": list(STRATEGIES), "default": ["react"]}
    add("--agent", **how, help="also the untrained model as these agents")
    add("--device", help="default: the run's")
    text = "requests at once (default: a rollout's rows); kept rows keep their times"
    add("--slots", type=int, help=text)
    add("--probes", type=int, nargs="?", const=300, help="run them, on so many samples")
    add("--plot", nargs="?", const="", metavar="DIR", help="figures (RUN/plots)")
    text = "print N trajectories (of the final agent, or of --rows NAME) and stop"
    add("--show", type=int, metavar="N", help=text)
    add("--user", help="print this user's trajectories and stop")
    args = parser.parse_args()
    more = args.probes or args.plot is not None
    numbers = args.samples, args.show, args.probes, args.slots, args.temperature
    possible = all(0 <= (x or 0) < math.inf for x in (*numbers, *args.seeds))
    for wrong, reason in (
        (args.rows and more, "--probes and --plot need all rows: leave --rows out"),
        ((args.user or args.show) and more, "--show and --user print trajectories only: no --probes, no --plot"),
        (not possible, "--samples, --show, --probes, --slots, --seeds and --temperature cannot be negative or infinite"),
        (0 in (args.show, args.slots), "--show 0 and --slots 0 do nothing: give a positive number"),
        (len(args.seeds) > 1 and not args.temperature, "--seeds need a --temperature above 0: greedy agents have no chance"),
    ):  # fmt: skip
        if wrong:
            parser.error(reason)
    return args


def load(args: argparse.Namespace) -> tuple[dict, Context]:
    """The run's config and what its tools look things up in; fills in the settings that `args` leaves to the run."""
    config = read_config(args.out)
    own = config["args"]
    for name in ("greedy_answer", "k", "bonus", "dtype", "max_new_tokens"):
        setattr(args, name, own[name])
    args.device = args.device or own["device"]
    # runs from before that flag have none
    args.cuda_graphs = own.get("cuda_graphs", False) and args.device.startswith("cuda")
    if args.samples is None:
        args.samples = own["test_samples"]
    check_device(args.device)
    args.slots = args.slots or own["slots"] * own["group_size"]
    ds = load_dataset(own["dataset"], own["data_dir"])
    if ds.fingerprint() != config["fingerprint"]:
        raise DatasetError(f"{args.out}: its dataset has changed since; restore it")
    return config, load_context(args.out, ds, own["title_chars"])


def evaluate(args, ctx: Context, agents: list[Agent], samples: list) -> Rows:
    """The rows asked for; ModelError for one that there is not."""
    names, rows = [a.name for a in agents], {}
    agents = [a for a in agents if not args.rows or a.name in args.rows]
    for agent in agents:
        identity(agent.path)  # a misspelt --models should not cost an evaluation first
    if not args.rows or set(args.rows) - set(names):
        for name, scores in baseline_scores(ctx, args.out, samples).items():
            rows[name] = [[{"rank": r} for r in ranks_from_scores(scores, samples)]]
    if unknown := set(args.rows or ()) - {*names, *rows}:
        known = " ".join([*rows, *names])
        raise ModelError(f"no row {' '.join(unknown)}; there are {known}")
    tasks = [Task(s) for s in samples]
    for agent in agents:
        rows[agent.name] = [play(args, ctx, agent, tasks, seed) for seed in args.seeds]
    return {n: x for n, x in rows.items() if not args.rows or n in args.rows}


def main() -> None:
    args = parse_args()
    config, ctx = load(args)
    pool, agents = ctx.ds.splits[args.split], run_agents(args, config)
    order = np.random.default_rng(0).permutation(len(pool))[: args.samples or None]
    samples = [pool[i] for i in order]
    if config["args"]["profiles"] == "llm":
        missing = sum(s.id not in ctx.profiles for s in samples)
        if missing:
            print(f"note: {missing} of {len(samples)} have the template's profile")
    last = next(a for name in FINAL for a in agents if a.name == name)
    if args.user or args.show:
        own = [s for s in pool if ctx.ds.users[s.user] == args.user]
        chosen = (own if args.user else samples)[: args.show]
        if not chosen:
            raise ModelError(f"no sample of the {args.split} split is of {args.user}")
        tasks = [Task(s) for s in chosen]
        asked = args.rows or [a.name for a in agents if a.strategy != "react"]
        named = [a for a in agents if a.name in asked]
        if args.rows and not named:
            names = " ".join(a.name for a in agents)
            raise ModelError(f"no agent {args.rows[0]}; there are {names}")
        reader = named[0] if named else last
        return show(reader.name, play(args, ctx, reader, tasks, args.seeds[0]))
    rows = evaluate(args, ctx, agents, samples)
    result = summarize(rows, samples, args)
    if args.probes:
        result["probes"] = probe(args, ctx, last, samples, rows)
    print(table(result))
    if args.rows:
        return
    pairs = ask_pairs(args, ctx, agents)
    make = functools.partial(payload, args, config, result, rows, pairs)
    which = "" if args.split == "test" else f"-{args.split}"
    figures, page = args.out / f"eval{which}.json", args.out / f"report{which}.html"
    figures.write_text(json.dumps(result, indent=1))
    write_report(page, make)
    print(f"\nwritten: {figures}, {page}")
    if args.plot is not None:
        plot(make(0), pathlib.Path(args.plot or args.out / f"plots{which}"))


if __name__ == "__main__":
    run_main(main, "stopped; the same command continues", ModelError)
