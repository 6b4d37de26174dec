"""What a step of training asks, samples, logs and saves, and what demonstrations and prompts show."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import removed
from test_engine import random_rows

import eval as ev
import grpo
import ppr
import rollout as rollout_module
import train
from data import Sample, history
from grpo import policy_gradient, rollout_metrics
from model import muon_and_adamw
from ppr import DIRECTIONS, HardPair, bound_gradient, letter_rows, target_letter
from rollout import (
    ALL_TOOLS,
    Rollout,
    Task,
    Trajectory,
    demonstrate,
    scripted_call,
    user_prompt,
)
from sasrec import SASRec
from tools import Call, Context


class Stopped(Exception):
    pass


def a_run(world, tmp_path, *flags, ctx=None, policy=None):
    return train.Run(train.parse_args(list(flags)), tmp_path, world, ctx, policy)


def test_a_resumed_run_refuses_another_dataset(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_sasrec", lambda *_, **__: SASRec(5))
    args = train.parse_args([])
    args.resumed = False
    train.prepare(args, tmp_path / "r", world)
    args.resumed = True
    train.prepare(args, tmp_path / "r", world)
    other = replace(world, rating=np.flip(world.rating))
    with pytest.raises(train.DatasetError, match="dataset has changed since this run"):
        train.prepare(args, tmp_path / "r", other)


def test_each_seed_task_and_member_of_a_group_has_chances_of_its_own(policy, ctx):
    a, b = ctx.ds.splits["train"][:2]
    tasks = [Task(a), Task(b), *(Task(a, (x, 8 - x), more) for x in (3, 5) for more in (True, False))]  # fmt: skip
    drawn = []
    for seed in ((0, 2, 1), (0, 2, 2), (1, 2, 1)):
        rollouts = Rollout(policy, ctx, tasks, group_size=2, seed=seed)
        drawn += [tuple(r.uniform[:4]) for t in tasks for r in rollouts.begin(t)]
    assert len(set(drawn)) == len(drawn) == 3 * 6 * 2


def test_a_prompt_shows_the_latest_purchase_first_with_its_rating(ctx):
    for s in ctx.ds.splits["test"][:5]:
        lines = user_prompt(ctx, Task(s), ALL_TOOLS).split("\n")
        rows = history(ctx.ds, s)[::-1]
        for line, r in zip(lines[1:], rows):
            title = ctx.titles[ctx.ds.item[r]]
            assert line == f"{title} ({ctx.ds.rating[r]:.0f})"
        offered = [f"{ctx.titles[c]} = {n}" for n, c in enumerate(s.candidates, 1)]
        assert lines[len(rows) + 2 : -1] == offered


def test_a_demonstrated_letter_follows_from_the_sums_and_the_question(policy, ctx):
    seen = set()
    for seed in range(60):
        task = Task(ctx.ds.splits["train"][seed], (3, 5), seed % 2 == 0)
        rng = np.random.default_rng(seed)
        t = demonstrate(policy, ctx, task, 10, rng, 3)
        said = policy.decode(t.ids).rpartition("<answer>")[2]
        a, b = (int(x.split(":")[1]) for x in said.split()[:2])
        if a != b:
            assert t.answer == ("A" if (a > b) == task.more else "B")
            assert f"{'A>B' if a > b else 'B>A'}; {task.asked}={t.answer}" in said
            seen.add((t.answer, task.more))
    assert len(seen) == 4


def test_demonstrated_calls_name_the_last_purchase(ctx):
    rng, named = np.random.default_rng(0), []
    for s in ctx.ds.splits["train"][:60]:
        c = scripted_call(ctx, s, "get_similar_items", rng)
        last = ctx.ds.item[history(ctx.ds, s)[-1]]
        named.append(c.arguments == {"item_title": ctx.titles[last]})
    assert 0.8 < np.mean(named)


def test_metrics_of_ranks_are_of_rankings_only(ctx):
    """Stage 2 asks about pairs too; a reward of 0, a wrong letter, is no reward."""
    sample = ctx.ds.splits["train"][0]
    first = [sample.target + 1, *(n for n in range(1, 21) if n != sample.target + 1)]
    call = Call("get_user_profile", {})
    ranked = Trajectory(Task(sample), [], answer=first[:10], reward=1.0)
    second = Trajectory(Task(sample), [], answer=[first[1], first[0], *first[2:10]], reward=0.6)  # fmt: skip
    right = Trajectory(Task(sample, (3, 5)), [], answer="A", reward=1.0, calls=[call])
    wrong = Trajectory(Task(sample, (3, 5)), [], answer="B", reward=0.0)
    spoilt = Trajectory(Task(sample, (3, 5)), [], answer="A", reward=-1.0, malformed=True)  # fmt: skip
    found = rollout_metrics([[ranked, second], [right, wrong, spoilt]])
    assert (found["hit@1"], found["hit@10"]) == (0.5, 1)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert found["tool_rate_of_rewarded"] == pytest.approx(1 / 3)
    assert (found["valid"], found["tool_calls"]) == (0.8, 0.2)
    assert found["reward_mean"] == pytest.approx(0.32)
    assert rollout_metrics([[right, wrong]])["hit@1"] is None


def test_a_sampler_that_disagrees_is_measured(policy, ctx):
    """KL(sampler, trainer) where all of the sampler's log-probabilities are too high by 0.3; the loss is Eq. 6's."""
    rng = np.random.default_rng(0)
    group = [demonstrate(policy, ctx, Task(ctx.ds.splits["train"][0]), 10, rng, 1) for _ in "ab"]  # fmt: skip
    rows = [grpo.TrainRow(0, t.ids, t.action_mask) for t in group]
    logprobs, _ = grpo.token_logprobs(policy, [group[0].prompt], rows)
    parts = logprobs.detach().split([sum(t.action_mask) for t in group])
    for t, x, reward in zip(group, parts, (1.0, 0.0)):
        old = np.zeros(len(t.ids))
        old[np.array(t.action_mask, bool)] = x + 0.3
        t.logprobs, t.reward = old.tolist(), reward
    found = policy_gradient(policy, [group])
    assert found["kl_sampler_trainer"] == pytest.approx(math.exp(-0.3) - 1 + 0.3, rel=1e-3)  # fmt: skip
    loss = -(0.5 * parts[0].sum() - 0.5 * parts[1].sum()) / 2
    assert found["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_pair_accuracy_is_the_share_of_right_letters(policy, ctx):
    rng, right = np.random.default_rng(0), []
    groups = [[demonstrate(policy, ctx, Task(s, (s.target + 1, (s.target + 3) % 20 + 1), more), 10, rng, 2)]
              for s in ctx.ds.splits["train"][:5] for more in (True, False)]  # fmt: skip
    groups = groups[:5]
    for t, *_ in groups:
        rows = letter_rows(policy, t, 0)
        with torch.no_grad():
            a, b = grpo.token_logprobs(policy, [t.prompt], rows)[0]
        right.append(bool(a > b))
    assert 0 < sum(right) != len(right) / 2
    found = bound_gradient(policy, groups)
    assert found["pair_accuracy"] == pytest.approx(np.mean(right))


def test_directions_ask_what_they_are_called():
    assert DIRECTIONS == {"both": (True, False), "more": (True,), "less": (False,)}


def test_a_warm_ups_optimizer_goes_on_where_it_stopped(policy, tmp_path):
    """Muon's momentum and Adam's moments come back: three steps in a row equal two, a reload and one."""
    prompts, rows = random_rows(policy, [9], [[6, 5]])

    def step(optimizers):
        policy.model.zero_grad()
        grpo.token_logprobs(policy, prompts, rows)[0].sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    def weights():
        return {k: v.clone() for k, v in policy.model.state_dict().items()}

    optimizers = muon_and_adamw(policy.model, 1e-2, True)
    step(optimizers), step(optimizers)
    middle = weights()
    run = train.Run(train.parse_args(["--stage", "warmup", "--dtype", "float32", "--device", "cpu"]), tmp_path, None, None, policy)  # fmt: skip
    run.stage, run.step, run.optimizers = "warmup", 2, optimizers
    train.save_state(run)
    step(optimizers)
    whole = weights()
    policy.model.load_state_dict(middle)
    run.optimizers = None
    train.restore_state(run)
    for group in (g for o in run.optimizers for g in o.param_groups):
        group["lr"] = 1e-2
    step(run.optimizers)
    assert all(torch.equal(whole[k], x) for k, x in weights().items())


def test_training_asks_of_training_samples_only(world, ctx, policy, tmp_path):
    ids = {name: {s.id for s in split} for name, split in world.splits.items()}
    run = a_run(world, tmp_path, "--batch", "8", ctx=ctx, policy=policy)
    asked = [t.sample for step in range(40) for t in train.stage_tasks(run, "rta", step)]  # fmt: skip
    mined = train.mined_samples(run)
    run.pairs = [HardPair(s.id, s.target + 1, 3, 3) for s in mined[:2]]
    asked += [t.sample for step in range(40) for t in train.stage_tasks(run, "ppr", step)]  # fmt: skip
    for s in asked + mined:
        assert s.id in ids["train"] and s == world.splits["train"].of(s.id)
    run = a_run(world, tmp_path, "--stage", "warmup", "--warmup-steps", "9", "--exercise-steps", "1", "--group-size", "1", ctx=ctx, policy=policy)  # fmt: skip
    shown = [t for step in range(1, 9) for t in train.warmup_demonstrations(run, step)[2]]  # fmt: skip
    shown = {t.task.sample.id for t in shown if t.task.sample}
    assert shown <= ids["fit"] | ids["train"] and shown & ids["train"] and shown & ids["fit"]  # fmt: skip


def test_every_seed_and_step_has_prompts_and_chances_of_its_own(world, tmp_path, monkeypatch):  # fmt: skip
    seeds, orders = [], []

    def sample_groups(run, tasks, seed, *more):
        seeds.append(seed)
        orders.append(tuple(t.sample.id for t in tasks))
        raise Stopped

    monkeypatch.setattr(train, "sample_groups", sample_groups)
    for seed in ("0", "1"):
        run = a_run(world, tmp_path, "--seed", seed)
        run.pairs = [HardPair(s.id, s.target + 1, 3, 3) for s in world.splits["train"][:90]]  # fmt: skip
        for stage in ("rta", "ppr"):
            for step in (0, 1):
                with pytest.raises(Stopped):
                    train.grpo_step(run, stage, step)
        with pytest.raises(Stopped):
            train.mine_pairs(run)
    assert len(set(seeds)) == len(seeds) == 10
    assert len(set(orders)) == 10


def test_the_letters_order_is_drawn_anew_in_every_step(world, tmp_path):
    """One pair a step: with the epoch's draw its positive would be the same letter all along."""
    run = a_run(world, tmp_path, "--batch", "4")
    run.pairs = [HardPair(s.id, s.target + 1, (s.target + 1) % 20 + 1, 3) for s in world.splits["train"][:60]]  # fmt: skip
    letters = [target_letter(train.stage_tasks(run, "ppr", step)[0]) for step in range(20)]  # fmt: skip
    assert 3 < letters.count("A") < 17


def test_the_letters_order_and_the_pairs_have_streams_of_their_own(
    world, tmp_path, monkeypatch
):
    """A seed's trailing zeros do not count: (0, 3, 0, step 0) once drew the letters from the stream of (0, 3, 0)."""
    run, drawn = a_run(world, tmp_path, "--batch", "4"), []
    run.pairs = [HardPair(s.id, s.target + 1, (s.target + 1) % 20 + 1, 3) for s in world.splits["train"][:60]]  # fmt: skip
    pair_tasks = train.pair_tasks

    def with_first_draw(pairs, samples, rng, directions):
        drawn.append(rng.random())
        return pair_tasks(pairs, samples, rng, directions)

    monkeypatch.setattr(train, "pair_tasks", with_first_draw)
    for step in range(3):
        train.stage_tasks(run, "ppr", step)
    order = np.random.default_rng([0, train.STAGE_SEED["ppr"], 0]).random()
    assert len({order, *drawn}) == 4


def test_mining_takes_random_negatives_if_told(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "sample_groups", lambda run, tasks, *_: [[Trajectory(t, [])] for t in tasks])  # fmt: skip
    monkeypatch.setattr(train, "mine", lambda *how: asked.append(how) or [])
    for flags in ([], ["--random-negatives"]):
        run = a_run(world, tmp_path, *flags)
        train.mine_pairs(run)
        mined = [t.task for t in asked[-1][0]]
        assert mined == [Task(s) for s in train.mined_samples(run)]
    assert [how[2] for how in asked] == [False, True]


def test_stage_2_can_ask_only_what_the_tools_order_rightly_or_wrongly(world, tmp_path, monkeypatch, capsys):  # fmt: skip
    """Two tools by hand: together they put the positive above 2, below 3 and level with 4."""
    s = world.splits["train"][0]
    gaps = {"get_user_profile": {2: 0.5, 3: 0.2, 4: 0.1}, "get_rating_behavior": {2: -0.2, 3: -0.7, 4: -0.1}}  # fmt: skip

    def tool_scores(ctx, name, sample):
        scores = np.full(20, 0.3)
        for n, gap in gaps.get(name, {}).items():
            scores[n - 1] -= gap
        return scores

    pairs = [HardPair(s.id, 1, n, n) for n in (2, 3, 4)]
    monkeypatch.setattr(ppr, "tool_scores", tool_scores)
    monkeypatch.setattr(train, "sample_groups", lambda run, tasks, *_: [[Trajectory(t, [])] for t in tasks])  # fmt: skip
    monkeypatch.setattr(train, "mine", lambda *_: list(pairs))
    left = ["--without-tool", "get_rating_behavior"]
    for flags, kept in (
        ([], [2, 3, 4]),
        (["--ppr-pairs", "right"], [2]),
        (["--ppr-pairs", "wrong"], [3]),
        (["--ppr-pairs", "right", *left], [2, 3, 4]),
        (["--ppr-pairs", "wrong", *left], []),
    ):
        run = a_run(world, tmp_path, *flags)
        train.mine_pairs(run)
        found = ppr.read_pairs(tmp_path / "hard_pairs.jsonl")
        assert [pair.negative for pair in run.pairs] == kept == [x.negative for x in found]  # fmt: skip
    assert "left out: none is wrong by the tools" in capsys.readouterr().out


def test_profiles_are_written_for_what_eval_will_ask(world, tmp_path, monkeypatch):
    chosen = []

    def evaluate(args, ctx, agents, samples):
        chosen.append([s.id for s in samples])
        raise Stopped

    ctx, agents = SimpleNamespace(ds=world), [ev.Agent("frozen", "x")]
    monkeypatch.setattr(ev, "load", lambda args: ({"args": {"profiles": "template"}}, ctx))  # fmt: skip
    monkeypatch.setattr(ev, "run_agents", lambda *_: agents)
    monkeypatch.setattr(ev, "evaluate", evaluate)
    for split in ("test", "valid"):
        argv = ["eval.py", "x", "--samples", "7", "--split", split]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(Stopped):
            ev.main()
        assert set(chosen[-1]) <= {s.id for s in world.splits[split]}
    run = a_run(world, tmp_path, "--stage", "warmup", "--test-samples", "7", "--seed", "3")  # fmt: skip
    assert [s.id for s in train.profile_samples(run)] == chosen[0]


def test_no_weight_decay_pulls_at_a_policy(policy, world, tmp_path):
    (optimizer,) = train.make_optimizers(a_run(world, tmp_path, policy=policy), "rta")
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0, (0.9, 0.95))


def test_a_steps_best_and_worst_trajectory_are_kept_with_their_own_advantage(policy, world, tmp_path):  # fmt: skip
    run = a_run(world, tmp_path, policy=policy)
    task = Task(world.splits["train"][0])
    group = [Trajectory(task, [5], [6 + i], [1], reward=r) for i, r in enumerate((0.5, 1.0, -1.0, 0.5))]  # fmt: skip
    other = [Trajectory(task, [5], [9], [1], reward=9.0)] * 4
    train.log_step(run, {"stage": "rta", "step": 3}, [group, other])
    lines = [json.loads(x) for x in (tmp_path / "trajectories.jsonl").read_text().splitlines()]  # fmt: skip
    found = sorted((x["reward"], x["advantage"], x["text"]) for x in lines)
    wanted = [(-1.0, -1.25, policy.decode([8])), (1.0, 0.75, policy.decode([7]))]
    assert found == wanted and lines[0]["positive"] == task.sample.target + 1


def test_a_warm_up_shows_more_and_more_and_in_the_end_hasty_answers(world, ctx, policy, tmp_path, monkeypatch):  # fmt: skip
    flags = ("--stage", "warmup", "--warmup-steps", "120", "--exercise-steps", "20", "--batch", "40", "--group-size", "1")  # fmt: skip
    run = a_run(world, tmp_path, *flags, ctx=ctx, policy=policy)
    shown = []

    def demonstrate(policy, ctx, task, k, rng, max_steps, hasty, *more):
        shown.append((task, max_steps, hasty))
        return Trajectory(task, [1], [2], [1])

    monkeypatch.setattr(train, "demonstrate", demonstrate)
    monkeypatch.setattr(train, "exercises", lambda *_: [Trajectory(Task(None), [1], [2], [1])])  # fmt: skip
    for step, max_steps, hasty, n in ((0, 1, False, 0), (19, 1, False, 0), (24, 1, False, 20), (26, 2, False, 20), (39, 2, False, 20), (41, 5, False, 20), (109, 5, False, 20), (111, 5, True, 40)):  # fmt: skip
        shown.clear()
        train.warmup_demonstrations(run, step)
        assert [x[1:] for x in shown] == [(max_steps, hasty)] * n, step
    tasks = [s[0] for step in range(111, 120) for s in (shown.clear(), train.warmup_demonstrations(run, step), list(shown))[2]]  # fmt: skip
    pairs = [t for t in tasks if t.pair]
    assert 0.17 < len(pairs) / len(tasks) < 0.33
    assert 0.3 < np.mean([t.more for t in pairs]) < 0.7
    assert len({t.sample.id for t in tasks}) > 200, "every step has its own"


def test_a_warm_ups_rate_rises_and_then_falls_to_a_fiftieth(world, ctx, policy, tmp_path, monkeypatch):  # fmt: skip
    flags = ("--stage", "warmup", "--warmup-steps", "60", "--batch", "1", "--group-size", "1", "--warmup-lr", "1")  # fmt: skip
    run = a_run(world, tmp_path, *flags, ctx=ctx, policy=policy)
    rates = []
    monkeypatch.setattr(train, "update", lambda run, lr: rates.append(lr) or {})
    for step in (0, 3, 6, 20, 40, 59):
        train.warmup_step(run, step)
    assert rates == pytest.approx([1 / 7, 4 / 7, 1, 1, 0.5, 0.025])


def test_a_state_comes_back_from_either_folder_whole(policy, world, tmp_path):
    """`last.old` is all that there is where a kill came between put's two renames."""
    run = a_run(world, tmp_path, policy=policy)
    run.stage, run.step, run.skipped = "rta", 4, 2
    run.optimizers = train.make_optimizers(run, "rta")
    (tmp_path / "metrics.jsonl").write_text("1\n2\n")
    train.save_state(run)
    (tmp_path / "metrics.jsonl").write_text("1\n2\n3\n")
    for place in ("last", "last.old"):
        again = a_run(world, tmp_path, policy=policy)
        train.restore_state(again)
        assert (again.stage, again.step, again.skipped) == ("rta", 4, 2)
        assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n"
        if place == "last":
            (tmp_path / "last").rename(tmp_path / "last.old")


def test_rollouts_have_the_settings_of_the_flags(world, ctx, policy, tmp_path, monkeypatch):  # fmt: skip
    asked = []
    monkeypatch.setattr(train, "rollout", lambda policy, ctx, tasks, **how: asked.append(how) or [])  # fmt: skip
    flags = ("--k", "7", "--temperature", "0.3", "--max-new-tokens", "99", "--without-tool", "get_user_profile")  # fmt: skip
    for more, greedy in (((), True), (("--no-greedy-answer",), False)):
        run = a_run(world, tmp_path, *flags, *more, ctx=ctx, policy=policy)
        train.sample_groups(run, [], (4, 2), 5, 3)
        wanted = {"group_size": 3, "k": 7, "slots": 5, "temperature": 0.3, "greedy_answer": greedy,
                  "max_new_tokens": 99, "seed": (4, 2), "progress": None,
                  "tools": tuple(x for x in ALL_TOOLS if x != "get_user_profile")}  # fmt: skip
        assert asked.pop() == wanted


def test_as_many_samples_are_mined_as_told_each_once(world, tmp_path):
    found = train.mined_samples(a_run(world, tmp_path, "--mine-samples", "9"))
    assert len({s.id for s in found}) == len(found) == 9


def test_a_warm_ups_rate_is_that_of_all_weights(policy):
    """train.update sets it for each of `param_groups`."""
    optimizers = muon_and_adamw(policy.model, 1e-2, False)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, policy.model.parameters()))


def test_an_agent_is_told_when_it_has_no_tools(ctx, policy):
    task = Task(ctx.ds.splits["train"][0])
    assert user_prompt(ctx, task, ()).splitlines()[-2:] == ["No tools.", "Rank."]
    assert "No tools." not in user_prompt(ctx, task, ALL_TOOLS)
    rng, bare = np.random.default_rng(0), 0
    for _ in range(300):
        t = demonstrate(policy, ctx, task, 10, rng, 2)
        without = "No tools." in policy.decode(t.prompt)
        assert not (without and t.calls)
        bare += without
    assert 3 < bare < 25, "a few demonstrations are without any"


def test_the_system_prompt_names_k_and_the_tools(ctx):
    text = rollout_module.system_prompt(("get_user_profile",), 7)
    assert "with the 7 best candidates" in text and '"get_user_profile"' in text
    assert "get_similar" not in text


def test_a_request_for_a_profile_shows_what_was_before_the_sample(ctx, policy):
    for sample in ctx.ds.splits["test"][::40]:
        other = Context(removed(ctx.ds, sample.time), ctx.sasrec)
        prompts = [rollout_module.profile_prompt(policy, c, sample) for c in (ctx, other)]  # fmt: skip
        assert prompts[0] == prompts[1]
        lines = policy.decode(prompts[0]).split("\n")[1:]
        assert len(lines) == min(50, len(history(ctx.ds, sample, None)))


def test_each_token_has_a_chance_of_its_own(policy, ctx, monkeypatch):
    """Row by row the generator's numbers, one after the other."""
    used, real = [], rollout_module.sample_tokens

    def watching(logits, temperature, uniform, greedy):
        used.append(uniform.tolist())
        return real(logits, temperature, uniform, greedy)

    monkeypatch.setattr(rollout_module, "sample_tokens", watching)
    task = Task(ctx.ds.splits["train"][0])
    ((t,),) = rollout_module.rollout(policy, ctx, [task], group_size=1, max_new_tokens=20, seed=(4,))  # fmt: skip
    drawn = np.random.default_rng([4, *task.key, 0]).random(20)
    n = sum(t.action_mask)
    places = [i for i, m in enumerate(t.action_mask) if m]
    assert n > 5 and np.allclose(np.concatenate(used), drawn[places])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampling_at_a_temperature(temperature):
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(3000, 3)
    uniform = (torch.arange(3000) + 0.5) / 3000
    tokens, logprobs = rollout_module.sample_tokens(
        logits, temperature, uniform, torch.zeros(3000, dtype=torch.bool)
    )
    p = (logits[0] / temperature).softmax(0)
    assert torch.allclose(torch.bincount(tokens, minlength=3) / 3000, p, atol=1e-3)
    assert torch.allclose(logprobs.exp(), p[tokens])


def test_wrong_letters_alone_are_no_reason_to_drop_a_group(policy, ctx):
    """Rewards of 0 count in Eq. 6's mean: the other group's gradient is half as large beside them."""
    rng, sample = np.random.default_rng(0), ctx.ds.splits["train"][0]
    groups = [[demonstrate(policy, ctx, Task(sample), 10, rng, 1) for _ in "ab"] for _ in "ab"]  # fmt: skip
    losses = []
    for rewards in ((1.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (-0.5, -0.5)):
        for group, values in zip(groups, rewards):
            for t, value in zip(group, values):
                t.reward = value
        found = policy_gradient(policy, groups)
        losses.append(found["loss"])
        assert found["dropped_groups"] == (rewards[1][0] < 0)
        assert found["zero_variance_groups"] == 1
    assert losses[1] == pytest.approx(2 * losses[0])


def test_a_demonstrated_ranking_adds_up_what_was_shown(policy, ctx):
    """Tools' lists and the titles' thought alike, each as often as it was asked for."""
    with_titles = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        t = demonstrate(policy, ctx, Task(ctx.ds.splits["train"][seed]), 10, rng, 4)
        shown, _, answer = policy.decode(t.ids).rpartition("<answer>")
        total = dict.fromkeys(range(1, 21), 0)
        lists = re.findall(r"(?:^|\n)((?:\d+:\d ?)+)<", shown)
        for n, score in re.findall(r"(\d+):(\d)", " ".join(lists)):
            total[int(n)] += int(score)
        if any(total.values()):
            sums = re.findall(r"(\d+):(\d+)", answer)
            assert {int(n): int(x) for n, x in sums} == total
        assert t.answer == sorted(total, key=lambda n: -total[n])[:10]
        with_titles += "<think>Series" in shown and ":9<" in shown.replace("\n", "")
    assert with_titles > 2


def test_random_negatives_stand_in_for_a_missed_positives_pool_too():
    tasks = [Task(Sample(i, 0, 0, tuple(range(100, 120)), 2)) for i in range(300)]
    missed = [Trajectory(task, [], answer=[9, 12, 5, 1]) for task in tasks]
    drawn = {pair.negative for pair in train.mine(missed, (0,), True)}
    assert drawn == set(range(1, 21)) - {3}


def test_stage_2_goes_on_with_its_pairs_and_its_end_is_saved(world, policy, tmp_path, monkeypatch):  # fmt: skip
    """A policy in the middle of stage 2 would mine others; a finished stage must not run again after --resume."""
    pair = HardPair(world.splits["train"][0].id, 1, 2, 2)
    (tmp_path / "hard_pairs.jsonl").write_text(json.dumps(vars(pair)) + "\n")
    monkeypatch.setattr(train, "mine_pairs", lambda run: pytest.fail("mined again"))
    monkeypatch.setattr(train, "grpo_step", lambda *_: ({"loss": 0.0}, []))
    run = a_run(world, tmp_path, "--ppr-steps", "3", "--save-every", "2", policy=policy)
    run.stage = "ppr"
    train.train_stage(run, "ppr")
    assert run.pairs == [pair]
    state = json.loads((tmp_path / "last" / "state.json").read_text())
    assert (state["stage"], state["step"]) == ("ppr", 3)
