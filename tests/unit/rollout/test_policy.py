"""Every policy and guardrail that cannot work is refused with the reason."""

from __future__ import annotations

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout import Guardrail, RolloutPolicy
from airflow_mlops.rollout.policy import parse_guardrails


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": (50, 10, 100)}, "rise"),
        ({"steps": (10, 50)}, "end at 100"),
        ({"steps": (100,)}, "at least one step below 100"),
        ({"steps": ("10", 100)}, "percent"),
        ({"alpha": 0.0}, "alpha"),
        ({"beta": float("nan")}, "beta"),
        ({"min_requests": 0}, "min_requests"),
        ({"deadline_seconds": 100, "bake_seconds": 60}, "does not fit"),
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
    policy = RolloutPolicy(steps=(5, 100), bake_seconds=3)
    assert RolloutPolicy.from_json(policy.to_json()) == policy
    for guardrail in parse_guardrails(
        [
            "errors",
            "latency",
            "log_loss",
            "brier",
            "score",
            {"kind": "mean", "metric": "latency", "name": "mean latency"},
        ]
    ):
        assert Guardrail.from_json(guardrail.to_json()) == guardrail


def test_names_must_differ():
    with pytest.raises(InvalidInputError, match="name of its own"):
        parse_guardrails(["errors", "errors"])
    with pytest.raises(InvalidInputError, match="at least one"):
        parse_guardrails([])
