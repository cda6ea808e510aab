from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime, timezone

import pytest

from airflow_mlops import storage
from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.training import fence
from airflow_mlops.training.fence import Fence, Owner, read_owner, this_host, wait_until_free
from airflow_mlops.training.result import TrainingResult, Usage, finite, outcome, read_result, write_result
from airflow_mlops.training.runs import (
    began_at,
    begin_attempt,
    committed_checkpoint,
    last_progress,
    open_run,
    told_before,
    wipe_run,
)
from airflow_mlops.training.spec import TrainingSpec


@pytest.fixture
def spec(tmp_path) -> TrainingSpec:
    return TrainingSpec("pkg.mod:loop", "xgboost", str(tmp_path / "runs"), "r1", config={"a": 1})


def succeed(spec: TrainingSpec) -> TrainingResult:
    result = TrainingResult("SUCCEEDED", spec.attempt, spec.fingerprint, usage=Usage(10.0, 20.0, 0.0))
    write_result(spec, result)
    return result


def test_new_run(spec):
    plan = open_run(spec)
    assert (plan.finished, plan.previous, plan.adoptable, plan.wipe) == (None, 0, False, None)


def test_finished_run_is_returned(spec):
    begin_attempt(spec)
    result = succeed(spec)
    assert open_run(spec).finished == result


def test_finished_run_is_trained_again_only_if_fresh_or_changed(spec):
    begin_attempt(spec)
    succeed(spec)
    assert "trained again" in open_run(spec, fresh=True).wipe
    assert open_run(replace(spec, config={"a": 2})).wipe
    assert open_run(replace(spec, num_workers=7)).finished


def test_what_an_earlier_try_of_the_task_has_trained_is_not_trained_again(spec):
    begin_attempt(spec)
    succeed(spec)
    assert open_run(spec, fresh=True, opened_by="task").wipe
    wipe_run(spec, "task")
    assert open_run(spec, fresh=True, opened_by="task").wipe is None
    begin_attempt(spec.with_attempt(2))
    result = succeed(spec.with_attempt(2))
    # Its worker was lost here: a retry returns the result, and only a cleared task trains again.
    plan = open_run(spec, fresh=True, opened_by="task")
    assert (plan.finished, plan.wipe) == (result, None)
    assert open_run(spec, fresh=True, opened_by="task cleared").wipe
    assert open_run(spec, fresh=True).wipe


def test_what_a_fresh_task_has_found_unfinished_and_finished_is_its_own(spec):
    assert open_run(spec, fresh=True, opened_by="first").wipe is None
    begin_attempt(spec)
    assert open_run(spec, fresh=True, opened_by="second").adoptable
    result = succeed(spec)
    assert open_run(spec, fresh=True, opened_by="second").finished == result
    assert open_run(spec, fresh=True, opened_by="first").wipe


def test_wiping_that_was_cut_short_is_done_again(spec, monkeypatch):
    begin_attempt(spec)
    succeed(spec)
    for name in ("a", "z"):
        storage.write_json(storage.join(spec.run_dir, name), {})
        storage.write_json(spec.file(name), {})
    from fsspec.implementations.local import LocalFileSystem

    remove, left = LocalFileSystem.rm, 4

    def interrupted(self, path, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        remove(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "rm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wipe_run(spec, "task")
    assert open_run(spec, fresh=True, opened_by="task").wipe
    assert not os.path.exists(spec.file("z")) and os.listdir(spec.run_dir) == ["_mlops"]


def test_unfinished_run_is_resumed_even_if_fresh(spec):
    begin_attempt(spec.with_attempt(3))
    for fresh in (False, True):
        plan = open_run(spec, fresh=fresh)
        assert (plan.previous, plan.adoptable, plan.wipe) == (3, True, None)


def test_unfinished_run_of_other_inputs_is_not_resumed(spec):
    begin_attempt(spec)
    plan = open_run(replace(spec, config={"a": 2}))
    assert plan.wipe and not plan.adoptable


def test_wiping_keeps_the_count_of_attempts_so_that_no_name_is_given_out_twice(spec):
    begin_attempt(spec.with_attempt(4))
    succeed(spec)
    storage.write_json(storage.join(spec.run_dir, "checkpoint_manager_snapshot.json"), {})
    os.makedirs(storage.join(spec.run_dir, "checkpoint_1"))
    wipe_run(spec)
    assert os.listdir(spec.run_dir) == ["_mlops"]
    assert os.listdir(spec.file()) == ["attempt.json"]
    assert open_run(spec).previous == 4
    wipe_run(replace(spec, run_key="never-used"))
    assert not os.path.exists(replace(spec, run_key="never-used").run_dir)


def test_damaged_files_are_named(spec):
    storage.write_bytes(spec.file("result.json"), b"{")
    with pytest.raises(InvalidInputError, match=r"result\.json is not a training result"):
        open_run(spec)
    storage.write_bytes(spec.file("result.json"), b"{}")
    with pytest.raises(InvalidInputError, match=r"result\.json is not a training result"):
        open_run(spec)
    storage.write_bytes(spec.file("opened.json"), b"[]")
    with pytest.raises(InvalidInputError, match=r"opened\.json is damaged"):
        open_run(spec, fresh=True, opened_by="task")


def test_storage_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    spec = TrainingSpec("pkg.mod:loop", "xgboost", str(tmp_path / "file"), "r1")
    with pytest.raises(ExternalSystemError, match=r"cannot write .*change the permissions"):
        begin_attempt(spec)


def test_committed_checkpoint_is_the_snapshots_not_the_newest(spec):
    assert committed_checkpoint(spec) is None
    uri = storage.join(spec.run_dir, "checkpoint_manager_snapshot.json")
    storage.write_json(uri, {"latest_checkpoint_result": {"checkpoint_dir_name": "checkpoint_1"}})
    os.makedirs(storage.join(spec.run_dir, "checkpoint_2"))
    with pytest.raises(InvalidInputError, match=r"checkpoint_1 .* is gone"):
        committed_checkpoint(spec)
    os.makedirs(storage.join(spec.run_dir, "checkpoint_1"))
    assert committed_checkpoint(spec) == storage.join(spec.run_dir, "checkpoint_1")
    storage.write_bytes(uri, b"half")
    with pytest.raises(InvalidInputError, match="is damaged"):
        committed_checkpoint(spec)


def test_result_round_trip_without_nan(spec):
    result = TrainingResult(
        "SUCCEEDED",
        1,
        "f",
        metrics={"auc": float("nan"), "n": 3, "deep": {"x": [float("inf"), 1.5]}},
        usage=Usage(1, 2, 3),
    )
    write_result(spec, result)
    text = storage.read_bytes(spec.file("result.json")).decode()
    assert "NaN" not in text and "Infinity" not in text
    back = read_result(spec)
    assert back.metrics == {"auc": None, "n": 3, "deep": {"x": [None, 1.5]}} and back.usage == Usage(1, 2, 3)


def test_finite_makes_plain_numbers():
    import numpy as np

    value = finite({"a": np.float64(0.5), "b": np.int64(2), "c": np.float32("nan"), 4: "x", "d": object})
    assert json.loads(json.dumps(value))["a"] == 0.5 and type(value["b"]) is int and value["c"] is None
    assert value["4"] == "x"


def test_outcome_is_small_plain_and_says_what_it_cost(spec):
    result = TrainingResult(
        "SUCCEEDED",
        3,
        "f",
        metrics={"auc": float("nan")},
        checkpoint_uri="c",
        model_uri="m",
        error="long",
        resumed_from="b",
        usage=Usage(10.0, 20.0, 5400.0),
        seconds={"train": 3.0},
    )
    expected = {
        "run_key": "r1",
        "run_dir": spec.run_dir,
        "status": "SUCCEEDED",
        "attempt": 3,
        "attempts": 3,
        "metrics": {"auc": None},
        "checkpoint_uri": "c",
        "model_uri": "m",
        "resumed_from": "b",
        "wall_seconds": 10.0,
        "cpu_seconds": 20.0,
        "gpu_seconds": 5400.0,
    }
    assert outcome(spec, result) == expected
    assert outcome(spec, replace(result, params={"depth": 4})) == {**expected, "params": {"depth": 4}}
    assert outcome(spec, result, price_per_gpu_hour=2.5) == {**expected, "cost": 3.75}
    assert json.loads(json.dumps(outcome(spec, result))) == expected


def test_adopted_attempt_keeps_its_clock(spec):
    assert began_at(spec) is None
    begin_attempt(spec, began=100.0)
    assert began_at(spec) == (100.0, 100.0)
    begin_attempt(spec.with_attempt(2), began=200.0, run_began=100.0)
    assert began_at(spec.with_attempt(2)) == (200.0, 100.0)
    assert began_at(spec) is None, "the first attempt is not the last one any more"
    begin_attempt(spec.with_attempt(3))
    assert began_at(spec.with_attempt(3)) is None


def test_what_had_been_told_when_an_attempt_began(spec):
    assert told_before(spec) is None
    begin_attempt(spec)
    assert told_before(spec) == 0.0
    dead = beat(spec)
    storage.write_json(spec.file("owner.json"), replace(dead, usage=Usage(5.0, 7.0, 90.0)).to_json())
    begin_attempt(spec.with_attempt(2))
    assert told_before(spec.with_attempt(2)) == 90.0 and told_before(spec) is None
    storage.write_bytes(spec.file("owner.json"), b"{")
    begin_attempt(spec.with_attempt(3))
    assert told_before(spec.with_attempt(3)) is None


def touched(uri: str, at: float) -> None:
    storage.write_bytes(uri, b"x")
    os.utime(uri, (at, at))


def test_progress_of_a_search_is_that_of_its_trials(spec):
    touched(storage.join(spec.run_dir, "trials", "t1", "checkpoint_manager_snapshot.json"), 300.0)
    touched(storage.join(spec.run_dir, "trials", "t1", "checkpoint_1", "half-written"), 900.0)
    touched(storage.join(spec.run_dir, "tune-a1", "experiment_state.json"), 900.0)
    touched(spec.file("owner.json"), 900.0)
    assert last_progress(spec) == 300.0
    touched(spec.file("trials", "t2.json"), 400.0)
    assert last_progress(spec) == 400.0


def test_progress_is_seen_in_other_storages_too(spec):
    import fsspec

    remote = replace(spec, storage_path="memory://test-progress")
    before = time.time()
    assert last_progress(remote) is None
    storage.write_json(storage.join(remote.run_dir, "checkpoint_manager_snapshot.json"), {})
    assert before - 1 <= last_progress(remote) <= time.time() + 1
    fsspec.filesystem("memory").rm("/test-progress", recursive=True)


@pytest.mark.parametrize(
    ("entry", "at"),
    [
        ({"mtime": 5.0}, 5.0),
        ({"LastModified": datetime(1970, 1, 1, 0, 0, 5, tzinfo=timezone.utc)}, 5.0),
        ({"last_modified": datetime(1970, 1, 1, 0, 0, 5)}, 5.0),
        ({"updated": "1970-01-01T00:00:05.000Z"}, 5.0),
        ({"size": 5}, None),
        ({"mtime": None}, None),
    ],
)
def test_time_of_a_file_by_each_storages_name_for_it(spec, monkeypatch, entry, at):
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.setattr(LocalFileSystem, "ls", lambda self, path, detail: [{"name": "n", "type": "file", **entry}])
    if at is not None:
        assert last_progress(spec) == at
        return
    with pytest.raises(InvalidInputError, match=r"does not say when n was written.*set stall_timeout to None"):
        last_progress(spec)


def beat(spec: TrainingSpec, **changes) -> Owner:
    values = {"token": "t", "host": "elsewhere", "pid": 1, "started": 0.0, "attempt": 1, "heartbeat": 1000.0} | changes
    owner = Owner(**values)
    storage.write_json(spec.file("owner.json"), owner.to_json())
    return owner


def test_owner_elsewhere_is_alive_while_its_heart_beats(spec):
    owner = beat(spec)
    assert read_owner(spec) == owner
    assert owner.alive(1000.0 + fence.STALE_AFTER - 1)
    assert not owner.alive(1000.0 + fence.STALE_AFTER)
    assert not replace(owner, released=True).alive(1000.0)


def test_owner_here_is_alive_while_its_process_is_however_old_the_heartbeat(spec):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        owner = beat(spec, host=this_host(), pid=child.pid, started=fence.start_time(child.pid), heartbeat=0.0)
        assert owner.alive(time.time())
        assert not replace(owner, started=owner.started - 100).alive(time.time()), "another process of that id"
    finally:
        child.kill()
    # Not reaped yet: a zombie writes nothing any more.
    deadline = time.monotonic() + 5
    while owner.alive(time.time()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not owner.alive(time.time())
    child.wait()


def test_waiting_for_an_owner_that_goes_and_for_one_that_does_not(spec):
    beat(spec)
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    assert wait_until_free(spec, 90.0, lambda: now[0], sleep).token == "t"
    assert now[0] == pytest.approx(1000.0 + fence.STALE_AFTER, abs=1)
    now[0] = 1000.0
    with pytest.raises(ConcurrentChangeError, match=r"attempt 1\) works in .*another run_key"):
        wait_until_free(spec, 10.0, lambda: now[0], sleep)


def test_second_driver_on_a_run_directory_is_refused_and_the_first_goes_on(spec):
    with Fence(spec, Usage, on_lost=pytest.fail):
        with pytest.raises(ConcurrentChangeError):
            Fence(spec, Usage, on_lost=pytest.fail).__enter__()
    assert read_owner(spec).released
    with Fence(spec, Usage, on_lost=pytest.fail):
        pass


def test_of_many_drivers_at_once_one_gets_the_directory(spec):
    entered, refused, gate = [], [], threading.Barrier(6)

    def contend() -> None:
        candidate = Fence(spec, Usage, on_lost=lambda: None)
        gate.wait()
        try:
            candidate.__enter__()
            entered.append(candidate)
        except ConcurrentChangeError:
            refused.append(candidate)

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 5)
    entered[0].__exit__()


def test_usage_adds_up_over_attempts_even_if_one_never_said_goodbye(spec, monkeypatch):
    monkeypatch.setattr(fence, "HEARTBEAT", 0.02)
    dead = beat(spec, heartbeat=0.0)
    storage.write_json(spec.file("owner.json"), replace(dead, usage=Usage(5.0, 7.0, 1.0)).to_json())
    with Fence(spec, lambda: Usage(1.0, 2.0, 0.5), on_lost=pytest.fail) as held:
        assert held.usage == Usage(6.0, 9.0, 1.5)
        time.sleep(0.1)
    assert read_owner(spec).usage == Usage(6.0, 9.0, 1.5)


def test_driver_whose_directory_was_taken_is_told(spec, monkeypatch):
    monkeypatch.setattr(fence, "HEARTBEAT", 0.02)
    lost = threading.Event()
    with Fence(spec, Usage, on_lost=lost.set):
        beat(spec, token="thief", heartbeat=time.time())
        assert lost.wait(5)
    assert read_owner(spec).token == "thief" and not read_owner(spec).released
