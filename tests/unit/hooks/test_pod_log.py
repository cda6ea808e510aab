"""The driver's log out of those of submitters that come one after the other, each of which tells it from its start."""

from __future__ import annotations

import random

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks._pod_log import DriverLog, LogCursor, LogLine

DRIVER = ["Running entrypoint for job j: python train.py", *(f"step {number % 7}" for number in range(600))]


def spoken(log: DriverLog, pod: str, lines: list[str]) -> list[str]:
    """What of a submitter's whole log is new, with the follower replaced by another after every line that is."""
    found, begin = [], LogCursor.parse(log.since(pod)).count
    for number, text in enumerate(lines[begin:], begin + 1):
        if log.is_new(LogLine(LogCursor(1, number), text)):
            found.append(text)
            log.__init__(log.place)  # type: ignore[misc]
    return found


def test_the_first_submitter_is_passed_on_whole():
    assert spoken(DriverLog(None), "a", ["hello", *DRIVER, "Job succeeded"]) == ["hello", *DRIVER, "Job succeeded"]


@pytest.mark.parametrize("seed", range(30))
def test_no_line_is_lost_or_doubled_whoever_dies_where(seed):
    draw, log, told = random.Random(seed), DriverLog(None), []
    deaths = sorted(draw.sample(range(1, len(DRIVER)), 4))
    for pod, end in enumerate(deaths):
        words = [f"pod {pod} says good-bye {number}" for number in range(draw.choice([0, 1, 60, 127]))]
        if draw.random() < 0.3:  # it dies before it has told what the one before has
            end, words = end // 2, []
        told += spoken(log, f"p{pod}", ["hello", *DRIVER[:end], *words])
    told += spoken(log, "last", ["hello", *DRIVER])
    assert [line for line in told if "good-bye" not in line and line != "hello"] == DRIVER
    assert told.count("hello") == 1


def test_submitters_that_die_before_the_driver_begins_hide_nothing():
    log = DriverLog(None)
    assert spoken(log, "a", ["no cluster yet"]) == ["no cluster yet"]
    assert spoken(log, "b", ["hello", *DRIVER]) == ["hello", *DRIVER]


def test_a_submitter_that_dies_while_it_repeats_leaves_the_place_where_it_was():
    log = DriverLog(None)
    spoken(log, "a", DRIVER[:100])
    assert spoken(log, "b", DRIVER[:40]) == []
    assert spoken(log, "c", DRIVER[:120]) == DRIVER[100:120]


def test_last_words_of_one_that_repeats_make_lines_come_twice_and_lose_none():
    log = DriverLog(None)
    spoken(log, "a", DRIVER[:300])
    assert spoken(log, "b", [*DRIVER[:250], "good-bye"]) == ["good-bye"]
    assert spoken(log, "c", DRIVER[:320]) == DRIVER[250:320]


def test_a_place_of_an_earlier_release_goes_on_in_its_pod():
    log = DriverLog("a 1#50")
    assert log.since("a") == "1#50" and spoken(log, "a", DRIVER[:100]) == DRIVER[50:100]


def test_a_place_that_is_none_is_refused():
    with pytest.raises(InvalidInputError, match="no place in a driver's log"):
        DriverLog("a 1#50 many")
