"""The plan of a rollout: steps with terms of their own, shadow, blue-green, A/B, approvals."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout import Guardrail, Judge, RolloutPolicy, Step

ERRORS = Guardrail.errors()


def policy(*steps, **options):
    return RolloutPolicy(steps=steps, **{"deadline_seconds": 240 * 60, **options})


def weights(verdicts):
    return [v.weight for v in verdicts if v.decision in ("PROMOTE_STEP", "PROMOTE")]


def test_each_step_has_its_own_bake_and_sample(route):
    plan = policy(Step(10, bake_seconds=600), {"weight": 50, "min_requests": 5000}, 100)
    verdicts = route(1).run(Judge(plan, [ERRORS]))
    left = [v.look for v in verdicts if v.decision in ("PROMOTE_STEP", "PROMOTE")]
    assert weights(verdicts) == [50, 100] and verdicts[-1].decision == "PROMOTE"
    assert left[0] == 11  # ten minutes after the first look
    assert left[1] - left[0] >= 11  # 5000 requests of 500 a look, after a first look at the new weight


def test_a_shadow_step_counts_copies_and_tests_no_ratio(route):
    verdicts = route(1, traffic=3000).run(Judge(policy(0, 20, 100), [ERRORS]))
    assert weights(verdicts) == [20, 100] and verdicts[-1].decision == "PROMOTE"
    bad = route(1, errors=(0.005, 0.05)).run(Judge(policy(0, 20, 100), [ERRORS]))
    assert bad[-1].decision == "ROLLBACK" and bad[-1].step == 0 and "the canary is worse" in bad[-1].reasons[0]


def test_a_shadow_step_without_copies_holds(route):
    world, judge = route(1), Judge(policy(0, 100), [ERRORS])
    for _ in range(10):
        verdict = judge.observe(dataclasses.replace(world.look(0), shadow=False))
        assert verdict.decision == "HOLD" and "no copies" in verdict.reasons[0]


def test_blue_green_shows_everything_on_copies_before_the_switch(route):
    plan = policy(0, Step(100, bake_seconds=300))
    verdicts = route(2, traffic=3000).run(Judge(plan, [ERRORS]))
    switched = next(v for v in verdicts if v.decision == "PROMOTE_STEP")
    assert switched.guardrails["errors"]["status"] == "ok" and verdicts[-1].decision == "PROMOTE"
    assert verdicts[-1].look - switched.look >= 5
    equal_but_undecided = [Guardrail.errors(margin=0.01, harm_margin=0.01, tolerance=0.0)]
    verdicts = route(2).run(Judge(policy(0, 100, deadline_seconds=1800), equal_but_undecided))
    assert verdicts[-1].decision == "ROLLBACK" and weights(verdicts) == []


def test_after_the_switch_a_version_that_breaks_is_rolled_back(route):
    plan, world = policy(0, Step(100, bake_seconds=600)), route(2, traffic=3000)
    judge = Judge(plan, [ERRORS])
    while judge.weight < 100:
        judge.observe(world.look(judge.weight))
    world.errors = (0.005, 0.2)
    assert world.run(judge)[-1].decision == "ROLLBACK"


def test_a_shock_that_stable_had_too_is_no_reason_to_roll_back_at_100(route):
    back = 0
    for seed in range(20):
        world, judge = route(seed, shock=0.7, traffic=5000), Judge(policy(50, Step(100, bake_seconds=300)), [ERRORS])
        verdicts = world.run(judge)
        back += verdicts[-1].decision == "ROLLBACK"
    assert back <= 1


def test_an_ab_test_concludes_with_effects_and_no_winner(route):
    plan = policy(10, 50, mode="ab", bake_seconds=1200)
    guardrails = [ERRORS, Guardrail.loss(margin=0.3, harm_margin=0.3), Guardrail.drift(margin=0.5)]
    verdict = route(3, loss=(0.45, 0.5), score=(0.3, 0.32)).run(Judge(plan, guardrails))[-1]
    assert (verdict.decision, verdict.weight, verdict.final) == ("CONCLUDE", 0.0, True)
    loss, ratio, drift = (verdict.report[name] for name in ("log_loss", "errors", "drift"))
    assert loss["interval"][0] <= 0.05 <= loss["interval"][1] and abs(loss["estimate"] - 0.05) < 0.03
    assert ratio["interval"][0] <= 1.0 <= ratio["interval"][1]
    assert 0 <= drift["interval"][0] <= drift["estimate"] <= drift["interval"][1]
    json.dumps(verdict.to_json(), allow_nan=False)


def test_an_ab_test_may_end_by_its_sample_and_harm_still_ends_it(route):
    plan = policy(50, mode="ab", max_requests=5000)
    judge = Judge(plan, [ERRORS])
    assert route(3).run(judge)[-1].decision == "CONCLUDE" and 5000 <= judge.requests[1] < 5700
    assert route(3, errors=(0.005, 0.1)).run(Judge(plan, [ERRORS]))[-1].decision == "ROLLBACK"


APPROVED = (Step(10, approval=True), 50, 100)


def test_a_step_waits_for_a_person_and_goes_on_when_approved(route):
    world, judge = route(4), Judge(policy(*APPROVED), [ERRORS])
    verdicts = world.run(judge, looks=8)
    assert [v.decision for v in verdicts[-3:]] == ["APPROVE"] * 3 and not verdicts[-1].final
    assert verdicts[-1].weight == 10
    again = Judge(policy(*APPROVED), [ERRORS], json.loads(json.dumps(judge.state())))
    assert again.approve(0, True, "Ada", 1.0) and not again.approve(0, False, "Bob", 2.0)
    again = Judge(policy(*APPROVED), [ERRORS], json.loads(json.dumps(again.state())))
    verdict = again.observe(world.look(10))
    assert verdict.decision == "PROMOTE_STEP" and "approved by Ada" in verdict.reasons
    assert world.run(again)[-1].decision == "PROMOTE"


def test_a_refused_step_rolls_back(route):
    world, judge = route(4), Judge(policy(*APPROVED), [ERRORS])
    world.run(judge, looks=5)
    judge.approve(0, False, "Bob", 1.0)
    verdict = judge.observe(world.look(10))
    assert (verdict.decision, verdict.reasons) == ("ROLLBACK", ["refused by Bob at 10 %"])


def test_while_it_waits_harm_still_rolls_back_and_the_deadline_holds(route):
    world, judge = route(4), Judge(policy(*APPROVED), [ERRORS])
    world.run(judge, looks=5)
    world.errors = (0.005, 0.1)
    assert "the canary is worse" in world.run(judge, looks=60)[-1].reasons[0]
    judge = Judge(policy(*APPROVED, deadline_seconds=1200), [ERRORS])
    verdict = route(4).run(judge)[-1]
    assert verdict.decision == "ROLLBACK" and "deadline" in verdict.reasons[0] and "approval" in verdict.reasons[1]


def test_an_approval_nobody_asked_for_is_refused():
    judge = Judge(policy(*APPROVED), [ERRORS])
    for step in (1, 7, -1):
        with pytest.raises(InvalidInputError, match="does not wait"):
            judge.approve(step, True, "Ada", 0.0)


ALL = [
    "errors",
    "latency",
    "log_loss",
    "score",
    "drift",
    {"kind": "mean", "metric": "latency", "name": "mean latency", "margin": 0.2, "relative": True},
]


@pytest.mark.parametrize("evidence", ["always_valid", "group_sequential"])
@pytest.mark.parametrize("replicas", [(1, 1), (4, 3)], ids=["one replica", "replicas"])
def test_another_process_that_continues_anywhere_gives_the_same_verdicts(route, evidence, replicas):
    plan = policy(
        0, 10, Step(50, approval=True), Step(100, bake_seconds=300),
        evidence=evidence, max_requests=60_000, planned_looks=8,
    )  # fmt: skip
    world, judge = route(5, shock=0.5, replicas=replicas, traffic=4000), Judge(plan, ALL)
    seen = []
    for _ in range(150):
        if judge.step == 2:
            judge.approve(2, True, "Ada", 0.0)
        seen.append((judge.step, world.look(judge.weight)))
        if len(seen) == 12 and "c-1" in world.arms[1]:
            world.arms[1]["c-1"] = world.empty()
        verdict = judge.observe(seen[-1][1])
        if verdict.final:
            break
    assert verdict.decision == "PROMOTE"
    expected = json.dumps(judge.state())
    for seed in range(10):
        chance, other = random.Random(seed), Judge(plan, ALL)
        for step, observation in seen:
            if step == 2:
                other.approve(2, True, "Ada", 0.0)
            last = other.observe(observation)
            if chance.random() < 0.2:
                other = Judge(plan, ALL, json.loads(json.dumps(other.state(), allow_nan=False)))
        assert json.dumps(other.state()) == expected
        assert last.to_json() == verdict.to_json()
