from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.fence import Owner
from airflow_mlops.training.limits import (
    Breach,
    Budget,
    Limits,
    Times,
    after_breach,
    attempt_seconds,
    breach,
    consumed,
    estimate_usage,
    remaining,
    times_of,
    updated,
)
from airflow_mlops.training.result import TrainingResult, Usage
from airflow_mlops.training.runs import begin_attempt
from airflow_mlops.training.spec import TrainingSpec

NONE = Limits()
NEW = Times(run_began=0.0, attempt_began=0.0)


def kind(limits: Limits, times: Times, now: float) -> str | None:
    found = breach(limits, times, now)
    return found and found.kind


def test_no_limit_is_never_broken():
    assert breach(NONE, NEW, 1e12) is None and remaining(NONE, NEW, 1e12) is None
    assert attempt_seconds(NONE, NEW, 0.0) is None


@pytest.mark.parametrize(
    ("limits", "times", "at", "expected"),
    [
        (Limits(startup_timeout=10), NEW, 10, "startup"),
        (Limits(startup_timeout=10), replace(NEW, queued_seconds=5.0), 15, "startup"),
        (Limits(startup_timeout=10), replace(NEW, queued_seconds=5.0, startup_since=60.0), 70, "startup"),
        (Limits(queue_timeout=10), replace(NEW, queued_since=20.0), 30, "queue"),
        (Limits(queue_timeout=10), replace(NEW, queued_since=20.0, queued_seconds=4.0), 26, "queue"),
        (Limits(attempt_timeout=10), replace(NEW, attempt_began=100.0), 110, "attempt"),
        (Limits(attempt_timeout=10), replace(NEW, queued_seconds=7.0, running_since=9.0), 17, "attempt"),
        (Limits(total_timeout=100), replace(NEW, attempt_began=90.0, queued_since=91.0), 100, "total"),
        (Limits(stall_timeout=10), replace(NEW, running_since=50.0), 60, "stall"),
        (Limits(stall_timeout=10), replace(NEW, running_since=50.0, last_progress=70.0), 80, "stall"),
        (Limits(stall_timeout=10), replace(NEW, running_since=50.0, last_progress=3.0), 60, "stall"),
        # Two GPUs from second 50 on; half an hour of each is one GPU-hour.
        (Limits(budget=Budget(1.0)), replace(NEW, running_since=50.0, gpus=2.0), 50 + 1800, "budget"),
        (Limits(budget=Budget(None, 5.0, 5.0)), replace(NEW, running_since=50.0, gpus=2.0), 1850, "budget"),
        (Limits(budget=Budget(9.0, 5.0, 5.0)), replace(NEW, running_since=50.0, gpus=2.0), 1850, "budget"),
        (
            Limits(budget=Budget(1.0)),
            replace(NEW, running_since=50.0, gpus=2.0, usage=Usage(gpu_seconds=1600.0), usage_at=400.0),
            1400,
            "budget",
        ),
        (
            Limits(budget=Budget(1.0)),
            replace(NEW, running_since=50.0, gpus=2.0, usage=Usage(gpu_seconds=1600.0), unmetered=1000.0),
            550,
            "budget",
        ),
    ],
)
def test_limit_breaks_at_its_second_and_not_before(limits, times, at, expected):
    assert kind(limits, times, at - 0.5) is None
    assert remaining(limits, times, at - 0.5) == pytest.approx(0.5)
    assert kind(limits, times, at) == expected
    assert remaining(limits, times, at + 5.0) == 0.0


@pytest.mark.parametrize(
    ("limits", "times"),
    [
        (Limits(startup_timeout=10), replace(NEW, queued_since=1.0)),
        (Limits(startup_timeout=10), replace(NEW, running_since=5.0)),
        (Limits(queue_timeout=10), replace(NEW, queued_seconds=9.0)),
        (Limits(queue_timeout=10), NEW),
        (Limits(attempt_timeout=10), replace(NEW, queued_since=9.0)),
        (Limits(stall_timeout=10), NEW),
        (Limits(stall_timeout=10), replace(NEW, last_progress=1.0)),
        (Limits(stall_timeout=10), replace(NEW, last_progress=1.0, queued_since=2.0)),
        (Limits(budget=Budget(1.0)), replace(NEW, gpus=8.0)),
        (Limits(budget=Budget(1.0)), replace(NEW, running_since=0.0, gpus=0.0)),
        (Limits(budget=Budget(price_per_gpu_hour=3.0)), replace(NEW, running_since=0.0, gpus=8.0)),
    ],
)
def test_clock_that_stands_still_breaks_nothing(limits, times):
    assert breach(limits, times, 1e12) is None and remaining(limits, times, 1e12) is None


def test_spent_budget_is_broken_before_anything_runs():
    times = replace(NEW, usage=Usage(gpu_seconds=3600.0), gpus=2.0)
    assert kind(Limits(budget=Budget(1.0)), times, 0.0) == "budget"
    assert attempt_seconds(Limits(startup_timeout=5, budget=Budget(0.5)), times, 0.0) == 0.0


def test_limit_that_broke_first_is_named():
    limits = Limits(attempt_timeout=20, total_timeout=10)
    assert kind(limits, NEW, 100.0) == "total"
    assert kind(replace(limits, attempt_timeout=5.0), NEW, 100.0) == "attempt"


def test_messages_name_the_limit_and_what_to_do():
    budget = Limits(budget=Budget(4.0, 10.0, 2.5))
    message = breach(budget, replace(NEW, usage=Usage(gpu_seconds=9e9)), 0.0).message
    assert "4 GPU-hours and 10 at 2.5 per GPU-hour" in message and "kept" in message and "clear the task" in message
    assert "total_timeout=10 s" in breach(Limits(total_timeout=10), NEW, 10.0).message
    assert "startup_timeout=10 s" in breach(Limits(startup_timeout=10), NEW, 10.0).message


def test_only_a_stall_is_mended_by_another_attempt():
    running, queued = replace(NEW, running_since=0.0, gpus=1.0), replace(NEW, queued_since=0.0)
    every = [
        (Limits(startup_timeout=1), NEW),
        (Limits(queue_timeout=1), queued),
        (Limits(attempt_timeout=1), NEW),
        (Limits(total_timeout=1), NEW),
        (Limits(stall_timeout=1), running),
        (Limits(budget=Budget(0.001)), running),
    ]
    found = [breach(limits, times, 1e6) for limits, times in every]
    assert [entry.kind for entry in found] == ["startup", "queue", "attempt", "total", "stall", "budget"]
    assert [entry.kind for entry in found if entry.restart] == ["stall"]
    assert all(Breach(**json.loads(json.dumps(entry.to_json()))) == entry for entry in found)


OK = TrainingResult("SUCCEEDED", 2, "f")
FAILED = TrainingResult("FAILED", 2, "f", exit_class="stopped")


@pytest.mark.parametrize("broken", [Breach("budget", "m"), Breach("total", "m"), Breach("stall", "m", restart=True)])
@pytest.mark.parametrize("result", [None, FAILED, OK, replace(OK, attempt=1)])
@pytest.mark.parametrize("restarts", [0, 2, 3, 4])
def test_what_a_breach_leads_to(broken, result, restarts):
    action = after_breach(broken, result, 2, restarts, 3)
    if result is OK:
        assert action.kind == "succeed"
    elif broken.restart and restarts < 3:
        assert action.kind == "restart"
    else:
        assert (action.kind, action.blame) == ("fail", broken.kind)


# The course of an attempt, as it is observed.


def course(times: Times, *seen: tuple[str, float]) -> Times:
    for status, now in seen:
        times = times.seen(status, now)
    return times


def test_time_in_the_queue_is_no_startup_and_no_attempt_time():
    limits = Limits(startup_timeout=20, attempt_timeout=100)
    times = course(NEW, ("PENDING", 1), ("QUEUED", 5), ("QUEUED", 500), ("PENDING", 1000))
    assert times.queued_seconds == 995.0 and times.queued_since is None
    assert remaining(limits, times, 1000.0) == 20.0
    running = times.seen("RUNNING", 1010)
    assert remaining(limits, running, 1010.0) == pytest.approx(100 - 5 - 10)


def test_preempted_attempt_has_its_whole_startup_again_when_admitted():
    times = course(NEW, ("RUNNING", 10), ("QUEUED", 5000), ("PENDING", 6000))
    assert remaining(Limits(startup_timeout=20), times, 6005.0) == 15.0
    assert kind(Limits(stall_timeout=20), times, 9000.0) is None
    again = times.seen("RUNNING", 6010)
    assert remaining(Limits(stall_timeout=20), again, 6010.0) == 20.0


def test_queue_time_adds_up_over_stays():
    times = course(NEW, ("QUEUED", 0), ("RUNNING", 60), ("QUEUED", 100))
    assert remaining(Limits(queue_timeout=100), times, 110.0) == 30.0


@pytest.mark.parametrize("status", ["STOPPING", "SUBMITTER_LOST", "INCOMPLETE", "Cleaning/", "LOST", "SUCCEEDED"])
@pytest.mark.parametrize("before", ["PENDING", "QUEUED", "RUNNING"])
def test_other_states_stop_and_start_no_clock(status, before):
    times = course(NEW, (before, 5))
    assert times.seen(status, 9.0) == times


def test_running_counts_from_when_the_system_says_but_within_reason():
    assert NEW.seen("RUNNING", 50.0, running_since=30.0).running_since == 30.0
    assert NEW.seen("RUNNING", 50.0, running_since=80.0).running_since == 50.0
    assert replace(NEW, attempt_began=40.0).seen("RUNNING", 50.0, running_since=3.0).running_since == 40.0
    assert course(NEW, ("RUNNING", 5), ("RUNNING", 9)).running_since == 5.0


def test_budget_adds_up_over_attempts_that_never_told():
    budget = Limits(budget=Budget(1.0))
    times = replace(NEW, gpus=4.0).seen("RUNNING", 100.0).next_attempt(400.0)
    assert times.gpu_seconds(400.0) == 1200.0
    times = times.seen("RUNNING", 1000.0).next_attempt(1300.0)
    assert times.gpu_seconds(9000.0) == 2400.0, "nothing is consumed while nothing runs"
    times = times.seen("RUNNING", 10_000.0)
    assert remaining(budget, times, 10_000.0) == 300.0
    assert times.run_began == 0.0 and kind(budget, times, 10_300.0) == "budget"


def test_preempted_attempt_consumes_nothing_in_the_queue():
    times = course(replace(NEW, gpus=2.0), ("RUNNING", 0), ("QUEUED", 100), ("PENDING", 5000), ("RUNNING", 6000))
    assert times.gpu_seconds(6000.0) == 200.0 and times.gpu_seconds(6010.0) == 220.0


def test_next_attempt_keeps_the_runs_clock_and_starts_its_own():
    limits = Limits(startup_timeout=30, attempt_timeout=100, total_timeout=250)
    times = course(NEW, ("QUEUED", 0), ("RUNNING", 50)).next_attempt(200.0)
    assert times == Times(run_began=0.0, attempt_began=200.0)
    assert remaining(limits, times, 210.0) == 20.0
    assert remaining(replace(limits, startup_timeout=None), times, 210.0) == 40.0


def test_deadline_for_the_cluster_to_keep():
    times = replace(NEW, attempt_began=100.0, gpus=2.0, usage=Usage(gpu_seconds=1800.0))
    assert attempt_seconds(Limits(attempt_timeout=50, total_timeout=500), times, 100.0) == 50.0
    assert attempt_seconds(Limits(attempt_timeout=50, total_timeout=120), times, 100.0) == 20.0
    assert attempt_seconds(Limits(total_timeout=50), times, 100.0) == 0.0
    assert attempt_seconds(Limits(startup_timeout=60, budget=Budget(1.0)), times, 100.0) == 60 + 900
    assert attempt_seconds(Limits(budget=Budget(1.0)), times, 100.0) is None


# Against a clock that ticks and counts.


@dataclass
class Counters:
    """The same limits, counted second by second."""

    startup: float = 0.0
    queue: float = 0.0
    attempt: float = 0.0
    total: float = 0.0
    stall: float = 0.0
    gpu_seconds: float = 0.0

    def tick(self, status: str, gpus: float) -> None:
        self.total += 1
        self.queue += status == "QUEUED"
        self.attempt += status != "QUEUED"
        self.startup += status == "PENDING"
        self.stall += status == "RUNNING"
        self.gpu_seconds += gpus * (status == "RUNNING")

    def change(self, before: str, after: str) -> str:
        if after != before:
            self.startup = self.stall = 0.0
        return after

    def broken(self, limits: Limits, status: str) -> set[str]:
        in_force = {
            "startup": status == "PENDING" and limits.startup_timeout,
            "queue": status == "QUEUED" and limits.queue_timeout,
            "attempt": status != "QUEUED" and limits.attempt_timeout,
            "total": limits.total_timeout,
            "stall": status == "RUNNING" and limits.stall_timeout,
        }
        found = {name for name, limit in in_force.items() if limit and getattr(self, name) >= limit}
        allowed = limits.budget.gpu_seconds if limits.budget else None
        return found | ({"budget"} if allowed and self.gpu_seconds >= allowed - 1e-6 else set())


@dataclass
class Drivers:
    """What the drivers of a run know of its GPU-seconds: each goes on from what the last one told."""

    told: float = 0.0
    before: float = 0.0
    since: float = 0.0
    lost: float = 0.0

    def killed(self) -> None:
        self.lost += self.since
        self.since = 0.0


def random_limits(rng: random.Random) -> Limits:
    def some(low: int, high: int) -> float | None:
        return rng.randint(low, high) if rng.random() < 0.6 else None

    price = rng.choice([0.5, 2.0])
    budget = Budget(
        max_gpu_hours=rng.randint(50, 900) / 3600 if rng.random() < 0.6 else None,
        max_cost=rng.randint(50, 900) / 3600 * price,
        price_per_gpu_hour=price,
    )
    return Limits(
        some(5, 60), some(5, 90), some(40, 200), some(60, 500), some(10, 80), budget if rng.random() < 0.6 else None
    )


@pytest.mark.parametrize("block", range(0, 600, 200))
def test_limits_agree_with_a_ticking_clock_and_remaining_is_never_late(block):
    ends = [walk(seed) for seed in range(block, block + 200)]
    assert {"startup", "queue", "attempt", "total", "stall", "budget", None} == set(ends), "some limit was never tried"


def walk(seed: int) -> str | None:
    """A random course under random limits until one breaks; which it was."""
    rng = random.Random(seed)
    limits, gpus = random_limits(rng), rng.choice([0.0, 1.0, 4.0])
    start = rng.choice([0.0, 1_795_000_000.0])
    times, counters, status = Times(start, start, gpus=gpus), Counters(), "PENDING"
    drivers, promised = Drivers(), None
    for second in range(400):
        now = start + second
        if second:
            counters.tick(status, gpus)
            drivers.since += gpus * (status == "RUNNING")
        event = rng.random()
        if event < 0.06:
            before, status = status, counters.change(status, rng.choice(["PENDING", "RUNNING", "QUEUED"]))
            if before != status:
                drivers.killed()
            times = times.seen(status, now)
            promised = None
        elif event < 0.08 and second:
            status = "PENDING"
            counters = Counters(total=counters.total, gpu_seconds=counters.gpu_seconds)
            times, drivers = times.next_attempt(now), Drivers(drivers.told, drivers.told)
            promised = None
        elif event < 0.12 and status == "RUNNING":
            counters.stall = 0.0
            times = replace(times, last_progress=now)
            promised = None
        elif event < 0.20 and status == "RUNNING":
            drivers.told += drivers.since
            # What a driver of the same attempt could not tell any more is forgiven, and not counted twice.
            counters.gpu_seconds -= drivers.lost
            drivers.since = drivers.lost = 0.0
            times = times.told(Usage(gpu_seconds=drivers.told), now, drivers.before)
            promised = None
        broken = counters.broken(limits, status)
        found, left = breach(limits, times, now), remaining(limits, times, now)
        assert bool(found) == bool(broken), (seed, second, found, broken)
        assert found is None or found.kind in broken
        assert (left == 0.0) == bool(broken), (seed, second, left)
        if promised is not None and broken:
            assert now - 1 < promised <= now + 1e-3, (seed, second, "the breach was promised for another second")
        if broken:
            return found.kind
        if promised is not None:
            assert now < promised + 1e-3, (seed, second, "remaining() was later than the breach")
        promised = None if left is None else now + left
        assert left is None or left > 0
    return None


@pytest.mark.parametrize("block", range(0, 200, 50))
def test_without_a_change_the_breach_comes_when_remaining_says(block):
    for seed in range(block, block + 50):
        foretell(seed)


def foretell(seed: int) -> None:
    rng = random.Random(1000 + seed)
    limits, gpus = random_limits(rng), rng.choice([1.0, 4.0])
    times, counters, status, now = Times(0.0, 0.0, gpus=gpus), Counters(), "PENDING", 0
    for _ in range(rng.randint(0, 3)):
        status = counters.change(status, rng.choice(["PENDING", "RUNNING", "QUEUED"]))
        times = times.seen(status, now)
        for _ in range(rng.randint(1, 12)):
            counters.tick(status, gpus)
            now += 1
    left = remaining(limits, times, now)
    for later in range(2000):
        if counters.broken(limits, status):
            assert left is not None and later - 1 < left <= later, (left, later)
            return
        counters.tick(status, gpus)
    assert left is None


# What the run directory tells.


@pytest.fixture
def spec(tmp_path) -> TrainingSpec:
    return TrainingSpec("pkg.mod:loop", "xgboost", str(tmp_path / "runs"), "r1", attempt=2)


def told(spec: TrainingSpec, gpu_seconds: float, at: float, attempt: int = 2) -> None:
    owner = Owner("t", "elsewhere", 1, 0.0, attempt, at, usage=Usage(5.0, 6.0, gpu_seconds))
    storage.write_json(spec.file("owner.json"), owner.to_json())


def test_without_a_word_from_the_driver_the_gpus_are_counted_while_it_runs(spec):
    times = replace(NEW, gpus=2.0)
    assert estimate_usage(spec, times, 500.0) == Usage()
    assert estimate_usage(spec, times.seen("RUNNING", 100.0), 500.0).gpu_seconds == 800.0


def test_a_failure_says_what_was_consumed(spec):
    times = replace(NEW, gpus=2.0).seen("RUNNING", 100.0)
    assert consumed(spec, times, None, 500.0) == "The run has used about 800 GPU-seconds."
    assert consumed(spec, times, None, 1900.0, 2.5) == "The run has used about 3600 GPU-seconds, which cost 2.50."
    failed = TrainingResult("FAILED", 2, spec.fingerprint, usage=Usage(5.0, 6.0, 7200.0))
    assert consumed(spec, times, failed, 1900.0, 2.5) == "The run has used 7200 GPU-seconds, which cost 5.00."
    assert "about 800" in consumed(spec, times, replace(failed, attempt=1), 500.0)
    assert consumed(spec, replace(times, gpus=0.0), None, 500.0, 2.5) == ""


def test_driver_of_an_earlier_attempt_told_of_what_came_before(spec):
    told(spec, 1000.0, at=90.0, attempt=1)
    times = replace(NEW, gpus=2.0).seen("RUNNING", 100.0)
    assert estimate_usage(spec, times, 500.0) == Usage(5.0, 6.0, 1800.0)


def test_since_its_last_word_the_driver_is_estimated(spec):
    told(spec, 1700.0, at=450.0)
    times = replace(NEW, gpus=2.0).seen("RUNNING", 100.0)
    assert estimate_usage(spec, times, 500.0) == Usage(5.0, 6.0, 1800.0)
    assert remaining(Limits(budget=Budget(0.5)), updated(spec, times), 500.0) == 0.0
    assert remaining(Limits(budget=Budget(0.6)), updated(spec, times), 500.0) == 180.0


def test_attempt_lost_between_two_words_of_its_driver_is_counted_once(spec):
    told(spec, 100.0, at=60.0)
    times = updated(spec, replace(NEW, gpus=2.0).seen("RUNNING", 10.0))
    times = times.next_attempt(110.0)
    assert times.gpu_seconds(110.0) == 200.0
    third = spec.with_attempt(3)
    told(spec, 180.0, at=100.0, attempt=2)
    assert updated(third, times).gpu_seconds(110.0) == 200.0
    begin_attempt(third, began=110.0, run_began=0.0)
    assert updated(third, times).gpu_seconds(110.0) == 200.0
    told(spec, 190.0, at=140.0, attempt=3)
    times = updated(third, times.seen("RUNNING", 130.0))
    assert times.gpu_seconds(140.0) == 210.0


def test_attempts_that_nobody_looked_into_before_they_ended_are_counted_once(spec):
    begin_attempt(spec, began=0.0)
    times = replace(NEW, gpus=2.0).seen("RUNNING", 10.0)
    told(spec, 180.0, at=100.0)
    third = spec.with_attempt(3)
    begin_attempt(third, began=120.0, run_began=0.0)
    times = times.next_attempt(110.0).seen("RUNNING", 130.0)
    told(spec, 220.0, at=150.0, attempt=3)
    assert updated(third, times).gpu_seconds(150.0) == 200.0 + 40.0
    assert estimate_usage(third, times, 160.0).gpu_seconds == 260.0


def test_driver_that_went_on_after_a_stay_in_the_queue_is_believed(spec):
    times = course(replace(NEW, gpus=2.0), ("RUNNING", 0), ("QUEUED", 100), ("PENDING", 5000), ("RUNNING", 6000))
    told(spec, 190.0 + 80.0, at=6040.0)
    assert updated(spec, times).gpu_seconds(6050.0) == 290.0


def test_without_the_count_before_the_attempt_nothing_counts_twice(spec):
    times = replace(NEW, gpus=2.0).seen("RUNNING", 0.0).next_attempt(100.0).seen("RUNNING", 100.0)
    told(spec, 190.0 + 80.0, at=140.0)
    assert updated(spec, times).gpu_seconds(150.0) == 290.0


def test_times_of_a_new_attempt_know_what_earlier_tries_have_consumed(spec):
    told(spec, 3000.0, at=90.0, attempt=1)
    times = times_of(spec, 2.0, 500.0)
    assert times == Times(500.0, 500.0, usage=Usage(5.0, 6.0, 3000.0), gpus=2.0)
    begin_attempt(spec, began=times.attempt_began, run_began=times.run_began)
    told(spec, 3100.0, at=560.0)
    running = times.seen("RUNNING", 505.0)
    assert remaining(Limits(budget=Budget(1.0)), running, 505.0) == 300.0
    assert remaining(Limits(budget=Budget(1.0)), updated(spec, running), 560.0) == 250.0


def test_times_of_an_adopted_attempt_are_those_it_began_with(spec):
    begin_attempt(spec, began=200.0, run_began=100.0)
    assert times_of(spec, 2.0, 900.0) == Times(100.0, 200.0, gpus=2.0)
    assert times_of(spec.with_attempt(3), 2.0, 900.0) == Times(900.0, 900.0, gpus=2.0)


def test_late_word_of_a_stay_that_was_estimated_is_not_added_to_it(spec):
    told(spec, 40.0, at=30.0)
    times = course(replace(NEW, gpus=2.0), ("RUNNING", 10), ("QUEUED", 110))
    assert updated(spec, times).gpu_seconds(500.0) == 200.0


def test_consumption_never_shrinks(spec):
    told(spec, 100.0, at=460.0)
    times = replace(NEW, gpus=2.0, usage=Usage(gpu_seconds=500.0), usage_at=450.0, running_since=100.0)
    assert updated(spec, times) == times


def test_progress_is_the_newest_file_beside_the_checkpoints(spec):
    import os

    assert updated(spec, NEW).last_progress is None
    uri = storage.write_json(storage.join(spec.run_dir, "checkpoint_manager_snapshot.json"), {})
    os.utime(uri, (7000.0, 7000.0))
    half = storage.write_bytes(storage.join(spec.run_dir, "checkpoint_9", "half-written"), b"x")
    os.utime(half, (9000.0, 9000.0))
    assert updated(spec, NEW).last_progress == 7000.0
    os.utime(uri, (6000.0, 6000.0))
    assert updated(spec, replace(NEW, last_progress=6500.0)).last_progress == 6500.0


def test_storage_that_is_away_changes_nothing_and_the_budget_runs_on(spec):
    told(spec, 1700.0, at=450.0)
    storage.write_bytes(spec.file("owner.json"), b"{")
    times = replace(NEW, gpus=2.0).seen("RUNNING", 100.0)
    assert updated(spec, times) == times
    assert estimate_usage(spec, times, 500.0).gpu_seconds == 800.0


# Input.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"budget": {"max_cost": 10}}, r"max_cost and no price_per_gpu_hour.*add what one GPU costs"),
        ({"budget": {}}, "budget is empty"),
        ({"budget": {"max_gpu_hours": 0}}, r"budget\['max_gpu_hours'\] is 0.0; expected a number above 0"),
        ({"budget": {"max_gpu_hours": float("nan")}}, "expected a number above 0"),
        ({"budget": {"max_gpu_hours": True}}, "expected a number above 0"),
        ({"budget": {"price_per_gpu_hour": -1}}, "expected a number above 0"),
        ({"budget": {"gpu_hours": 1}}, r"budget has no gpu_hours; it has max_gpu_hours, max_cost"),
        ({"budget": 5}, "budget is 5; expected a dict"),
        ({"total_timeout": 0}, r"total_timeout is 0.0; expected a number above 0, or None"),
        ({"startup_timeout": -5}, "startup_timeout is -5.0"),
        ({"stall_timeout": float("inf")}, "stall_timeout is inf"),
        ({"queue_timeout": "soon"}, r"queue_timeout is 'soon'; expected a number"),
        ({"attempt_timeout": []}, "attempt_timeout is"),
        ({"timeout": 5}, r"limits has no timeout; it has startup_timeout"),
    ],
)
def test_bad_limits_are_refused(value, message):
    with pytest.raises(InvalidInputError, match=message):
        Limits.from_mapping(value).validate()


def test_budget_of_gpu_hours_needs_gpus():
    limits = Limits(budget=Budget(max_gpu_hours=1.0))
    limits.validate(gpus=2.0)
    limits.validate()
    with pytest.raises(InvalidInputError, match="uses no GPU"):
        limits.validate(gpus=0.0)
    Limits(budget=Budget(price_per_gpu_hour=1.0)).validate(gpus=0.0)


def test_limits_from_what_a_dag_gives():
    value = {"total_timeout": "3600", "startup_timeout": timedelta(minutes=2), "queue_timeout": "None"}
    limits = Limits.from_mapping({**value, "budget": {"max_cost": "12.5", "price_per_gpu_hour": 2}})
    assert limits == Limits(startup_timeout=120.0, total_timeout=3600.0, budget=Budget(None, 12.5, 2.0))
    limits.validate()


def test_round_trips():
    limits = Limits(1.0, 2.0, 3.0, 4.0, 5.0, Budget(1.0, 2.0, 3.0))
    assert Limits.from_mapping(json.loads(json.dumps(limits.to_json()))) == limits
    assert Limits.from_mapping(json.loads(json.dumps(NONE.to_json()))) == NONE
    times = Times(1.0, 2.0, 3.0, 4.0, 5.0, Usage(1.0, 2.0, 3.0), 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0)
    assert Times.from_json(json.loads(json.dumps(times.to_json()))) == times
