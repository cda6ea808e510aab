"""The parts of the judge, each against a value or a rate that is known otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from airflow_mlops.rollout import Guardrail, Judge, RolloutPolicy
from airflow_mlops.rollout.cuts import cut, group_edges, slow_edge
from airflow_mlops.rollout.difference import MeanDifference, radius
from airflow_mlops.rollout.drift import DriftEvidence
from airflow_mlops.rollout.groupseq import boundaries, spent
from airflow_mlops.rollout.ratio import RatioLikelihood
from airflow_mlops.rollout.replicas import Dispersion
from airflow_mlops.rollout.terms import Part, Terms

TERMS = Terms(0.05, 0.05)


def test_the_boundaries_of_lan_and_demets():
    """Five equal looks, one-sided 0.025: 4.8769, 3.3569, 2.6803, 2.2898, 2.0310 (Lan & DeMets; Jennison & Turnbull)."""
    fractions = tuple(k / 5 for k in range(1, 6))
    found = boundaries(fractions, fractions, 0.025)
    assert found == pytest.approx((4.8769, 3.3569, 2.6803, 2.2898, 2.0310), abs=0.03)
    assert spent(1.0, 0.025) == 0.025 and spent(0.0, 0.025) == 0.0


def test_planned_looks_keep_their_error_rate():
    rng = np.random.default_rng(0)
    fractions = (0.3, 0.45, 0.8, 1.0)
    bounds = boundaries(fractions, fractions, 0.05)
    steps = rng.normal(0, np.sqrt(np.diff((0.0, *fractions))), (20000, 4)).cumsum(axis=1) / np.sqrt(fractions)
    crossed = (steps >= bounds).any(axis=1).mean()
    assert 0.042 < crossed < 0.055


def test_the_ratio_is_covered_and_found():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        likelihood, always = RatioLikelihood(1.25, 1.5), True
        for look in range(60):
            likelihood.add((900, 100), (int(rng.binomial(900, 0.02)), int(rng.binomial(100, 0.03))))
            if look % 6 == 5:
                low, high = likelihood.interval(Dispersion(), 0.2)
                always = always and low <= 1.5 <= high
        inside += always
    assert inside >= 152  # 80 % less three standard errors
    assert 1.0 < low < 1.5 < high < 2.6


def test_where_the_replicas_differ_the_interval_is_wider():
    likelihood = RatioLikelihood(1.25, 1.5)
    likelihood.add((90000, 10000), (900, 150))
    alone = likelihood.interval(Dispersion(), 0.05)
    spread = likelihood.interval(Dispersion((40.0,), (8,), (200.0,), 0.5), 0.05)
    assert spread[0] < alone[0] < 1.5 < alone[1] < spread[1]


def test_slow_is_an_edge_that_exists_and_coarse_edges_are_said():
    edge, remark = slow_edge([0.01, 0.02, 0.04, 0.08], [50, 40, 9, 1, 0], 0.95, 1.5)
    assert (edge, remark) == (0.08, "")
    edge, remark = slow_edge([0.01, 1.0, 10.0], [90, 9, 1, 0], 0.9, 1.5)
    assert edge == 1.0 and "too coarse" in remark
    edge, remark = slow_edge([0.01, 0.1], [10, 10, 80], 0.95, 1.5)
    assert edge == 0.1 and "beyond the last edge" in remark


def test_a_histogram_without_the_edge_is_no_data():
    counters = {"histograms": {"latency": {"edges": [0.1, 0.5], "counts": [5, 3, 2]}}}
    assert cut(counters, "latency", [0.1]) == [5, 5]
    assert cut(counters, "latency", [0.1, 0.5]) == [5, 3, 2]
    assert cut(counters, "latency", [0.3]) is None and cut({}, "latency", [0.1]) is None


def test_groups_have_about_as_many_values_each():
    edges = [i / 100 for i in range(1, 100)]
    counts = np.random.default_rng(0).multinomial(10000, [0.01] * 100).tolist()
    chosen = group_edges(edges, counts)
    assert chosen == pytest.approx([i / 10 for i in range(1, 10)], abs=0.03)
    assert group_edges([0.5, 0.9], [990, 5, 5]) == [0.5]


def parts(rng, n, shares, replicas=1):
    return [Part(i, rng.multinomial(n // replicas, shares).tolist()) for i in range(replicas)]


@pytest.mark.parametrize("pull", [0.0, 0.25], ids=["equal", "drifted"])
def test_drift_is_told_from_none(pull):
    shares = np.full(10, 0.1)
    moved = shares + np.array([pull / 5] * 5 + [-pull / 5] * 5) / 2 * 1.0
    rng, wanted = np.random.default_rng(2), "harm" if pull else "ok"
    for _ in range(10):
        evidence = DriftEvidence(Guardrail.drift(margin=0.08))
        for _ in range(200):
            evidence.add(parts(rng, 900, shares), parts(rng, 100, moved))
            status = evidence.account(TERMS)["status"]
            if status in ("ok", "harm"):
                break
        assert status == wanted


def test_a_drift_at_the_margin_is_rarely_called_either():
    """Distance 0.1: harm (above 0.1) and no inferiority (below 0.1) are both wrong, at most 5 % each."""
    shares = np.full(10, 0.1)
    moved = shares + np.array([0.02] * 5 + [-0.02] * 5)
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(60):
        evidence = DriftEvidence(Guardrail.drift(margin=0.1))
        for _ in range(100):
            evidence.add(parts(rng, 900, shares), parts(rng, 100, moved))
            wrong_now = evidence.account(TERMS)["status"] in ("ok", "harm")
            if wrong_now:
                wrong += 1
                break
    assert wrong <= 10


def test_predictions_that_move_in_time_are_no_drift_between_the_arms():
    rng, evidence = np.random.default_rng(4), DriftEvidence(Guardrail.drift())
    for look in range(60):
        shares = np.exp(np.linspace(-1, 1, 10) * look / 20)
        shares /= shares.sum()
        evidence.add(parts(rng, 900, shares), parts(rng, 300, shares))
        assert evidence.account(TERMS)["status"] != "harm"
    assert evidence.account(TERMS)["status"] == "ok"


def test_the_radius_covers_at_all_looks():
    rng, missed = np.random.default_rng(5), 0
    for _ in range(300):
        sums = rng.normal(0, 1, 2000).cumsum()
        n = np.arange(1, 2001)
        bound = np.array([radius(1.0, int(k), 0.0, -math.log(0.2), 250.0) for k in n[29::50]])
        missed += bool((sums[29::50] / n[29::50] > bound).any())
    assert missed <= 60 + 3 * 7
    assert missed >= 5


def test_a_mean_of_few_values_a_look_still_counts():
    rng, difference = np.random.default_rng(6), MeanDifference()
    for _ in range(400):
        arms = []
        for n in (9, 1):
            values = rng.normal(1, 1, n)
            arms.append([Part(0, [n, float(values.sum()), float((values**2).sum())])])
        difference.add(*arms)
    assert difference.usable() and difference.totals[1][0] == 400


@pytest.mark.parametrize(
    ("change", "decision"), [(1.0, "PROMOTE"), (0.7, "ROLLBACK"), (1.4, "PROMOTE")], ids=["equal", "less", "more"]
)
def test_a_relative_gain(route, change, decision):
    guardrail = Guardrail.mean("log_loss", margin=0.15, higher_is_better=True, relative=True)
    policy = RolloutPolicy(steps=(20, 100), deadline_seconds=240 * 60)
    for seed in range(5):
        verdict = route(seed, loss=(0.45, 0.45 * change)).run(Judge(policy, [guardrail]))[-1]
        assert verdict.decision == decision and "deadline" not in verdict.reasons[0]


def test_a_group_sequential_rollout_ends_with_its_sample(route):
    policy = RolloutPolicy(
        steps=(50, 100),
        deadline_seconds=10**6,
        evidence="group_sequential",
        max_requests=20_000,
        planned_looks=5,
    )
    guardrails = ["errors", "latency", "log_loss"]
    for seed in range(5):
        judge = Judge(policy, guardrails)
        assert route(seed).run(judge)[-1].decision == "PROMOTE"
        assert judge.requests[1] <= 21_000
        worse = route(seed, errors=(0.005, 0.012)).run(Judge(policy, guardrails))[-1]
        assert worse.decision == "ROLLBACK" and "the canary is worse" in worse.reasons[0]
    undecided = [Guardrail.errors(margin=0.02, harm_margin=0.02, tolerance=0.0)]
    verdict = route(0).run(Judge(policy, undecided))[-1]
    assert verdict.decision == "ROLLBACK" and "used up" in verdict.reasons[0]


def test_a_known_sample_needs_fewer_requests(route):
    """At 1.9 times the errors and 12,000 canary requests, planned looks find more than evidence without a plan."""
    found = {}
    for name, plan in {
        "always_valid": {},
        "group_sequential": {"evidence": "group_sequential", "max_requests": 6000, "planned_looks": 4},
    }.items():
        policy = RolloutPolicy(steps=(50, 100), deadline_seconds=13 * 60, **plan)
        guardrail = Guardrail.errors(tolerance=0.0)
        runs = [
            route(s, errors=(0.005, 0.0105)).run(Judge(policy, [guardrail]), looks=13)[-1].reasons[0] for s in range(40)
        ]
        found[name] = sum("the canary is worse" in reason for reason in runs)
    assert found["group_sequential"] > found["always_valid"]
