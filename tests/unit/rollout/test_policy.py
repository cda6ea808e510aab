"""Every policy and guardrail that cannot work is refused with the reason."""

from __future__ import annotations

import json

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout import Guardrail, RolloutPolicy, Step
from airflow_mlops.rollout.policy import parse_guardrails


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": (50, 10, 100)}, "rise"),
        ({"steps": (10, 10, 100)}, "rise"),
        ({"steps": (10, 50)}, "end at 100"),
        ({"steps": (100,)}, "at least one step below 100"),
        ({"steps": ()}, "at least one step below 100"),
        ({"steps": ("10", 100)}, "percent"),
        ({"steps": (-1, 100)}, "percent, 0 to 100"),
        ({"steps": (10, 101)}, "percent, 0 to 100"),
        ({"steps": ({"weight": 10, "bake": 5}, 100)}, "not a rollout step"),
        ({"steps": ({"weight": 10, "bake_seconds": -5}, 100)}, "bake_seconds of the step of 10 %"),
        ({"steps": ({"weight": 10, "min_requests": 0}, 100)}, "min_requests of the step of 10 %"),
        ({"steps": (10, 100), "mode": "ab"}, "end between 0 and 100"),
        ({"steps": (0,), "mode": "ab"}, "end between 0 and 100"),
        ({"steps": (50,), "mode": "ab"}, "nothing else would end it"),
        ({"mode": "canary"}, "progressive, ab"),
        ({"evidence": "peeking"}, "always_valid, group_sequential"),
        ({"evidence": "group_sequential", "max_requests": 100}, "expected both"),
        ({"evidence": "group_sequential", "planned_looks": 0, "max_requests": 1}, "planned_looks is 0"),
        ({"replica_sd": -0.1}, "replica_sd"),
        ({"alpha": 0.0}, "alpha"),
        ({"beta": float("nan")}, "beta"),
        ({"min_requests": 0}, "min_requests"),
        ({"deadline_seconds": 100, "bake_seconds": 60}, "does not fit"),
        ({"deadline_seconds": 100, "steps": ({"weight": 10, "bake_seconds": 100}, 100)}, "does not fit"),
        ({"stepz": (10, 100)}, "unknown fields"),
    ],
)
def test_impossible_policies_are_refused(given, message):
    with pytest.raises(InvalidInputError, match=message):
        RolloutPolicy.from_json(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("qps", "log_loss, brier"),
        ({"kind": "histogram", "metric": "x"}, "rate, latency, mean, score, drift"),
        ({"kind": "rate", "metric": 5}, "unknown metric"),
        ({"kind": "drift", "margin": 1.5}, "share below 1"),
        ({"kind": "errors", "relative": True}, "cannot be relative"),
        ({"kind": "rate", "metric": "requests"}, "unknown metric"),
        ({"kind": "errors", "margin": 0}, "margin"),
        ({"kind": "errors", "margin": 0.1, "harm_margin": 0.2}, "harm_margin"),
        ({"kind": "latency", "quantile": 95}, "0 to 1"),
        ({"kind": "errors", "tolerence": 0.1}, "unknown fields"),
    ],
)
def test_impossible_guardrails_are_refused(given, message):
    with pytest.raises(InvalidInputError, match=message):
        Guardrail.from_json(given)


def test_round_trips():
    steps = (0, Step(5, bake_seconds=3, min_requests=50, approval=True), {"weight": 20, "bake_seconds": 0}, 100)
    policy = RolloutPolicy(steps=steps, bake_seconds=3, evidence="group_sequential", max_requests=10, planned_looks=2)
    assert RolloutPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    assert policy.weights == (0, 5, 20, 100) and [policy.bake_of(i) for i in range(4)] == [3, 3, 0, 3]
    assert [policy.min_requests_of(i) for i in (0, 1)] == [100, 50]
    for guardrail in parse_guardrails(
        [
            "errors",
            "latency",
            "log_loss",
            "brier",
            "score",
            "timeouts",
            "drift",
            {"kind": "rate", "metric": "retries", "name": "retried"},
            {"kind": "mean", "metric": "revenue", "higher_is_better": True, "relative": True},
            {"kind": "mean", "metric": "latency", "name": "mean latency"},
        ]
    ):
        assert Guardrail.from_json(guardrail.to_json()) == guardrail


def test_names_must_differ():
    with pytest.raises(InvalidInputError, match="name of its own"):
        parse_guardrails(["errors", "errors"])
    with pytest.raises(InvalidInputError, match="at least one"):
        parse_guardrails([])
