"""A bad replica is no bad model; replicas come, go and start anew."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest

from airflow_mlops.rollout import Guardrail, Judge, RolloutPolicy
from airflow_mlops.rollout.replicas import chi_squared_quantile, dispersion_of
from airflow_mlops.rollout.reporting import look_table

POLICY = RolloutPolicy(steps=(10, 100), deadline_seconds=120 * 60)
ERRORS, LATENCY, LOSS = Guardrail.errors(tolerance=0.0), Guardrail.latency(), Guardrail.loss()


def decided(verdicts):
    return verdicts[-1].decision, verdicts[-1].reasons[0]


def test_one_failing_replica_of_the_canary_is_named_and_not_taken_for_the_model(route):
    blamed = 0
    for seed in range(20):
        world = route(seed, replicas=(9, 3), traffic=3000, bad={"c-1": 10.0})
        verdicts = world.run(Judge(POLICY, [ERRORS]), looks=60)
        blamed += any("worse only with the canary's replica c-1" in r for v in verdicts for r in v.reasons)
        assert not any(v.decision in ("PROMOTE", "PROMOTE_STEP") for v in verdicts)
    assert blamed >= 19


@pytest.mark.parametrize(("guardrail", "name"), [(LATENCY, "latency"), (LOSS, "log_loss")], ids=["slow", "wrong"])
def test_one_slow_or_wrong_replica_is_named(route, guardrail, name):
    for seed in range(5):
        world = route(seed, replicas=(9, 3), bad={"c-2": 3.0})
        judge = Judge(POLICY, [guardrail])
        verdicts = world.run(judge, looks=60)
        assert {v.decision for v in verdicts} == {"HOLD"}
        assert any(f"{name}: worse only with the canary's replica c-2" in r for v in verdicts for r in v.reasons)


def test_a_bad_model_is_found_on_all_its_replicas(route):
    for seed in range(20):
        verdicts = route(seed, replicas=(9, 3), errors=(0.005, 0.025)).run(Judge(POLICY, [ERRORS]))
        assert decided(verdicts)[0] == "ROLLBACK" and "the canary is worse" in decided(verdicts)[1]
        assert len(verdicts) <= 20


def test_one_replica_of_the_canary_is_held_against_what_stables_differ_by(route):
    """The same excess is harm where replicas are alike and none where they are known to differ."""
    alike = route(3, replicas=(9, 1), traffic=20000, errors=(0.01, 0.016)).run(Judge(POLICY, [ERRORS]), looks=60)
    assert alike[-1].decision == "ROLLBACK"
    unlike = route(3, replicas=(9, 1), traffic=20000, pods=0.4, errors=(0.01, 0.016))
    unlike.own["c-0"] = 1.0
    verdicts = unlike.run(Judge(POLICY, [ERRORS]), looks=60)
    assert {v.decision for v in verdicts} == {"HOLD"}
    assert 0.2 < verdicts[-1].guardrails["errors"]["replica_spread"] < 0.8


def test_a_known_spread_takes_the_place_of_replicas_that_cannot_be_seen(route):
    world = {"traffic": 20000, "errors": (0.01, 0.016)}
    assert route(3, **world).run(Judge(POLICY, [ERRORS]), looks=60)[-1].decision == "ROLLBACK"
    known = dataclasses.replace(POLICY, replica_sd=0.3)
    assert route(3, **world).run(Judge(known, [ERRORS]), looks=60)[-1].decision == "HOLD"


def test_the_spread_is_estimated_without_bias():
    rng, estimates = np.random.default_rng(0), {0.0: [], 0.3: []}
    bounds = []
    for tau, found in estimates.items():
        for _ in range(300):
            true = rng.normal(0, tau, 12)
            precision = rng.uniform(20, 60, 12)
            seen = rng.normal(true, precision**-0.5)
            deviation = seen - np.average(seen, weights=precision)
            dispersion = dispersion_of(([*zip(deviation, precision)], [(0.0, 10.0)]), least=1.0)
            found.append((sum(dispersion.q) - 11) / sum(dispersion.information))
            if tau:
                bounds.append(dispersion.variance_bound(0.9) >= tau**2)
    assert abs(np.mean(estimates[0.0])) < 0.005 and abs(np.mean(estimates[0.3]) - 0.09) < 0.01
    assert 0.85 < np.mean(bounds) < 0.96


def test_chi_squared_quantiles():
    # Tables: 10 % points of chi-squared with 2, 8 and 28 degrees of freedom.
    for df, exact in ((2, 0.2107), (8, 3.4895), (28, 18.939)):
        assert chi_squared_quantile(0.1, df) == pytest.approx(exact, rel=0.1)


def test_a_restarted_replica_loses_its_interval_and_nothing_is_counted_backwards(route):
    world, judge = route(1, replicas=(3, 3)), Judge(dataclasses.replace(POLICY, min_requests=10**6), [ERRORS])
    for _ in range(3):
        judge.observe(world.look(10))
    assert sum(judge.requests) == 2000
    world.arms[1]["c-1"] = world.empty()
    verdict = judge.observe(world.look(10))
    assert "canary replica c-1 started anew: its last interval is left out" in verdict.reasons
    assert 2900 < sum(judge.requests) < 3000
    before = sum(judge.requests)
    judge.observe(world.look(10))
    assert sum(judge.requests) == before + 1000


def test_a_new_replica_begins_with_what_it_has(route):
    world, judge = route(1, replicas=(3, 3)), Judge(dataclasses.replace(POLICY, min_requests=10**6), [ERRORS])
    for _ in range(2):
        judge.observe(world.look(10))
    grown = copy.deepcopy(world.empty())
    grown["counts"]["requests"] = 10**6
    world.arms[1]["c-new"], world.own["c-new"] = grown, 1.0
    judge.observe(world.look(10))
    judge.observe(world.look(10))
    assert sum(judge.requests) < 3001


def test_replicas_that_come_and_go_are_no_sample_ratio_mismatch(route):
    """Without the router's own counts, a replica's first interval is missing from its arm."""
    world = route(1, replicas=(2, 2), count=False, traffic=5000)
    judge = Judge(dataclasses.replace(POLICY, min_requests=10**9), [ERRORS])
    for look in range(30):
        verdict = judge.observe(world.look(10))
        assert not any("sample ratio" in reason for reason in verdict.reasons)
        del world.arms[1][next(iter(world.arms[1]))]
        world.arms[1][f"c-new-{look}"], world.own[f"c-new-{look}"] = world.empty(), 1.0


def test_the_sample_ratio_of_the_arms_own_requests_is_checked_too(route):
    judge = Judge(POLICY, [ERRORS])
    verdicts = route(1, count=False, true_share=0.05, traffic=5000).run(judge, looks=10)
    assert "sample ratio mismatch" in verdicts[-1].reasons[0]


def test_state_is_small_with_many_replicas_and_guardrails(route):
    guardrails = [Guardrail.from_json({"kind": "errors", "name": f"errors {i}"}) for i in range(4)]
    guardrails += [Guardrail.latency(), Guardrail.from_json({"kind": "latency", "name": "p99", "quantile": 0.99})]
    guardrails += [Guardrail.loss(), Guardrail.mean("prediction"), Guardrail.score(), Guardrail.drift()]
    world = route(2, replicas=(40, 10), traffic=20000)
    judge = Judge(dataclasses.replace(POLICY, min_requests=10**9), guardrails)
    for _ in range(60):
        judge.observe(world.look(10))
    assert len(json.dumps(judge.state())) < 32_000


def test_a_replica_that_fails_within_what_is_acceptable_is_no_matter(route):
    guardrail = Guardrail.errors(tolerance=0.05)
    for seed in range(3):
        world = route(seed, replicas=(9, 3), traffic=3000, bad={"c-1": 8.0})
        for verdict in world.run(Judge(POLICY, [guardrail]), looks=40):
            assert verdict.decision != "ROLLBACK" and not any("worse only" in reason for reason in verdict.reasons)


def test_the_log_names_the_replica(route):
    verdicts = route(1, replicas=(9, 3), traffic=3000, bad={"c-1": 10.0}).run(Judge(POLICY, [ERRORS]), looks=30)
    assert "but for replica c-1" in look_table(verdicts[-1])


def test_replicas_that_only_come_are_no_sample_ratio_mismatch(route):
    world = route(1, replicas=(2, 1), count=False, traffic=5000)
    judge = Judge(dataclasses.replace(POLICY, min_requests=10**9), [ERRORS])
    judge.observe(world.look(10))
    for look in range(6):
        world.arms[1][f"c-new-{look}"], world.own[f"c-new-{look}"] = world.empty(), 1.0
        verdict = judge.observe(world.look(10))
        assert not any("sample ratio" in reason for reason in verdict.reasons)
