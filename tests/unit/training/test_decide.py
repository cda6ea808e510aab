"""The decision table: every state of an attempt against every content of the run directory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from airflow_mlops.training.decide import (
    ACTIVE,
    EXIT_APP,
    EXIT_INFRA,
    EXIT_REFUSED,
    EXIT_STOPPED,
    FINAL,
    LONGEST_BACKOFF,
    Observation,
    Patience,
    backoff,
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
    ("INVALID", None, None, "fail", "invalid"),
    ("INVALID", None, APP, "fail", "invalid"),
    ("INVALID", None, OK, "succeed", None),
    ("DEADLINE", None, None, "fail", "deadline"),
    ("DEADLINE", None, STOPPED, "fail", "deadline"),
    ("DEADLINE", None, INFRA, "fail", "deadline"),
    ("DEADLINE", 143, EARLIER, "fail", "deadline"),
    ("DEADLINE", None, APP, "fail", "app"),
    ("DEADLINE", None, OK, "succeed", None),
    ("CAPACITY", None, None, "restart", None),
    ("CAPACITY", None, EARLIER, "restart", None),
    ("CAPACITY", None, EARLIER_OK, "restart", None),
    ("CAPACITY", None, OK, "succeed", None),
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


WAITING = [status for status in ACTIVE if status != "SUBMITTER_LOST"]


@pytest.mark.parametrize("status", [*WAITING, "INCOMPLETE", "PAUSED_BY_A_LATER_RAY", ""])
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


@pytest.mark.parametrize("result", [None, EARLIER, EARLIER_OK])
def test_job_whose_submitter_is_lost_is_asked_for(result):
    action = next_action(Observation("SUBMITTER_LOST", message="BackoffLimitExceeded"), result, 2, 9, 3)
    assert action.kind == "ask" and "BackoffLimitExceeded" in action.reason


@pytest.mark.parametrize("result", [OK, APP, INFRA, STOPPED])
def test_driver_that_left_a_result_need_not_be_asked_for(result):
    as_lost = next_action(Observation("LOST"), result, 2, 0, 3)
    action = next_action(Observation("SUBMITTER_LOST"), result, 2, 0, 3)
    assert (action.kind, action.blame) == (as_lost.kind, as_lost.blame)


def test_restart_for_capacity_waits_longer_each_time_up_to_an_end():
    delays = [next_action(Observation("CAPACITY"), None, 1, restarts, 99).delay for restarts in range(7)]
    assert delays == [60.0, 120.0, 240.0, 480.0, 900.0, 900.0, 900.0]
    assert backoff(10_000) == LONGEST_BACKOFF
    assert next_action(Observation("LOST"), None, 1, 3, 99).delay == 0.0


def test_no_room_after_all_restarts_is_told_from_machines_that_were_lost():
    action = next_action(Observation("CAPACITY", message="no node"), None, 4, 3, 3)
    assert (action.kind, action.blame) == ("fail", "capacity")
    assert "no node" in action.reason and "all 3 restarts are used up" in action.reason


@pytest.mark.parametrize("result", [None, EARLIER])
def test_environment_that_cannot_be_built_is_not_built_again(result):
    seen = Observation("FAILED", None, "runtime_env setup failed: no such package")
    action = next_action(seen, result, 2, 0, 3)
    assert (action.kind, action.blame) == ("fail", "app") and "no such package" in action.reason
    died = Observation("FAILED", None, "Job supervisor actor died: runtime_env setup failed on a node that is gone")
    assert next_action(died, result, 2, 0, 3).kind == "restart"


#: Every combination that a caller can bring about, for what must hold of all of them.
PRODUCT = [
    (Observation(status, code, "said"), result, restarts, most, adopted)
    for status in (*ACTIVE, *FINAL, "INCOMPLETE", "Cleaning/RUNNING", "", "succeeded", "SUCCEEDED ")
    for code in (None, EXIT_APP, EXIT_INFRA, EXIT_REFUSED, EXIT_STOPPED, 127, 137, -9, 0)
    for result in (None, OK, APP, INFRA, STOPPED, EARLIER, EARLIER_OK, replace(OK, attempt=3), replace(APP, attempt=3))
    for restarts, most in ((0, 0), (0, 3), (2, 3), (3, 3), (4, 3))
    for adopted in (False, True)
]


def each(condition=lambda *_: True):
    """Every case of the product that fits, with what is done in it."""
    found = False
    for seen, result, restarts, most, adopted in PRODUCT:
        if condition(seen, result, restarts, most, adopted):
            found = True
            case = f"{seen} {result} restarts={restarts}/{most} adopted={adopted}"
            yield next_action(seen, result, 2, restarts, most, adopted), case
    assert found, "no case fits: the test checks nothing"


def own(result) -> bool:
    return result is not None and result.attempt == 2


def meant(seen, adopted) -> bool:
    """Not a stop that was meant for an earlier try."""
    return not (seen.status == "STOPPED" and adopted)


def test_of_all_cases_success_needs_a_succeeded_result_of_this_attempt_and_its_end():
    ends = (*FINAL, "SUBMITTER_LOST")
    for action, case in each(lambda seen, result, *_: not own(result) or not result.succeeded):
        assert action.kind != "succeed", case
    for action, case in each(lambda seen, *_: seen.status not in ends):
        assert action.kind == "wait", case
    for action, case in each(lambda seen, result, *_: seen.status in ends and own(result) and result.succeeded):
        assert action.kind == "succeed", case


def test_of_all_cases_none_restarts_more_often_than_allowed_but_to_replace_a_stopped_attempt_of_an_earlier_try():
    def used_up(seen, result, restarts, most, adopted):
        return restarts >= most and meant(seen, adopted)

    for action, case in each(used_up):
        assert action.kind != "restart", case


def test_of_all_cases_what_cannot_or_must_not_succeed_is_never_restarted():
    for action, case in each(lambda seen, *_: seen.status in ("INVALID", "DEADLINE", "UNREACHABLE", "SUCCEEDED")):
        assert action.kind in ("fail", "succeed"), case
    for action, case in each(lambda seen, result, restarts, most, adopted: seen.status == "STOPPED" and not adopted):
        assert action.kind in ("fail", "succeed"), case

    def refused(seen, result, restarts, most, adopted):
        return seen.exit_code == EXIT_REFUSED and not own(result) and meant(seen, adopted)

    for action, case in each(refused):
        assert action.kind != "restart", case


def test_of_all_cases_an_error_of_the_training_code_is_never_restarted_but_for_a_stop_meant_for_another_try():
    def mine(seen, result, restarts, most, adopted):
        return own(result) and result.exit_class == "app" and meant(seen, adopted)

    for action, case in each(mine):
        assert action.kind in ("fail", "wait"), case


def test_of_all_cases_adoption_matters_for_stops_alone():
    for seen, result, restarts, most, _ in PRODUCT:
        if seen.status != "STOPPED":
            first, second = (next_action(seen, result, 2, restarts, most, adopted) for adopted in (False, True))
            assert first == second


def test_of_all_cases_a_result_of_another_attempt_counts_for_nothing():
    for seen, result, restarts, most, adopted in PRODUCT:
        if result is not None and not own(result):
            without = next_action(seen, None, 2, restarts, most, adopted)
            assert next_action(seen, result, 2, restarts, most, adopted) == without


def test_of_all_cases_only_an_unwatched_job_without_a_result_is_asked_for():
    for action, case in each(lambda seen, result, *_: seen.status == "SUBMITTER_LOST" and not own(result)):
        assert action.kind == "ask", case
    for action, case in each(lambda seen, result, *_: seen.status != "SUBMITTER_LOST" or own(result)):
        assert action.kind != "ask", case


def test_of_all_cases_every_failure_has_its_blame_and_only_capacity_a_delay():
    blames = {"app", "infra", "capacity", "unreachable", "stopped", "refused", "invalid", "deadline"}
    seen_blames = set()
    for action, case in each():
        assert (action.blame is not None) == (action.kind == "fail"), case
        assert action.reason and "\n" not in action.reason, case
        seen_blames.add(action.blame)
    assert seen_blames == blames | {None}
    for action, case in each(lambda seen, *_: seen.status != "CAPACITY"):
        assert action.delay == 0.0, case


def test_no_state_is_both_active_and_final():
    assert not set(ACTIVE) & set(FINAL)


def test_patience_counts_silence_from_its_beginning_and_forgets_it():
    patience = Patience(60.0)
    assert patience.silent(100.0, "refused") is None
    assert patience.silent(159.0, "refused") is None
    patience.answered()
    assert patience.silent(161.0, "refused") is None
    assert patience.silent(220.0, "refused") is None
    seen = patience.silent(221.0, "refused")
    assert seen is not None and seen.status == "UNREACHABLE" and "refused" in seen.message
