"""The books of a route: who goes where, what is counted, and who may change it."""

from __future__ import annotations

import math

import pytest

from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError
from airflow_mlops.rollout.controller import observation_of
from airflow_mlops.rollout.targets.book import Book

CONFIG = {"stable": "a", "canary": "b", "weight": 10.0, "versions": {"a": "1", "b": "2"}, "rollout": {"owner": "me"}}


def book(weight=10.0, **options):
    made = Book(**options)
    made.configure({**CONFIG, "weight": weight})
    made.change({"action": "claim", "owner": "me", "ttl": 60}, now=0.0)
    return made


def test_routing_is_sticky_and_the_canary_only_grows():
    ids = [f"request {i}" for i in range(5000)]
    ten, fifty = book(10), book(50)
    first = [ten.route(i, 1.0) for i in ids]
    assert first == [book(10).route(i, 1.0) for i in ids]
    assert abs(first.count("b") / 5000 - 0.1) < 0.015
    assert all(fifty.route(i, 1.0) == "b" for i, slot in zip(ids, first) if slot == "b")


def test_without_a_renewed_lease_the_canary_has_no_traffic():
    made = book(50)
    ids = [f"request {i}" for i in range(100)]
    assert "b" in {made.route(i, 59.0) for i in ids}
    assert {made.route(i, 60.0) for i in ids} == {"a"} and made.state(60.0)["weight"] == 0.0
    made.change({"action": "renew", "owner": "me", "ttl": 60}, now=100.0)
    assert made.state(101.0)["weight"] == 50.0


def test_a_restarted_router_serves_stable_until_the_owner_is_back():
    made = Book()
    made.configure({**CONFIG, "weight": 50.0})
    assert made.state(0.0)["weight"] == 0.0
    made.change({"action": "claim", "owner": "another", "ttl": 60}, now=1.0)
    assert made.state(2.0)["weight"] == 0.0
    made.change({"action": "claim", "owner": "me", "ttl": 60}, now=70.0)
    assert made.state(71.0)["weight"] == 50.0
    again = Book()
    again.configure({**CONFIG, "weight": 50.0})
    again.change({"action": "renew", "owner": "me", "ttl": 60}, now=80.0)
    assert again.state(81.0)["weight"] == 50.0


def test_two_rollouts_refuse_each_other():
    made = book()
    with pytest.raises(ConcurrentChangeError, match="two rollouts"):
        made.change({"action": "claim", "owner": "you", "ttl": 60}, now=59.0)
    made.change({"action": "claim", "owner": "you", "ttl": 60}, now=61.0)
    with pytest.raises(ConcurrentChangeError):
        made.change({"action": "renew", "owner": "me", "ttl": 60}, now=62.0)


def test_a_late_verdict_of_another_rollout_does_not_end_this_one():
    made = book()
    made.configure({**CONFIG, "rollout": {"owner": "you", "finished": {"verdict": "PROMOTE"}}})
    made.change({"action": "renew", "owner": "me", "ttl": 60}, now=1.0)


def test_an_earlier_attempt_does_not_write_over_a_later_one():
    made = book()
    made.change({"action": "renew", "owner": "me", "annotation": {"owner": "me", "attempt": 2}}, now=1.0)
    with pytest.raises(ConcurrentChangeError, match="attempt 2 of me has taken the rollout over"):
        made.change({"action": "renew", "owner": "me", "annotation": {"owner": "me", "attempt": 1}}, now=2.0)
    assert made.annotation["attempt"] == 2
    made.change({"action": "renew", "owner": "me", "annotation": {"owner": "me", "attempt": 3}}, now=3.0)


def test_stop_takes_effect_at_once_and_frees_the_route():
    made = book(100)
    made.change({"action": "stop", "owner": "me"}, now=1.0)
    assert made.route("x", 1.0) == "a" and made.state(1.0)["rollout"] == {}
    with pytest.raises(ConcurrentChangeError, match="ended from outside"):
        made.change({"action": "renew", "owner": "me", "ttl": 60}, now=2.0)


@pytest.mark.parametrize("request_", [{"action": "seize", "owner": "me"}, {"action": "claim"}, {}])
def test_malformed_changes_are_refused(request_):
    with pytest.raises(InvalidInputError, match="expected claim, renew or stop"):
        book().change(request_, 0.0)


def test_counts_losses_and_late_labels():
    made = book()
    made.record("2", "x", 0.8, 0.01)
    made.record("2", "y", None, 0.02)
    made.record("2", "z", 0.5, None)
    assert made.feedback("x", 1.0) and not made.feedback("x", 1.0) and not made.feedback("y", 0.0)
    counters = made.state(1.0)["counters"]["2"]
    assert (counters["requests"], counters["errors"], counters["latency"][0], sum(counters["buckets"])) == (3, 1, 2, 2)
    assert counters["log_loss"] == [1, pytest.approx(-math.log(0.8)), pytest.approx(math.log(0.8) ** 2)]
    assert counters["brier"][1] == pytest.approx(0.04)
    assert made.labels_unknown == 2
    for label in (None, 2, "1", float("nan")):
        with pytest.raises(InvalidInputError, match="from 0 to 1"):
            made.feedback("z", label)


def test_memory_for_labels_is_bounded():
    made = book(max_remembered=10)
    for index in range(100):
        made.record("1", str(index), 0.5, 0.01)
    assert [made.feedback(str(index), 1) for index in (0, 89, 90, 99)] == [False, False, True, True]


def test_a_change_of_weights_starts_an_epoch():
    made = book(10)
    made.route("x", 1.0)
    before = made.state(1.0)
    assert sum(before["routed"].values()) == 1
    made.configure({**CONFIG, "weight": 50.0})
    after = made.state(1.0)
    assert after["epoch"] == before["epoch"] + 1 and sum(after["routed"].values()) == 0
    assert made.state(2.0)["epoch"] == after["epoch"]


def test_the_judge_reads_the_state():
    made = book(50)
    made.record("1", "x", 0.2, 0.01)
    seen = observation_of(made.state(5.0))
    assert (
        seen.weight,
        seen.stable[""]["counts"]["requests"],
        seen.canary[""]["counts"]["requests"],
        seen.problem,
    ) == (50.0, 1, 0, None)
    assert observation_of({"boot": "x"}).problem


def test_prometheus_text():
    made = book()
    made.record("2", "x", 0.8, 0.0015)
    text = made.prometheus("flights")
    assert 'mlops_route_requests_total{route="flights",version="2"} 1' in text
    assert 'mlops_route_latency_seconds_bucket{route="flights",version="2",le="0.001563"} 1' in text
    assert 'le="+Inf"} 1' in text
