"""Error rates of the judge, by simulation with fixed seeds, and its verdict on everything that can be missing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest

from airflow_mlops.rollout import Guardrail, Judge, RolloutPolicy
from airflow_mlops.rollout.observation import LATENCY_EDGES

FAST = RolloutPolicy(steps=(10, 50, 100), min_requests=100, deadline_seconds=240 * 60)
ONE_STEP = RolloutPolicy(steps=(10, 100), min_requests=100, deadline_seconds=240 * 60)


def outcomes(route, runs, policy, guardrails, **world):
    counts = {"PROMOTE": 0, "ROLLBACK": 0}
    for seed in range(runs):
        verdict = route(seed, **world).run(Judge(policy, guardrails))[-1]
        counts[verdict.decision] += 1
    return counts


def test_an_equal_canary_is_promoted_and_rarely_rolled_back(route):
    counts = outcomes(route, 60, FAST, None, shock=0.5)
    assert counts["PROMOTE"] >= 58


@pytest.mark.parametrize(
    "world",
    [{"errors": (0.005, 0.015)}, {"latency": (0.02, 0.05)}, {"errors": (0.0, 0.05)}],
    ids=["errors", "latency", "first errors"],
)
def test_a_worse_canary_is_rolled_back(route, world):
    for seed in range(30):
        verdict = route(seed, **world).run(Judge(FAST))[-1]
        assert verdict.decision == "ROLLBACK" and "the canary is worse" in verdict.reasons[0]
        assert verdict.look <= 60


def test_a_canary_at_the_margin_is_promoted_at_most_at_rate_beta(route):
    guardrails = [Guardrail.errors(margin=0.5, harm_margin=0.5, tolerance=0.0)]
    policy = dataclasses.replace(ONE_STEP, beta=0.2, steps=(50, 100), deadline_seconds=120 * 60)
    counts = outcomes(route, 60, policy, guardrails, errors=(0.01, 0.015))
    # Rate 0.2 over 60 runs: more than 0.2 + 3 standard errors would refute it; none at all would mean no power.
    assert 1 <= counts["PROMOTE"] <= 21


def test_a_canary_at_the_harm_margin_is_rolled_back_early_at_most_at_rate_alpha(route):
    policy = dataclasses.replace(ONE_STEP, alpha=0.2, beta=1e-12, steps=(50, 100), deadline_seconds=10**9)
    early = 0
    for seed in range(60):
        judge = Judge(policy, [Guardrail.errors(margin=1.0, harm_margin=0.25, tolerance=0.0)])
        early += route(seed, errors=(0.01, 0.0125)).run(judge, looks=120)[-1].decision == "ROLLBACK"
    assert 1 <= early <= 21


def test_errors_below_the_tolerance_are_no_harm(route):
    counts = outcomes(route, 10, FAST, [Guardrail.errors(tolerance=0.02)], errors=(0.001, 0.008))
    assert counts["PROMOTE"] == 10


def test_no_error_in_many_requests_is_evidence(route):
    verdicts = route(1, errors=(0.0, 0.0)).run(Judge(FAST, [Guardrail.errors(tolerance=0.01)]))
    assert verdicts[-1].decision == "PROMOTE"
    assert 300 <= verdicts[-1].requests["canary"] <= 1500


def test_no_error_without_a_tolerance_is_no_evidence(route):
    verdict = route(1, errors=(0.0, 0.0)).run(Judge(FAST, [Guardrail.errors(tolerance=0.0)]))[-1]
    assert verdict.decision == "ROLLBACK"
    assert "deadline" in verdict.reasons[0]


def test_loss_equal_worse_and_at_the_margin(route):
    guardrails = [Guardrail.loss(margin=0.05)]
    assert outcomes(route, 25, FAST, guardrails)["PROMOTE"] >= 24
    assert outcomes(route, 25, FAST, guardrails, loss=(0.45, 0.6))["ROLLBACK"] == 25
    at_margin = dataclasses.replace(ONE_STEP, beta=0.2, alpha=1e-9, steps=(50, 100), deadline_seconds=60 * 60)
    assert outcomes(route, 60, at_margin, guardrails, loss=(0.45, 0.5))["PROMOTE"] <= 21


def test_a_loss_that_moves_in_time_is_not_taken_for_the_canary(route):
    """Early looks have few canary requests, late ones many: pooled means would differ by the trend."""
    for seed in range(10):
        world, judge = route(seed, traffic=500), Judge(FAST, [Guardrail.loss(margin=0.1)])
        for look in range(300):
            world.loss = (0.2 + 0.02 * look, 0.2 + 0.02 * look)
            verdict = judge.observe(world.look(judge.weight))
            assert not any("canary is worse" in reason for reason in verdict.reasons)
            if verdict.final:
                break


def test_scores_may_not_drift_either_way(route):
    guardrails = [Guardrail.score(margin=0.05)]
    assert outcomes(route, 10, FAST, guardrails)["PROMOTE"] == 10
    assert outcomes(route, 10, FAST, guardrails, score=(0.3, 0.4))["ROLLBACK"] == 10
    assert outcomes(route, 10, FAST, guardrails, score=(0.3, 0.2))["ROLLBACK"] == 10


def test_a_sample_ratio_mismatch_is_found_and_never_promoted(route):
    world, judge = route(3, true_share=0.08, errors=(0.0, 0.0)), Judge(ONE_STEP, ["errors"])
    verdicts = world.run(judge)
    assert verdicts[-1].decision == "ROLLBACK" and "deadline" in verdicts[-1].reasons[0]
    found = next(v for v in verdicts if any("sample ratio" in reason for reason in v.reasons))
    assert sum(found.requests.values()) <= 8000
    for seed in range(30):
        for verdict in route(seed).run(Judge(ONE_STEP, ["errors"]), looks=60):
            assert not any("sample ratio" in reason for reason in verdict.reasons)


def test_another_process_continues_with_the_same_verdicts(route):
    world, judge = route(5, shock=0.5), Judge(FAST, ["errors", "latency", "log_loss", "score"])
    observations, verdicts, state = [], [], None
    for _ in range(100):
        observations.append(world.look(judge.weight))
        verdicts.append(judge.observe(observations[-1]))
        if verdicts[-1].final:
            break
    assert verdicts[-1].decision == "PROMOTE"
    again = []
    for observation in observations:
        other = Judge(FAST, ["errors", "latency", "log_loss", "score"], state)
        again.append(other.observe(observation))
        state = json.loads(json.dumps(other.state(), allow_nan=False))
    assert [v.to_json() for v in again] == [v.to_json() for v in verdicts]
    assert len(json.dumps(state)) < 8000


def with_arm(observation, arm, edit):
    """The observation with every replica of one arm changed by ``edit``."""
    changed = copy.deepcopy(dict(getattr(observation, arm)))
    for counters in changed.values():
        edit(counters)
    return dataclasses.replace(observation, **{arm: changed})


def nan(observation):
    return with_arm(observation, "canary", lambda c: c["moments"].update(latency=[10, math.nan, 1.0]))


def missing_metric(observation):
    return with_arm(observation, "canary", lambda c: c["moments"].pop("log_loss"))


def no_labels(observation):
    for arm in ("stable", "canary"):
        observation = with_arm(observation, arm, lambda c: c["moments"].update(log_loss=[0, 0.0, 0.0]))
    return observation


def other_buckets(observation):
    return with_arm(observation, "stable", lambda c: c["histograms"].update(latency={"edges": [1], "counts": [1]}))


FROZEN = {}


def frozen(observation, arm, index):
    """What a stale scrape says: new times, old numbers."""
    if index == 0:
        FROZEN[arm] = getattr(observation, arm)
    return dataclasses.replace(observation, **{arm: FROZEN[arm]})


FAULTS = {
    "no labels": lambda o, i: no_labels(o),
    "nan": lambda o, i: nan(o),
    "canary missing": lambda o, i: dataclasses.replace(o, canary=None),
    "stable missing": lambda o, i: dataclasses.replace(o, stable=None),
    "empty": lambda o, i: dataclasses.replace(o, stable={}, canary={}),
    "metric missing": lambda o, i: missing_metric(o),
    "unreachable": lambda o, i: dataclasses.replace(o, problem="connection refused"),
    "other weight": lambda o, i: dataclasses.replace(o, weight=o.weight + 5),
    "reset every look": lambda o, i: dataclasses.replace(o, boot=f"boot {i}"),
    "stale": lambda o, i: dataclasses.replace(o, time=1000.0),
    "negative": lambda o, i: with_arm(o, "stable", lambda c: c["counts"].update(errors=-1)),
    "other buckets": lambda o, i: other_buckets(o),
    "canary's counters stand still": lambda o, i: frozen(o, "canary", i),
    "both stand still": lambda o, i: frozen(frozen(o, "canary", i), "stable", i),
    "errors not reported": lambda o, i: with_arm(o, "stable", lambda c: c["counts"].pop("errors")),
    "more errors than requests": lambda o, i: with_arm(o, "canary", lambda c: c["counts"].update(errors=10**9)),
    "no arm of the canary": lambda o, i: dataclasses.replace(o, canary={}),
    "no time": lambda o, i: dataclasses.replace(o, time=math.nan),
    "another replica every look": lambda o, i: dataclasses.replace(o, canary={f"c-{i}": o.canary[""]}),
    "text": lambda o, i: with_arm(o, "canary", lambda c: c["counts"].update(errors="3")),
}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faulty_data_never_promotes(route, fault):
    policy = dataclasses.replace(FAST, deadline_seconds=3000)
    world, judge = route(7, errors=(0.0, 0.0)), Judge(policy, ["errors", "log_loss"])
    decisions = []
    for index in range(60):
        verdict = judge.observe(FAULTS[fault](world.look(judge.weight), index))
        decisions.append(verdict.decision)
        assert verdict.reasons
    assert set(decisions) <= {"HOLD", "ROLLBACK"}
    if fault not in ("stale", "no time"):  # its clock stands still, so the operator's own deadline has to end it
        assert decisions[-1] == "ROLLBACK"


def test_no_traffic_and_one_armed_traffic_hold(route):
    for share, traffic in ((0.1, 0), (0.0, 1000), (1.0, 1000)):
        world = route(7, traffic=traffic, true_share=share)
        verdicts = world.run(Judge(dataclasses.replace(FAST, deadline_seconds=3000), ["errors"]))
        assert {v.decision for v in verdicts[:-1]} == {"HOLD"} and verdicts[-1].decision == "ROLLBACK"


def test_a_good_look_after_a_fault_uses_everything_since_the_last_good_one(route):
    world, judge = route(7), Judge(dataclasses.replace(FAST, min_requests=10**6), ["errors"])
    judge.observe(world.look(10))
    judge.observe(world.look(10))
    assert judge.observe(nan(world.look(10))).requests == judge.observe(nan(world.look(10))).requests
    assert sum(judge.observe(world.look(10)).requests.values()) == 4000


def test_counters_that_start_anew_are_never_counted_backwards(route):
    world, judge = route(7), Judge(dataclasses.replace(FAST, min_requests=10**6), ["errors"])
    for _ in range(3):
        judge.observe(world.look(10))
    world.arms, world.routed = [{"": world.empty()}, {"": world.empty()}], [0, 0]
    before = dict(judge.observe(dataclasses.replace(world.look(10), boot="new")).requests)
    after = judge.observe(dataclasses.replace(world.look(10), boot="new")).requests
    assert sum(before.values()) == 2000 and sum(after.values()) == 3000


def test_the_last_step_is_watched_for_the_bake(route):
    policy = dataclasses.replace(FAST, bake_seconds=300)
    guardrails = [Guardrail.errors()]
    world, judge = route(2), Judge(policy, guardrails)
    verdicts = world.run(judge)
    steps = [v for v in verdicts if v.decision in ("PROMOTE_STEP", "PROMOTE")]
    assert [v.weight for v in steps] == [50, 100, 100] and steps[-1].decision == "PROMOTE"
    world, judge = route(2), Judge(policy, guardrails)
    while judge.weight < 100:
        judge.observe(world.look(judge.weight))
    world.errors = (0.005, 0.05)
    assert world.run(judge)[-1].decision == "ROLLBACK"


def test_latency_threshold_is_a_multiple_of_stables_quantile(route):
    world, judge = route(2, latency=(0.02, 0.02)), Judge(ONE_STEP, [Guardrail.latency(quantile=0.95, factor=2.0)])
    account = world.run(judge, looks=4)[-1].guardrails["latency"]
    true_p95 = 0.02 * math.exp(0.4 * 1.6449)
    assert 2 * true_p95 <= account["slower_than_seconds"] <= 2 * true_p95 * 1.25**2
    assert account["slower_than_seconds"] in LATENCY_EDGES


def test_state_survives_json_and_verdicts_have_no_nan(route):
    for verdict in route(4).run(Judge(FAST, ["errors", "latency", "log_loss", "score"])):
        json.dumps(verdict.to_json(), allow_nan=False)


def test_readings_without_a_time_do_not_stop_the_deadline(route):
    world, judge = route(7), Judge(dataclasses.replace(FAST, deadline_seconds=600), ["errors"])
    judge.observe(dataclasses.replace(world.look(10), time=math.nan))
    for _ in range(12):
        verdict = judge.observe(dataclasses.replace(world.look(10), problem="connection refused"))
        judge.observe(dataclasses.replace(world.look(10), time=math.nan))
        if verdict.final:
            break
    assert verdict.decision == "ROLLBACK" and "deadline" in verdict.reasons[0]
    json.dumps(judge.state(), allow_nan=False)


def shown(route):
    """A judge to whom everything is shown, so that any good look would be the last, and its route."""
    world, judge = (
        route(7, traffic=10_000),
        Judge(dataclasses.replace(FAST, min_requests=10**6), ["errors", "log_loss"]),
    )
    verdicts = world.run(judge, looks=30)
    assert {account["status"] for account in verdicts[-1].guardrails.values()} == {"ok"}
    judge.policy = dataclasses.replace(ONE_STEP, min_requests=1)
    return judge, world


def test_with_everything_shown_a_good_look_promotes(route):
    judge, world = shown(route)
    assert judge.observe(world.look(10)).decision == "PROMOTE"


def test_what_was_shown_is_no_pass_for_a_metric_that_vanished(route):
    judge, world = shown(route)
    for _ in range(10):
        verdict = judge.observe(missing_metric(world.look(10)))
        assert verdict.decision == "HOLD" and any(
            "'log_loss' is not reported by the canary" in r for r in verdict.reasons
        )


@pytest.mark.parametrize("arm", ["stable", "canary"])
def test_what_was_shown_is_no_pass_for_an_arm_that_fell_silent(route, arm):
    judge, world = shown(route)
    frozen = getattr(world.look(10), arm)
    judge.observe(dataclasses.replace(world.look(10), problem="left out"))
    before = dataclasses.replace(world.look(10), **{arm: frozen})
    judge.intake.last = None
    judge.observe(before)
    for _ in range(3):
        verdict = judge.observe(dataclasses.replace(world.look(10), **{arm: frozen}))
        assert verdict.decision == "HOLD" and f"no requests in the {arm} arm since the last look" in verdict.reasons


def test_counters_that_keep_starting_anew_are_never_a_pass(route):
    """After a restart a count may by chance be larger than the one before: what lies between says nothing."""
    judge, world = Judge(ONE_STEP, [Guardrail.errors()]), route(1)
    for look in range(200):
        seen, counters = world.look(judge.weight), {}
        for arm, share in (("stable", 9), ("canary", 1)):
            # Down every other look, and up in between.
            requests = share * (1000 if look % 2 else 100)
            counters[arm] = {"": {"counts": {"requests": requests, "errors": requests // 200}}}
        verdict = judge.observe(dataclasses.replace(seen, **counters, routed=None))
        assert verdict.decision == "HOLD"
        judge = Judge(ONE_STEP, [Guardrail.errors()], json.loads(json.dumps(judge.state())))
    assert "keep starting anew" in verdict.reasons[0]


def test_no_number_of_a_verdict_outgrows_what_airflow_can_pass_on(route):
    """PostgreSQL gives 1.2e+22 back as an integer, and Airflow's own messages end at 64 bits."""
    judge, world = Judge(FAST, [Guardrail.errors(), Guardrail.latency()]), route(2, traffic=200_000)
    for _ in range(20):
        verdict = judge.observe(world.look(judge.weight))
        if verdict.final:
            break
    numbers = [value for account in verdict.guardrails.values() for value in account.values()]
    assert max(value for value in numbers if isinstance(value, float)) > 1e11
    assert all(abs(value) < 2**63 for value in numbers if isinstance(value, int | float))
