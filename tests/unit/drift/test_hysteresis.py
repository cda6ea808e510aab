"""Hysteresis: random histories can never train more often than allowed, and judging a window again changes nothing."""

from __future__ import annotations

import datetime as dt
import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_mlops.drift import ColumnDrift, DriftPolicy, DriftReport, HarmPolicy, HarmReport
from airflow_mlops.drift.harm import HarmTest
from airflow_mlops.drift.hysteresis import Hysteresis, severity
from airflow_mlops.exceptions import InvalidInputError

START = dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc)
DAY = dt.timedelta(days=1)


def replay(limits, scores, *, state=None, first=0, subject="1"):
    """The decisions on one window a day, the state going through JSON as it does when it is kept."""
    decisions = []
    for day, score in enumerate(scores, first):
        decision, state = limits.decide(json.loads(json.dumps(state)), score, START + day * DAY, subject)
        decisions.append(decision)
    return decisions, state


def granted(decisions):
    return [day for day, decision in enumerate(decisions) if decision.retrain]


levels = st.one_of(st.none(), st.sampled_from([0.0, 0.4, 0.5, 0.7, 0.99, 1.0, 1.5, float("nan"), float("inf")]))
limits = st.builds(
    Hysteresis,
    arm=st.just(1.0),
    disarm=st.sampled_from([0.0, 0.5, 1.0]),
    consecutive_breaches=st.integers(1, 3),
    cooldown=st.integers(0, 9).map(lambda days: days * DAY),
    budget_per_window=st.one_of(st.none(), st.integers(0, 3)),
    window=st.integers(1, 20).map(lambda days: days * DAY),
)


@settings(max_examples=300, deadline=None)
@given(limits, st.lists(levels, max_size=60))
def test_no_history_trains_more_often_than_allowed(limits, scores):
    decisions, _ = replay(limits, scores)
    days = granted(decisions)
    for earlier, later in pairwise(days):
        assert (later - earlier) * DAY >= limits.cooldown
        assert any(score is not None and score < limits.disarm for score in scores[earlier + 1 : later])
    for day in days:
        row = scores[max(0, day + 1 - limits.consecutive_breaches) : day + 1]
        assert scores[day] >= limits.arm and not any(score is not None and score < limits.arm for score in row)
        if limits.budget_per_window is not None:
            assert (
                sum(day * DAY - limits.window < other * DAY <= day * DAY for other in days) <= limits.budget_per_window
            )
    for score, decision in zip(scores, decisions):
        assert bool(decision.reason) == (score is not None and score >= limits.arm and not decision.retrain)


@settings(max_examples=200, deadline=None)
@given(limits, st.lists(st.tuples(st.integers(0, 20), levels), max_size=40))
def test_no_order_of_windows_trains_more_often_than_allowed(limits, visits):
    """Retries, and a backfill that comes late: what was granted is bounded as if it had come in order."""
    days, state, newest = set(), None, -1
    for day, score in visits:
        decision, after = limits.decide(state, score, START + day * DAY, "1")
        if day < newest:
            assert after == state, "an older window changed the state"
            assert not decision.retrain or day in days
        newest = max(newest, day)
        state = json.loads(json.dumps(after))
        days |= {day} if decision.retrain else set()
    ordered = sorted(days)
    assert all((later - earlier) * DAY >= limits.cooldown for earlier, later in pairwise(ordered))
    if limits.budget_per_window is not None:
        for day in ordered:
            inside = sum(day * DAY - limits.window < other * DAY <= day * DAY for other in ordered)
            assert inside <= limits.budget_per_window


@settings(max_examples=200, deadline=None)
@given(limits, st.lists(levels, min_size=1, max_size=30), st.data())
def test_a_window_that_is_judged_again_changes_nothing(limits, scores, data):
    decisions, state = replay(limits, scores)
    day = data.draw(st.integers(0, len(scores) - 1))
    again, after = limits.decide(state, scores[day], START + day * DAY, "1")
    assert again == decisions[day] and after == state


@settings(max_examples=100, deadline=None)
@given(limits, st.lists(levels, min_size=2, max_size=30), st.data())
def test_the_newest_window_can_be_mended(limits, scores, data):
    """Other data for the same window decide anew, as if they had been there at first, unless it was granted."""
    newest = START + (len(scores) - 1) * DAY
    _, before = replay(limits, scores[:-1])
    straight, expected = limits.decide(before, scores[-1], newest, "1")
    _, state = replay(limits, [*scores[:-1], data.draw(levels)])
    mended, after = limits.decide(state, scores[-1], newest, "1")
    assert mended.retrain == straight.retrain
    if len(after["granted"]) == len(expected["granted"]):
        assert after == expected


def test_oscillation_around_the_threshold_trains_once():
    decisions, _ = replay(Hysteresis(arm=1.0, disarm=0.5), [1.2, 0.9] * 30)
    assert granted(decisions) == [0]
    decisions, _ = replay(Hysteresis(arm=1.0, disarm=0.5), [1.2, 0.4] * 3)
    assert granted(decisions) == [0, 2, 4]


def test_oscillation_through_both_levels_is_held_by_cooldown_and_budget():
    wild = [1.2, 0.1] * 50
    decisions, _ = replay(Hysteresis(cooldown=10 * DAY), wild)
    assert granted(decisions) == list(range(0, 100, 10))
    decisions, _ = replay(Hysteresis(budget_per_window=2, window=30 * DAY), wild)
    assert granted(decisions) == [0, 2, 30, 32, 60, 62, 90, 92]


def test_it_takes_breaches_in_a_row_and_silence_does_not_break_the_row():
    limits = Hysteresis(consecutive_breaches=3)
    assert granted(replay(limits, [1, 1, 0.9, 1, 1, 1])[0]) == [5]
    assert granted(replay(limits, [1, None, 1, float("nan"), 1])[0]) == [4]
    decisions, _ = replay(limits, [2.0])
    assert decisions[0].reason == "1 breach(es) in a row, 3 needed" and decisions[0].until is None


def test_it_says_until_when_training_is_held_back():
    wild = [1.2, 0.1, 1.2, 0.1, 1.2]
    (*_, held), _ = replay(Hysteresis(cooldown=7 * DAY), wild)
    assert held.reason == "cool-down since the training of 2013-01-01"
    assert held.until == "2013-01-08T00:00:00+00:00"
    (*_, held), _ = replay(Hysteresis(budget_per_window=2, window=30 * DAY), wild)
    assert held.reason == "2 training(s) in 30 days, the budget is 2"
    assert held.until == "2013-01-31T00:00:00+00:00"
    (*_, held), _ = replay(Hysteresis(budget_per_window=0), [1.2])
    assert (held.retrain, held.until) == (False, None)
    (_, held), _ = replay(Hysteresis(rearm_after=5 * DAY), [1.2, 1.2])
    assert held.reason == "disarmed by the training of 2013-01-01 until a score is below 0.5, or until 2013-01-06"
    assert held.until == "2013-01-06T00:00:00+00:00"
    assert granted(replay(Hysteresis(rearm_after=5 * DAY), [1.2] * 11)[0]) == [0, 5, 10]


@pytest.mark.parametrize(
    ("more", "why", "until"),
    [
        ({"cooldown": 30 * DAY}, "cool-down since the training of 2013-01-01", "2013-01-31"),
        ({"cooldown": 3 * DAY}, "cool-down since the training of 2013-01-01", "2013-01-08"),
        ({"budget_per_window": 1, "window": 20 * DAY}, "1 training(s) in 20 days, the budget is 1", "2013-01-21"),
    ],
)
def test_until_is_the_latest_of_all_that_holds_it_back(more, why, until):
    """A date that is promised is the first on which a breach is granted."""
    made = Hysteresis(rearm_after=7 * DAY, **more)
    (_, held), _ = replay(made, [1.2, 1.2])
    assert held.until == f"{until}T00:00:00+00:00"
    assert held.reason == (
        f"disarmed by the training of 2013-01-01 until a score is below 0.5, or until 2013-01-08; {why}"
    )
    days = granted(replay(made, [1.2] * 40)[0])
    assert START + days[1] * DAY == dt.datetime.fromisoformat(held.until)


def test_time_alone_lifts_no_hold_where_nothing_arms_again():
    (_, held), _ = replay(Hysteresis(cooldown=30 * DAY), [1.2, 1.2])
    assert held.until is None and "cool-down since the training of 2013-01-01" in held.reason


def test_a_new_champion_arms_it_and_keeps_what_was_granted():
    limits = Hysteresis(cooldown=3 * DAY)
    first, state = replay(limits, [1.2, 1.2])
    second, _ = replay(limits, [1.2, 1.2], state=state, first=2, subject="2")
    assert granted(first) == [0] and granted(second) == [1], "the cool-down holds for the new champion too"


def test_a_grant_that_is_judged_away_stays_counted():
    limits = Hysteresis(disarm=0.5, budget_per_window=1, window=10 * DAY)
    _, state = replay(limits, [1.2])
    decision, state = limits.decide(state, 0.1, START, "1")
    assert (decision.retrain, decision.granted) == (False, 1)
    decision, _ = limits.decide(state, 1.2, START + DAY, "1")
    assert not decision.retrain and "the budget is 1" in decision.reason


def test_an_older_window_says_so():
    limits = Hysteresis()
    _, state = replay(limits, [0.1], first=9)
    decision, after = limits.decide(state, 5.0, START, "1")
    assert not decision.retrain and after == state
    assert decision.reason == "a later window, ending 2013-01-10T00:00:00+00:00, has been judged before this one"


def test_the_state_stays_small():
    _, state = replay(Hysteresis(window=dt.timedelta(0)), [1.2, 0.1] * 200)
    assert len(json.dumps(state)) < 24_000 and len(state["granted"]) <= 64


def test_spans_and_numbers_may_be_text():
    given = {"cooldown": "36h", "window": "4w", "rearm_after": 60, "arm": "2", "budget_per_window": "3"}
    limits = Hysteresis.from_json(given)
    assert (limits.cooldown, limits.window) == (1.5 * DAY, 28 * DAY)
    assert (limits.rearm_after, limits.arm, limits.budget_per_window) == (dt.timedelta(seconds=60), 2, 3)
    assert Hysteresis.from_json({"budget_per_window": None, "rearm_after": None}) == Hysteresis()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cool_down": 1}, "unknown field"),
        ({"arm": 0}, "arm is 0"),
        ({"arm": 1, "disarm": 2}, "disarm is 2"),
        ({"consecutive_breaches": 0}, "consecutive_breaches is 0"),
        ({"consecutive_breaches": 1.5}, "expected a whole number"),
        ({"budget_per_window": -1}, "budget_per_window is -1"),
        ({"cooldown": "a month"}, "expected seconds, or text"),
        ({"cooldown": "-3"}, "expected a span of time"),
        ({"window": None}, "window is None"),
        ({"window": "99999999w"}, "expected a span of time"),
    ],
)
def test_limits_out_of_range_are_refused(given, message):
    with pytest.raises(InvalidInputError, match=message):
        Hysteresis.from_json(given)


@pytest.mark.parametrize(
    ("state", "message"),
    [({}, "damaged"), ({"hysteresis_version": 2}, "upgrade"), ({"hysteresis_version": 1, "log": [{}]}, "damaged")],
)
def test_a_state_that_cannot_be_read_is_an_error(state, message):
    with pytest.raises(InvalidInputError, match=message):
        Hysteresis().decide(state, 1.0, START)


def test_a_window_needs_a_time_zone():
    with pytest.raises(InvalidInputError, match="time zone"):
        Hysteresis().decide(None, 1.0, dt.datetime(2013, 1, 1))


def drift_of(effects, min_columns=1, verdict="drift"):
    columns = tuple(ColumnDrift(n, status, "wasserstein", effect=effect) for n, (status, effect) in effects.items())
    return DriftReport(verdict, (), columns, {}, (900, 900), ("", ""), DriftPolicy(min_columns=min_columns))


def harm_of(*tests, verdict="harm"):
    found = tuple(
        HarmTest(n, 0.5, 0.5 + change, change, 0.02, 0.01, 0.01, 0.05, harmful) for n, change, harmful in tests
    )
    return HarmReport(verdict, (), found, 900, 30, HarmPolicy())


def test_severity_is_one_at_the_tolerance():
    drift = drift_of({"a": ("drift", 0.3), "b": ("drift", 0.2), "c": ("calendar", 9.0), "d": ("stable", 0.01)})
    assert severity(drift, None, ["drift"], True) == pytest.approx(3)
    second = drift_of({"a": ("drift", 0.3), "b": ("drift", 0.2)}, min_columns=2)
    assert severity(second, None, ["drift"], True) == pytest.approx(2)
    unseen = drift_of({"a": ("drift", 0.001)})
    assert severity(unseen, None, ["drift"], True) == 1
    harm = harm_of(("log_loss", 0.05, True), ("calibration", -0.4, False))
    assert severity(drift, harm, ["harm"], True) == pytest.approx(2.5)
    assert severity(drift, harm, ["harm", "drift"], True) == pytest.approx(3)


def test_evidence_that_asks_for_nothing_is_no_breach_and_arms_only_when_it_is_small():
    noisy = drift_of({"a": ("stable", 0.7)}, verdict="stable")
    assert severity(noisy, None, ["drift"], False) == 0.99
    assert severity(noisy, None, ["drift"], False, arm=9.0) == pytest.approx(7)
    assert severity(drift_of({"a": ("stable", 0.02)}, verdict="stable"), None, ["drift"], False) == pytest.approx(0.2)
    assert severity(None, harm_of(("log_loss", -0.5, False), verdict="stable"), ["harm"], False) == 0


def test_no_evidence_is_no_score():
    assert severity(drift_of({}, verdict="not_enough_data"), None, ["drift"], False) is None
    assert severity(drift_of({}), harm_of(verdict="not_enough_data"), ["harm"], False) is None
    assert severity(drift_of({"a": ("broken", None)}), None, ["drift"], False) == 0
