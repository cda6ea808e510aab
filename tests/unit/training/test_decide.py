"""The decision table: every state of an attempt against every content of the run directory."""

from __future__ import annotations

import pytest

from airflow_mlops.training.decide import (
    ACTIVE,
    EXIT_APP,
    EXIT_INFRA,
    EXIT_REFUSED,
    EXIT_STOPPED,
    FINAL,
    Observation,
    Patience,
    next_action,
)
from airflow_mlops.training.result import TrainingResult

OK = TrainingResult("SUCCEEDED", 2, "f")
APP = TrainingResult("FAILED", 2, "f", exit_class="app")
INFRA = TrainingResult("FAILED", 2, "f", exit_class="infra")
STOPPED = TrainingResult("FAILED", 2, "f", exit_class="stopped")
EARLIER = TrainingResult("FAILED", 1, "f", exit_class="app")
EARLIER_OK = TrainingResult("SUCCEEDED", 1, "f")

TABLE = [
    # status, exit code, result, action, blame
    ("SUCCEEDED", 0, OK, "succeed", None),
    ("SUCCEEDED", 0, None, "fail", "app"),
    ("SUCCEEDED", 0, EARLIER, "fail", "app"),
    ("SUCCEEDED", 0, EARLIER_OK, "fail", "app"),
    ("SUCCEEDED", 0, APP, "fail", "app"),
    ("SUCCEEDED", 0, INFRA, "fail", "app"),
    ("FAILED", 1, OK, "succeed", None),
    ("FAILED", EXIT_APP, APP, "fail", "app"),
    ("FAILED", EXIT_INFRA, INFRA, "restart", None),
    ("FAILED", EXIT_INFRA, None, "restart", None),
    ("FAILED", 127, None, "fail", "app"),
    ("FAILED", 1, None, "fail", "app"),
    ("FAILED", 1, EARLIER, "fail", "app"),
    ("FAILED", 137, None, "restart", None),
    ("FAILED", -9, None, "restart", None),
    ("FAILED", None, None, "restart", None),
    ("FAILED", None, EARLIER, "restart", None),
    ("FAILED", EXIT_REFUSED, None, "fail", "refused"),
    ("FAILED", EXIT_REFUSED, EARLIER, "fail", "refused"),
    ("FAILED", EXIT_STOPPED, STOPPED, "restart", None),
    ("STOPPED", None, None, "fail", "stopped"),
    ("STOPPED", 143, STOPPED, "fail", "stopped"),
    ("STOPPED", None, INFRA, "fail", "stopped"),
    ("STOPPED", None, OK, "succeed", None),
    ("LOST", None, OK, "succeed", None),
    ("LOST", None, APP, "fail", "app"),
    ("LOST", None, STOPPED, "restart", None),
    ("LOST", None, INFRA, "restart", None),
    ("LOST", None, None, "restart", None),
    ("LOST", -9, EARLIER, "restart", None),
    ("LOST", None, EARLIER_OK, "restart", None),
    ("UNREACHABLE", None, OK, "succeed", None),
    ("UNREACHABLE", None, APP, "fail", "app"),
    ("UNREACHABLE", None, None, "fail", "unreachable"),
    ("UNREACHABLE", None, INFRA, "fail", "unreachable"),
]


@pytest.mark.parametrize(("status", "code", "result", "kind", "blame"), TABLE)
def test_final_state(status, code, result, kind, blame):
    action = next_action(Observation(status, code, "said"), result, 2, 0, 3)
    assert (action.kind, action.blame) == (kind, blame), action.reason


@pytest.mark.parametrize("result", [None, STOPPED, INFRA])
@pytest.mark.parametrize(("restarts", "max_restarts"), [(0, 3), (0, 0)])
def test_stop_of_an_attempt_that_an_earlier_try_started_was_meant_for_that_try(result, restarts, max_restarts):
    action = next_action(Observation("STOPPED"), result, 2, restarts, max_restarts, adopted=True)
    assert action.kind == "restart"


@pytest.mark.parametrize(("status", "code", "result", "kind", "blame"), [row for row in TABLE if row[0] != "STOPPED"])
def test_adoption_changes_nothing_else(status, code, result, kind, blame):
    action = next_action(Observation(status, code), result, 2, 0, 3, adopted=True)
    assert (action.kind, action.blame) == (kind, blame)


def test_table_has_every_final_status():
    assert {row[0] for row in TABLE} == set(FINAL)


@pytest.mark.parametrize("status", [*ACTIVE, "PAUSED_BY_A_LATER_RAY", ""])
@pytest.mark.parametrize("result", [None, OK, APP, INFRA, STOPPED, EARLIER])
def test_active_and_unknown_states_are_waited_for(status, result):
    assert next_action(Observation(status), result, 2, 0, 3).kind == "wait"


@pytest.mark.parametrize(("restarts", "kind"), [(0, "restart"), (2, "restart"), (3, "fail"), (4, "fail")])
def test_restarts_end(restarts, kind):
    action = next_action(Observation("LOST"), None, 2, restarts, 3)
    assert action.kind == kind
    assert action.blame == ("infra" if kind == "fail" else None)


def test_no_restart_allowed():
    assert next_action(Observation("LOST"), None, 1, 0, 0).blame == "infra"


def test_patience_counts_silence_from_its_beginning_and_forgets_it():
    patience = Patience(60.0)
    assert patience.silent(100.0, "refused") is None
    assert patience.silent(159.0, "refused") is None
    patience.answered()
    assert patience.silent(161.0, "refused") is None
    assert patience.silent(220.0, "refused") is None
    seen = patience.silent(221.0, "refused")
    assert seen is not None and seen.status == "UNREACHABLE" and "refused" in seen.message
