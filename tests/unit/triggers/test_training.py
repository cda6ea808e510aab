"""What the triggers of a training share: limits, the end in the triggerer, logs that go on where they were left."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
from airflow.sdk import DAG, BaseOperator

from airflow_mlops import storage
from airflow_mlops.training.decide import Observation
from airflow_mlops.training.fence import Owner
from airflow_mlops.training.limits import Budget, Limits, Times
from airflow_mlops.training.result import TrainingResult, Usage, outcome, write_result
from airflow_mlops.training.spec import TrainingSpec
from airflow_mlops.triggers import _training
from airflow_mlops.triggers._training import LimitWatch, LogRelay, Training, ends_in_triggerer

NOW = 1_000_000.0


@pytest.fixture
def spec(tmp_path) -> TrainingSpec:
    return TrainingSpec("pkg.mod:loop", "torch", str(tmp_path), "r1", attempt=2)


def owned(spec: TrainingSpec, attempt: int, started: float, heartbeat: float, gpu_seconds: float = 0.0) -> None:
    owner = Owner("t", "elsewhere", 1, started, attempt, heartbeat, usage=Usage(gpu_seconds=gpu_seconds))
    storage.write_json(spec.file("owner.json"), owner.to_json())


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def watch(spec: TrainingSpec, clock: Clock, gpus: float = 0.0, **limits) -> LimitWatch:
    return LimitWatch(spec, Limits(**limits), Times(run_began=NOW, attempt_began=NOW, gpus=gpus), clock)


@pytest.mark.parametrize("ask", [LimitWatch.check, lambda w, status: asyncio.run(w.acheck(status))])
def test_storage_is_asked_only_when_a_limit_may_be_broken(spec, monkeypatch, ask):
    clock, reads = Clock(), []
    look = _training.updated
    monkeypatch.setattr(_training, "updated", lambda *args: reads.append(clock.now) or look(*args))
    limits = watch(spec, clock, gpus=2, budget=Budget(max_gpu_hours=1), attempt_timeout=10_000)
    found = None
    while found is None:
        clock.now += 10
        # Half of the time went without GPUs, as the driver tells.
        owned(spec, 2, NOW, clock.now, gpu_seconds=clock.now - NOW)
        found = ask(limits, "RUNNING")
    assert found.kind == "budget" and clock.now == NOW + 3600
    assert len(reads) <= 12, "it halves the distance each time"


def test_startup_is_over_when_the_job_runs(spec):
    clock = Clock()
    limits = watch(spec, clock, startup_timeout=100)
    clock.now += 99
    assert limits.check("PENDING") is None and limits.check("RUNNING") is None
    clock.now += 1000
    assert limits.check("RUNNING") is None and limits.check(None) is None
    late = watch(spec, clock, startup_timeout=100)
    assert late.check("PENDING").kind == "startup"


def test_restarted_triggerer_knows_since_when_the_driver_has_run(spec):
    clock = Clock()
    owned(spec, 2, NOW + 5, NOW + 500)
    clock.now += 500
    limits = watch(spec, clock, stall_timeout=400)
    assert limits.check("RUNNING").kind == "stall" and limits.times.running_since == NOW + 5
    owned(spec, 1, NOW - 900, NOW - 800)
    limits = watch(spec, clock, stall_timeout=400)
    assert limits.check("RUNNING") is None, "an earlier attempt's driver is not meant"


def test_progress_holds_off_a_stall(spec, tmp_path):
    limits = LimitWatch(spec, Limits(stall_timeout=50), Times(time.time() - 200, time.time() - 200, running_since=1.0))
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "checkpoint_manager_snapshot.json").write_text("{}")
    assert limits.check("RUNNING") is None


def training(spec: TrainingSpec, **changes) -> Training:
    values = {"finish_in_triggerer": True, "limits": Limits(budget=Budget(price_per_gpu_hour=3.6)).to_json()}
    return Training({"spec": spec.to_json(), "adopted": False, "more": 1}, **{**values, **changes})


def finished(spec: TrainingSpec, **changes) -> TrainingResult:
    values = {"status": "SUCCEEDED", "attempt": spec.attempt, "fingerprint": spec.fingerprint}
    result = TrainingResult(**{**values, "metrics": {"auc": 0.7}, "usage": Usage(gpu_seconds=1000.0), **changes})
    write_result(spec, result)
    return result


@pytest.mark.parametrize("status", ["SUCCEEDED", "LOST", "STOPPED", "UNREACHABLE", "FAILED"])
def test_success_ends_in_the_triggerer_with_all_its_xcoms(spec, status):
    result = finished(spec)
    event = asyncio.run(training(spec).over(Observation(status)))
    value = outcome(spec, result, price_per_gpu_hour=3.6)
    assert value["cost"] == 1.0
    assert event.task_instance_state == "success" and event.xcoms == {**value, "return_value": value}
    event = asyncio.run(training(spec, multiple_outputs=False).over(Observation(status)))
    assert event.xcoms == {"return_value": value}


class Instance:
    """What a trigger knows of its task instance."""

    dag_id, task_id, run_id, map_index = "d", "t", "r", 3


class Comms:
    """The triggerer behind a trigger, which stores XComs for it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.stored = error, {}

    async def asend(self, message) -> None:
        if self.error:
            raise self.error
        assert (message.dag_id, message.task_id, message.run_id, message.map_index) == ("d", "t", "r", 3)
        self.stored[message.key] = message.value


def test_triggerer_stores_the_xcoms_and_its_event_has_none(spec, monkeypatch):
    """Those of an event would be stored as text of JSON, which the next task would take for text."""
    result, comms = finished(spec), Comms()
    monkeypatch.setattr("airflow.sdk.execution_time.task_runner.SUPERVISOR_COMMS", comms, raising=False)
    event = asyncio.run(training(spec, task=Instance()).over(Observation("SUCCEEDED")))
    value = outcome(spec, result, price_per_gpu_hour=3.6)
    assert event.task_instance_state == "success" and not event.xcoms
    assert comms.stored == {**value, "return_value": value}
    # dag.test() looks at this only.
    assert event.payload["seen"]["status"] == "SUCCEEDED" and event.payload["state"]["more"] == 1


def test_xcoms_that_the_triggerer_cannot_store_are_left_to_a_worker(spec, monkeypatch):
    finished(spec)
    comms = Comms(RuntimeError("the API server is away"))
    monkeypatch.setattr("airflow.sdk.execution_time.task_runner.SUPERVISOR_COMMS", comms, raising=False)
    event = asyncio.run(training(spec, task=Instance()).over(Observation("SUCCEEDED")))
    assert not hasattr(event, "task_instance_state") and event.payload["seen"]["status"] == "SUCCEEDED"


@pytest.mark.parametrize(
    "changes", [{"attempt": 1}, {"status": "FAILED", "exit_class": "app"}, None], ids=["earlier", "failed", "none"]
)
def test_what_is_no_success_goes_to_a_worker(spec, changes):
    if changes is not None:
        finished(spec, **changes)
    event = asyncio.run(training(spec).over(Observation("FAILED", 1, "exit")))
    assert event.payload == {
        "seen": {"status": "FAILED", "exit_code": 1, "message": "exit"},
        "state": {"spec": spec.to_json(), "adopted": False, "more": 1},
    }


def test_result_that_cannot_be_read_goes_to_a_worker(spec):
    storage.write_bytes(spec.file("result.json"), b"{")
    assert asyncio.run(training(spec).over(Observation("SUCCEEDED"))).payload["seen"]["status"] == "SUCCEEDED"


def test_success_goes_to_a_worker_if_it_has_more_to_do(spec):
    finished(spec)
    event = asyncio.run(training(spec, finish_in_triggerer=False).over(Observation("SUCCEEDED")))
    assert event.payload["seen"]["status"] == "SUCCEEDED"


def test_times_travel_with_the_event(spec):
    times = Times(NOW, NOW)
    waiting = training(spec, limits=Limits(attempt_timeout=1e10).to_json(), times=times.to_json())

    async def wait():
        assert await waiting.breach("RUNNING") is None
        return waiting.event(timed_out=True)

    told = Times.from_json(asyncio.run(wait()).payload["times"])
    assert told.running_since is not None and told.attempt_began == NOW


class Task(BaseOperator):
    pass


class Posting(BaseOperator):
    def post_execute(self, context, result=None):
        pass


def test_only_a_task_with_nothing_else_to_do_ends_in_the_triggerer(monkeypatch):
    from airflow.sdk import Asset
    from airflow.sdk.execution_time import xcom
    from airflow.sdk.listener import get_listener_manager

    class Backend(xcom.BaseXCom):
        pass

    listeners = get_listener_manager()
    monkeypatch.setattr(type(listeners), "has_listeners", property(lambda self: False))
    assert ends_in_triggerer(Task(task_id="t"))
    assert not ends_in_triggerer(Task(task_id="t", outlets=[Asset("s3://models/m")]))
    assert not ends_in_triggerer(Task(task_id="t", on_success_callback=lambda context: None))
    assert not ends_in_triggerer(Task(task_id="t", do_xcom_push=False))
    assert not ends_in_triggerer(Task(task_id="t", post_execute=lambda context, result: None))
    assert not ends_in_triggerer(Posting(task_id="t"))
    assert ends_in_triggerer(Task(task_id="t", on_failure_callback=lambda context: None))
    with DAG("d", schedule=None):
        mapped_over, read = Task(task_id="t"), Task(task_id="u")
        Task.partial(task_id="v").expand_kwargs(mapped_over.output)
        read >> Task(task_id="w")
    assert not ends_in_triggerer(mapped_over) and ends_in_triggerer(read)
    result = Task(task_id="t")
    result.returns_dag_result = True
    assert not ends_in_triggerer(result)
    with monkeypatch.context() as patch:
        patch.setattr(xcom, "XCom", Backend)
        assert not ends_in_triggerer(Task(task_id="t"))
    monkeypatch.setattr(type(listeners), "has_listeners", property(lambda self: True))
    assert not ends_in_triggerer(Task(task_id="t"))


LINES = [f"line {number}" for number in range(400)]


def source(place, pause: float = 0.0, until: int = len(LINES)):
    async def lines():
        for number in range(place or 0, until):
            if pause:
                await asyncio.sleep(pause)
            yield number + 1, LINES[number]
        await asyncio.sleep(0 if until == len(LINES) else 60)

    return lines()


def test_log_goes_on_where_its_follower_was_told_to_end(spec):
    """Cancelled at any moment, as by a triggerer that is shut down, nothing is lost and nothing repeated."""
    shown, draw = [], random.Random(3)

    async def some(seconds: float) -> bool:
        following = asyncio.create_task(
            LogRelay(spec, shown.append, every=0.01).follow(lambda place: source(place, pause=0.001))
        )
        done, _ = await asyncio.wait({following}, timeout=seconds)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        return bool(done)

    rounds = 0
    while not asyncio.run(some(draw.uniform(0.0, 0.08))):
        rounds += 1
        assert rounds < 500
    assert shown == LINES and rounds > 3


def test_follower_that_is_told_to_end_leaves_when_it_has_noted_its_place(spec, monkeypatch):
    shown: list[str] = []
    note = LogRelay._note

    def slowly(self, place) -> None:
        time.sleep(0.3)
        note(self, place)

    monkeypatch.setattr(LogRelay, "_note", slowly)

    async def end_in_between() -> int:
        relay = LogRelay(spec, shown.append, every=0.01)
        following = asyncio.create_task(relay.follow(lambda place: source(place, until=50)))
        while not shown:
            await asyncio.sleep(0.005)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        return storage.read_json(spec.file("log-offset-a2.json"))["place"]

    assert asyncio.run(end_in_between()) == len(shown) == 50


def test_log_of_a_killed_follower_is_repeated_by_one_batch_at_most(spec):
    shown: list[str] = []

    class Killed(BaseException):
        pass

    def die_once(line: str) -> None:
        shown.append(line)
        if line == LINES[250]:
            raise Killed

    async def follow(emit) -> None:
        await LogRelay(spec, emit, every=0.01).follow(lambda place: source(place, pause=0.001))

    # The process ends without another word: nothing is noted after the line.
    original = _training.LogRelay._note

    def note(self, place):
        if LINES[250] not in shown:
            original(self, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training.LogRelay, "_note", note)
        with pytest.raises(Killed):
            asyncio.run(follow(die_once))
    before = len(shown)
    asyncio.run(follow(shown.append))
    repeated = [line for line in shown[before:] if line in shown[:before]]
    assert set(shown) == set(LINES) and 0 < len(repeated) < 60


def test_nothing_reads_any_more_when_the_follower_has_ended(spec):
    """Whoever followed closes the connection next."""
    closed = []

    async def slow_to_close():
        try:
            yield 1, "one"
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            closed.append(True)

    async def follow() -> None:
        following = asyncio.create_task(LogRelay(spec, lambda line: None, every=0.01).follow(lambda _: slow_to_close()))
        await asyncio.sleep(0.1)
        following.cancel()
        await asyncio.wait({following})
        assert closed

    asyncio.run(follow())


def test_log_is_noted_once_per_interval(spec, monkeypatch):
    writes = []
    write = storage.write_json
    monkeypatch.setattr(storage, "write_json", lambda uri, value: writes.append(value) or write(uri, value))
    asyncio.run(LogRelay(spec, lambda line: None, every=0.2).follow(lambda place: source(place, pause=0.002)))
    assert writes[-1] == {"place": 400} and 3 <= len(writes) <= 12


def test_log_in_bulk_is_passed_on_before_its_time(spec, monkeypatch):
    monkeypatch.setattr(_training, "BATCH", 100)
    shown: list[str] = []

    async def follow() -> None:
        relay = LogRelay(spec, shown.append, every=60.0)
        following = asyncio.create_task(relay.follow(lambda place: source(place, until=350)))
        while len(shown) < 300:
            await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(asyncio.wait_for(follow(), 20))
    assert shown == LINES[: len(shown)] and 300 <= len(shown) <= 350


def test_damaged_note_shows_the_log_from_its_start(spec):
    storage.write_bytes(spec.file("log-offset-a2.json"), b"[")
    shown: list[str] = []
    asyncio.run(LogRelay(spec, shown.append, every=0.01).follow(source))
    assert shown == LINES


def test_error_of_the_source_is_raised_after_its_lines(spec):
    shown: list[str] = []

    async def broken():
        yield 1, "one"
        raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"):
        asyncio.run(LogRelay(spec, shown.append, every=0.01).follow(lambda place: broken()))
    assert shown == ["one"]


def test_loop_stays_free_while_a_slow_store_is_read(spec, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(_training, "read_result", lambda spec: free.wait(10) and None)

    async def wait() -> None:
        over = asyncio.create_task(training(spec).over(Observation("SUCCEEDED")))
        await asyncio.sleep(0.05)
        free.set()
        await over

    asyncio.run(asyncio.wait_for(wait(), 5))
