"""The training-free agents, each turn scripted: what the environment answers, what is run, and that every loop ends."""

import itertools
import json

import numpy as np
import pytest
from test_fuzz import Scripts

import rollout as rollout_module
from grpo import list_reward
from rollout import ALL_TOOLS, MAX_CALLS, STRATEGIES, Task, rollout, system_prompt
from tools import Call, ToolError, run_call

RANKING = list(range(10, 0, -1))
RANK = f"<answer>\\boxed{{{RANKING}}}</answer>"
OTHER = f"<answer>\\boxed{{{RANKING[::-1]}}}</answer>"
YES, NO = "<answer>Yes</answer>", "<think>hm</think><answer> No, because.</answer>"


def call(name, **arguments):
    written = json.dumps({"name": name, "arguments": arguments})
    return f"<think>t</think><tool_call>{written}</tool_call>"


def plan(*names, **inputs):
    steps = [{"tool_name": n, "input": ""} for n in names]
    steps += [{"tool_name": n, "input": given} for n, given in inputs.items()]
    return f"<think>t</think><tool_call>{json.dumps(steps)}</tool_call>"


@pytest.fixture
def play(policy, ctx, monkeypatch):
    """The trajectory of a policy that writes these turns, then the end token for ever."""

    def play(strategy, *turns, limit=3000, task=None):
        task = task or Task(ctx.ds.splits["test"][0])
        script = itertools.chain.from_iterable(map(policy.encode, turns))
        scripts = Scripts([script], min(policy.eos))
        monkeypatch.setattr(rollout_module, "RaggedBatch", scripts)
        monkeypatch.setattr(rollout_module, "sample_tokens", Scripts.sample)
        how = {"group_size": 1, "max_new_tokens": limit, "strategy": strategy}
        ((t,),) = rollout(policy, ctx, [task], **how)
        assert len(t.ids) == len(t.action_mask) == len(t.logprobs) <= limit
        return t

    return play


def observations(policy, t):
    """What the environment wrote: the stretches of tokens that are no actions."""
    runs = itertools.groupby(zip(t.action_mask, t.ids), lambda pair: pair[0])
    texts = [policy.decode([i for _, i in run]) for action, run in runs if not action]
    assert all(x.startswith("<observation>") and x.endswith("</observation>") for x in texts)  # fmt: skip
    return [x[len("<observation>") : -len("</observation>")] for x in texts]


def shown(ctx, task, name, **arguments):
    """The digits that a tool gives candidates 1 to 20."""
    pairs = run_call(ctx, task.sample, Call(name, arguments)).render().split("\n")[-1]
    return {int(n): int(d) for n, d in (pair.split(":") for pair in pairs.split())}


# ---------------------------------------------------------------------------------------------------------- plan first


def test_a_plan_runs_in_the_tools_order_over_one_buffer(play, policy, ctx):
    planned = ("get_similar_users", "get_user_profile", "get_session_behavior")
    t = play("plan-first", plan(*planned), RANK, YES)
    profile, session, users = (
        shown(ctx, t.task, name)
        for name in ("get_user_profile", "get_session_behavior", "get_similar_users")
    )
    kept = sorted(sorted(profile, key=lambda n: -profile[n])[:15])  # 20 less a quarter
    kept = sorted(sorted(kept, key=lambda n: -session[n])[:11])
    kept = sorted(kept, key=lambda n: -users[n])
    ran, critic = observations(policy, t)
    lines = ran.split("\n")
    assert [line.split(":")[0] for line in lines[:3]] == [
        "get_user_profile, 15 left",
        "get_session_behavior, 11 left",
        "get_similar_users, 11 left",
    ]
    assert lines[3] == f"Candidates left: {' '.join(map(str, kept))}"
    assert [c.name for c in t.calls] == sorted(planned, key=ALL_TOOLS.index)
    assert critic.startswith("Critic")
    assert (t.end, t.answer, t.valid) == ("answer", RANKING, True)


def test_a_filter_leaves_k_candidates_and_a_failed_call_does_not_end_the_plan(play, policy, ctx):  # fmt: skip
    names = [n for n in ALL_TOOLS if n not in ("item_info_search", "get_similar_items")]
    t = play("plan-first", plan(*names, item_info_search="no such thing"), RANK, YES)
    text = observations(policy, t)[0]
    assert "item_info_search, 15 left: error: no item is titled" in text
    assert len(text.split("Candidates left: ")[1].split("\n")[0].split()) == 10
    assert len(t.calls) == len(names) + 1 and t.valid


def test_no_asks_for_another_try_three_times_at_most(play, policy):
    once = (plan("get_user_profile"), RANK, NO)
    t = play("plan-first", *once, plan("get_session_behavior"), OTHER, YES)
    assert (t.end, t.answer) == ("answer", RANKING[::-1])
    seen = observations(policy, t)
    assert seen[2] == "Reflection 1 of 3: plan again." and len(seen) == 5
    t = play("plan-first", *once * 9)
    assert (t.end, t.answer, t.valid) == ("answer", RANKING, True)
    assert [x[:12] for x in observations(policy, t)].count("Reflection 3") == 1
    assert len(t.calls) == 4 and policy.decode(t.ids).endswith("</answer>")
    t = play("plan-first", RANK, *once)  # no plan at first: none is forced
    assert t.end == "answer" and not t.calls


def test_all_tries_share_the_budget_of_calls(play):
    names = [n for n in ALL_TOOLS if n not in ("item_info_search", "get_similar_items")]
    t = play("plan-first", *(plan(*names), RANK, NO) * 4)
    assert len(t.calls) == MAX_CALLS and t.end == "answer" and t.valid


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[{", "a plan is"),
        ("7", "a plan is"),
        ('{"name": "get_user_profile", "arguments": {}}', "a plan is"),
        ('["get_user_profile"]', "a plan is"),
        ('[{"name": "get_user_profile"}]', "a plan is"),
        ('[{"tool_name": ["get_user_profile"]}]', "once, of get_user_profile, "),
        ('[{"tool_name": "buy"}]', "once, of get_user_profile, "),
        ('[{"tool_name": "item_info_search"}]', "must be a string"),
        ('[{"tool_name": "item_info_search", "input": [[]]}]', "must be a string"),
        ('[{"tool_name": "get_user_profile"}, {"tool_name": "get_user_profile"}]', "once, of get_user_profile, "),
    ],
)  # fmt: skip
def test_a_malformed_plan_says_why_and_costs_validity(play, policy, text, reason):
    bad = f"<think>t</think><tool_call>{text}</tool_call>"
    t = play("plan-first", bad, plan("get_user_profile"), RANK, YES)
    error, ran, _ = observations(policy, t)
    assert error.startswith("error: ") and reason in error
    assert "Candidates left" in ran and len(t.calls) == 1
    assert t.end == "answer" and t.malformed and list_reward(t, 10) == -1


def test_no_depth_of_a_plan_crashes():
    step = '[{"tool_name": "item_info_search", "input": %s}]'
    for depth in (*range(900, 1000), 100_000):
        for text in ("[" * depth, step % ("[" * depth + "]" * depth)):
            with pytest.raises(ToolError):
                rollout_module.parse_plan(text, ALL_TOOLS)


def test_plans_without_end_are_over_the_budget(play, policy):
    t = play("plan-first", *[call("get_user_profile")] * 20)
    assert (t.end, t.answer, t.calls) == ("budget", None, [])
    t = play("plan-first", *[plan("get_user_profile")] * 20)
    assert (t.end, t.answer, len(t.calls)) == ("budget", None, 1)
    assert set(observations(policy, t)[1:]) == {"The plan has run: rank now."}


def test_a_ranking_stands_when_its_critic_is_cut_off(play, policy):
    turns = plan("get_user_profile"), RANK
    end = play("plan-first", *turns)  # the critic writes the end token
    assert (end.end, end.answer) == ("answer", RANKING)
    used = len(end.ids)
    for limit in (used - 1, used - 5):  # no room for the critic's question
        t = play("plan-first", *turns, NO, limit=limit)
        assert (t.end, t.answer) == ("answer", RANKING)
    t = play("plan-first", *turns, NO, plan("get_user_profile"), limit=used + 20)
    assert (t.end, t.answer) == ("answer", RANKING)
    t = play("plan-first", *turns, NO, "<answer>8</answer>")
    assert (t.end, t.answer) == ("invalid", None)
    assert play("plan-first", *turns, limit=len(policy.encode(turns[0])) + 3).end == "length"  # fmt: skip


def test_a_pair_can_be_planned_for(play, policy, ctx):
    task = Task(ctx.ds.splits["test"][0], (3, 7))
    letter = "<answer>\\boxed{B}</answer>"
    t = play("plan-first", plan("get_user_profile"), letter, YES, task=task)
    assert (t.end, t.answer) == ("answer", "B")
    left = observations(policy, t)[0].split("Candidates left: ")[1].split("\n")[0]
    assert left.split() == ["3", "7"]


# ------------------------------------------------------------------------------------------------------ self-inspiring


def test_both_branches_of_a_step_stay_in_the_context(play, policy, ctx):
    t = play(
        "self-inspiring",
        call("get_user_profile"), call("get_session_behavior"),  # a step and its other thought
        call("get_similar_users"), NO,  # a step without one
        RANK,
    )  # fmt: skip
    profile, session, users, go_on = observations(policy, t)
    for text, name in ((profile, "get_user_profile"), (session, "get_session_behavior"), (users, "get_similar_users")):  # fmt: skip
        assert text.startswith(run_call(ctx, t.task.sample, Call(name, {})).render())
    assert profile.endswith(rollout_module.ANOTHER) == users.endswith(rollout_module.ANOTHER)  # fmt: skip
    assert profile.endswith(rollout_module.ANOTHER)
    assert session.endswith(f"Both ways stay. {rollout_module.GO_ON}")
    assert go_on == rollout_module.GO_ON
    assert (t.end, t.answer, t.valid) == ("answer", RANKING, True)
    assert len(t.calls) == 3 and policy.decode(t.ids).count("<tool_call>") == 3


def test_self_inspiring_ends_whatever_is_written(play):
    ends = {
        "budget": [call("get_user_profile")] * 20,
        "answer": [call("get_user_profile"), RANK],  # finishes where it was asked
        "invalid": [call("get_user_profile"), NO, NO],
        "eos": [call("get_user_profile")],
    }
    for end, turns in ends.items():
        assert play("self-inspiring", *turns).end == end
    t = play("self-inspiring", *[call("get_user_profile"), YES] * 20)
    assert t.end == "budget" and len(t.calls) == MAX_CALLS
    t = play("self-inspiring", *[call("get_user_profile")] * 20, limit=150)
    assert t.end == "length" and t.answer is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_turns_in_any_order_end_for_a_reason(play, strategy):
    turns = [plan("get_user_profile"), plan(*ALL_TOOLS[2:5]), call("get_user_profile")]
    turns += [RANK, OTHER, YES, NO, "<answer>", "</think></tool_call>", "<think>"]
    rng = np.random.default_rng(0)
    for _ in range(40):
        limit = int(rng.integers(20, 900))
        t = play(strategy, *map(str, rng.choice(turns, 14)), limit=limit)
        assert t.end in ("answer", "invalid", "eos", "budget", "length")
        assert (t.end == "answer") == (t.answer is not None)
        assert len(t.calls) <= MAX_CALLS


def test_a_long_observation_leaves_room_for_the_question(play, policy, monkeypatch):
    monkeypatch.setattr(rollout_module, "act", lambda *_: "x" * 5000)
    t = play("self-inspiring", call("get_user_profile"))
    assert observations(policy, t)[0].endswith("x\n" + rollout_module.ANOTHER)


def test_a_strategy_without_a_text_of_its_own_is_told_as_react():
    assert system_prompt(ALL_TOOLS, 10, "mine") == system_prompt(ALL_TOOLS, 10, "react")


def test_each_strategy_is_told_how(policy, ctx):
    told = rollout_module.system_prompt
    texts = {name: told(ALL_TOOLS, 10, name) for name in STRATEGIES}
    assert texts["react"] == told(ALL_TOOLS, 10)
    assert "tool_name" in texts["plan-first"] and "critic" in texts["plan-first"]
    assert "another thought" in texts["self-inspiring"]
    assert len(np.unique(list(texts.values()))) == 3
