"""A look as text: readable at ten guardrails, with units, whatever is missing."""

from __future__ import annotations

import pytest

from airflow_mlops.rollout import words
from airflow_mlops.rollout.judge import Verdict
from airflow_mlops.rollout.reporting import LookLog, look_table

SHARE = {"stable": 0.00512, "canary": 0.0213, "events": [5, 2], "e_harm": 812.3, "e_harm_needed": 200.0}
SHARE |= {"e_ok": 1e-9, "e_ok_needed": 20.0, "status": "harm"}
MEAN = {"status": "open", "stable": 0.4504, "canary": 0.4485, "values": [9, 9], "margin": 0.05}
MEAN |= {"worse_by_at_least": -0.0147, "worse_by_at_most": 0.0088}
EMPTY = {"status": "no data", "stable": None, "canary": None}


def look(guardrails, decision="HOLD", number=7):
    return Verdict(decision, 25, 0, number, ["why"], guardrails, {"stable": 12345, "canary": 411})


def test_a_look_is_a_line_its_reasons_and_a_table():
    accounts = {"errors": SHARE, "latency": {**SHARE, "slower_than_seconds": 0.0694, "status": "ok"}}
    assert look_table(look({**accounts, "log_loss": MEAN, "score": EMPTY})).splitlines() == [
        "look 7: HOLD, canary weight 25 %, 12,345 stable and 411 canary requests",
        "  why",
        "  guardrail  status    stable  canary  measured             evidence",
        "  errors     harm     0.512 %  2.13 %  of requests          harm 812 of 200 to 1, no harm <0.01 of 20 to 1",
        "  latency    ok       0.512 %  2.13 %  slower than 69.4 ms  harm 812 of 200 to 1, no harm <0.01 of 20 to 1",
        "  log_loss   open      0.4504  0.4485  mean                 worse by -0.0147 to 0.0088, to be below 0.05",
        "  score      no data        -       -  mean                 -",
    ]


def test_a_distance_has_no_number_of_stable():
    drift = {"kind": "drift", "status": "ok", "stable": 0.0, "canary": 0.0348, "values": [9, 9], "margin": 0.1}
    drift |= {"worse_by_at_least": -0.0132, "worse_by_at_most": 0.0763}
    row = look_table(look({"drift": drift})).splitlines()[-1]
    assert row == "  drift      ok           -  3.48 %  total variation  worse by -1.32 % to 7.63 %, to be below 10 %"
    planned = {**drift, "z_harm": 0.5, "z_harm_needed": 2.4, "planned_look": 3}
    assert "planned look 3: harm z 0.5 of 2.4; worse by -1.32 %" in look_table(look({"drift": planned}))


@pytest.mark.parametrize(
    ("account", "earlier"),
    [
        ({**SHARE, "status": "ok"}, True),
        ({**SHARE, "status": "ok", "e_ok": 20.0}, False),
        (SHARE, False),
        ({**MEAN, "status": "ok"}, False),
        ({**MEAN, "status": "ok", "worse_by_at_most": 0.051}, True),
        ({"status": "ok", "z_ok": 1.0, "z_ok_needed": 1.7}, True),
        ({"status": "ok", "z_ok": 1.8, "z_ok_needed": 1.7}, False),
    ],
)
def test_what_was_shown_at_an_earlier_look_is_said_to_be(account, earlier):
    assert any("at an earlier look" in remark for remark in words.remarks(account)) is earlier


def test_replicas_that_differ_are_told():
    told = words.remarks({"replica_spread": 0.2, "culprit": "c-1", "remark": "the edges are too coarse"})
    assert told == [
        "the edges are too coarse",
        "Replicas of one version differ by about 20 %; a difference between the arms is held against that.",
        "Only the canary's replica c-1 is worse; the others are as good as stable.",
    ]


def test_ten_guardrails_stay_in_their_columns():
    names = ["a", "a name of\nmany lines and far too many letters to stand in a column", *map(str, range(8))]
    lines = look_table(look({name: [SHARE, MEAN, EMPTY][index % 3] for index, name in enumerate(names)})).splitlines()
    rows = lines[2:]
    assert len(rows) == 11 and max(map(len, rows)) <= 140
    place = rows[0].index("measured")
    assert {row[place - 2 : place] for row in rows} == {"  "} and all(row[place] != " " for row in rows)
    assert "a name of many lines and far ..." in rows[2]


def test_a_look_without_guardrails_has_no_table():
    assert look_table(Verdict("PROMOTE", 100, 0, 0, ["why"])).splitlines() == [
        "look 0: PROMOTE, canary weight 100 %, 0 stable and 0 canary requests",
        "  why",
    ]


@pytest.mark.parametrize("changed", [{"e_harm_needed": None}, {"e_ok": None}, {"stable": float("nan")}])
def test_a_number_that_is_missing_is_a_dash(changed):
    assert "-" in look_table(look({"errors": {**SHARE, **changed}}))


def test_a_look_that_decides_is_written_others_now_and_then():
    clock, written = iter([0.0, 1.0, 4.9, 5.0, 6.0, 7.0]), []
    log = LookLog(written.append, clock=lambda: next(clock))
    for number, decision in enumerate(["HOLD", "HOLD", "HOLD", "HOLD", "PROMOTE_STEP", "HOLD"]):
        log(look({}, decision, number))
    assert [text.split(":")[0] for text in written] == ["look 0", "look 3", "look 4"]


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (words.share, 0.0, "0 %"), (words.share, 0.00005, "0.005 %"), (words.share, 1e-9, "<0.001 %"),
        (words.share, 1.0, "100 %"), (words.share, 0.12345, "12.3 %"), (words.share, None, "-"),
        (words.odds, 0.0, "<0.01"), (words.odds, 3.14159, "3.1"), (words.odds, 1e130, ">1,000,000"),
        (words.odds, 1234.5, "1,234"), (words.duration, 0.0694, "69.4 ms"), (words.duration, 90, "90 s"),
        (words.duration, 3600, "60 min"), (words.duration, 10800, "3 h"), (words.duration, 604800, "7 d"),
        (words.number, float("inf"), "-"), (words.number, True, "-"), (words.count, 1234567, "1,234,567"),
    ],
)  # fmt: skip
def test_numbers_have_units_that_fit(write, value, text):
    assert write(value) == text


@pytest.mark.parametrize(
    ("what", "interval", "shown"),
    [
        ("ratio of rates", [0.5, 0.9], True),
        ("ratio of rates", [0.9, 1.1], False),
        ("total variation", [0.0, 0.1], False),
        ("difference of means", [-0.2, -0.1], True),
    ],
)
def test_a_difference_is_shown_when_none_is_not_in_the_interval(what, interval, shown):
    said = words.effect("value", MEAN, {"effect": what, "estimate": 0.1, "interval": interval, "confidence": 0.95})
    assert said.endswith("; a difference is shown.") is shown and said.endswith("no difference is shown.") is not shown
