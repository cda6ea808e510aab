"""The triggers: serialisation, an event loop that stays free, and a cursor that neither repeats nor loses."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from airflow.serialization.encoders import encode_trigger

from airflow_mlops import storage
from airflow_mlops.triggers import drift
from airflow_mlops.triggers.drift import DataReadyTrigger, DriftEventTrigger, data_ready


class Store:
    """The two calls of Airflow's asset state store, over a dictionary that outlives a triggerer."""

    def __init__(self, content):
        self.content = content

    async def aget(self, key, default=None):
        return json.loads(self.content[key]) if key in self.content else default

    async def aset(self, key, value):
        self.content[key] = json.dumps(value)


class TwoAssets:
    async def aget(self, key, default=None):
        raise ValueError("Task has 2 concrete inlets and outlets")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(drift, "_FLUSH_SECONDS", 0.01)


def report(folder, month, *, retrain=True, verdict="harm", model="flights_delay", note=""):
    uri = f"{folder}/{model}-2013{month:02}.drift.json"
    window = {"start": f"2013-{month:02}-01T00:00:00+00:00", "end": f"2013-{month + 1:02}-01T00:00:00+00:00"}
    value = {"retrain": retrain, "verdict": verdict, "window": window, "model": {"name": model}, "note": note}
    return storage.write_json(uri, value)


def fresh(folder, content=None, **kwargs):
    classpath, arguments = DriftEventTrigger(str(folder), poll_interval=0.02, **kwargs).serialize()
    assert classpath == "airflow_mlops.triggers.drift.DriftEventTrigger"
    trigger = DriftEventTrigger(**arguments)
    trigger.asset_state_store = None if content is None else Store(content)
    return trigger


async def events(trigger, seconds=0.4, meanwhile=None):
    """What the trigger fires in ``seconds``, then it is stopped as a triggerer stops it."""
    found = []

    async def consume():
        async for event in trigger.run():
            found.append(event.payload)

    task = asyncio.create_task(consume())
    await asyncio.sleep(seconds / 2)
    if meanwhile:
        meanwhile()
    await asyncio.sleep(seconds / 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return found


@pytest.mark.parametrize(
    "trigger",
    [
        DataReadyTrigger("s3://bucket/x", poll_interval=2.0, delay=1.0),
        DriftEventTrigger("/reports", model_name="m", poll_interval=3.0, name="watch"),
    ],
)
def test_a_trigger_survives_serialisation(trigger):
    classpath, kwargs = trigger.serialize()
    assert classpath == f"airflow_mlops.triggers.drift.{type(trigger).__name__}"
    assert json.loads(json.dumps(kwargs)) == kwargs == {key: getattr(trigger, key) for key in kwargs}
    assert type(trigger)(**kwargs).serialize() == (classpath, kwargs)
    encode_trigger(trigger)


def test_a_name_keeps_equal_watchers_apart():
    one, two = (DriftEventTrigger("/reports", name=name).serialize() for name in ("a", "b"))
    assert DriftEventTrigger.hash(*one) != DriftEventTrigger.hash(*two)


async def test_a_new_report_that_asks_for_retraining_fires_once(tmp_path):
    report(tmp_path, 1)
    paths = []

    def write():
        paths.append(report(tmp_path / "deep", 4))
        report(tmp_path, 5, retrain=False, verdict="stable")
        (tmp_path / "foreign.drift.json").write_text("{torn")
        (tmp_path / "list.drift.json").write_text("[]")
        report(tmp_path / "text", 6, retrain="false")
        (tmp_path / "other.json").write_text('{"retrain": true}')

    found = await events(fresh(tmp_path, {}), meanwhile=write)
    assert found == [
        {
            "window": {"start": "2013-04-01T00:00:00+00:00", "end": "2013-05-01T00:00:00+00:00"},
            "verdict": "harm",
            "report_uri": paths[0],
            "model": "flights_delay",
        }
    ]
    assert storage.read_json(found[0]["report_uri"])["retrain"] is True


async def test_a_restart_neither_repeats_nor_loses(tmp_path):
    content: dict = {}
    first = await events(fresh(tmp_path, content), meanwhile=lambda: report(tmp_path, 4))
    report(tmp_path / "a", 6)
    report(tmp_path / "b", 5)  # both while the triggerer is down
    second = await events(fresh(tmp_path, content))
    third = await events(fresh(tmp_path, content))
    months = [[payload["window"]["start"][5:7] for payload in found] for found in (first, second, third)]
    assert months == [["04"], ["05", "06"], []]


async def test_a_crash_before_the_cursor_is_saved_repeats_and_does_not_lose(tmp_path, monkeypatch):
    content: dict = {}
    await events(fresh(tmp_path, content), 0.1)
    report(tmp_path, 4)
    monkeypatch.setattr(drift, "_FLUSH_SECONDS", 60)
    assert len(await events(fresh(tmp_path, content))) == 1
    assert len(await events(fresh(tmp_path, content))) == 1


async def test_the_same_report_again_is_silent_and_a_changed_one_fires(tmp_path):
    content: dict = {}
    await events(fresh(tmp_path, content), meanwhile=lambda: report(tmp_path, 4))
    assert await events(fresh(tmp_path, content), meanwhile=lambda: report(tmp_path, 4)) == []
    assert len(await events(fresh(tmp_path, content), meanwhile=lambda: report(tmp_path, 4, note="again"))) == 1


async def test_a_verdict_that_turned_stable_and_back_fires_again(tmp_path):
    content: dict = {}
    await events(fresh(tmp_path, content), meanwhile=lambda: report(tmp_path, 4))
    assert await events(fresh(tmp_path, content), meanwhile=lambda: report(tmp_path, 4, retrain=False)) == []
    assert len(await events(fresh(tmp_path, content), meanwhile=lambda: report(tmp_path, 4))) == 1


@pytest.mark.parametrize("store", [None, TwoAssets()])
async def test_without_a_store_only_what_comes_from_now_on_fires(tmp_path, store):
    report(tmp_path, 1)
    trigger = fresh(tmp_path)
    trigger.asset_state_store = store
    assert len(await events(trigger, meanwhile=lambda: report(tmp_path, 4))) == 1


async def test_only_the_model_asked_for(tmp_path):
    def write():
        report(tmp_path, 4, model="other")
        report(tmp_path, 5)

    found = await events(fresh(tmp_path, {}, model_name="flights_delay"), meanwhile=write)
    assert [payload["model"] for payload in found] == ["flights_delay"]


async def test_a_folder_that_does_not_exist_yet_is_waited_for(tmp_path):
    found = await events(fresh(tmp_path / "later", {}), meanwhile=lambda: report(tmp_path / "later", 4))
    assert len(found) == 1


async def test_reports_in_an_object_store(tmp_path):
    folder = f"memory://reports-{tmp_path.name}"
    found = await events(fresh(folder, {}), meanwhile=lambda: report(folder, 4))
    assert len(found) == 1 and storage.read_json(found[0]["report_uri"])["verdict"] == "harm"


async def test_the_cursor_forgets_deleted_reports_and_the_trigger_keeps_no_state(tmp_path):
    content: dict = {}
    trigger = fresh(tmp_path, content)
    before = trigger.serialize()
    uri = report(tmp_path, 4)
    await events(trigger, 0.1)
    (tmp_path / uri.rsplit("/")[-1]).unlink()
    await events(fresh(tmp_path, content), meanwhile=lambda: report(tmp_path, 5))
    assert list(json.loads(content["mlops_drift_reports"])) == ["flights_delay-201305.drift.json"]
    assert trigger.serialize() == before


@pytest.mark.parametrize("kind", ["data", "reports"])
async def test_slow_storage_does_not_block_the_loop(tmp_path, monkeypatch, kind):
    """Storage that answers only once the loop has gone on: one that waits for it gets no answer."""
    loop_goes_on = threading.Event()
    answered = []

    def slow(*args):
        answered.append(loop_goes_on.wait(5))
        return {} if kind == "reports" else False

    monkeypatch.setattr(drift, "_reports" if kind == "reports" else "data_ready", slow)
    trigger = fresh(tmp_path) if kind == "reports" else DataReadyTrigger("x", 0.01)
    task = asyncio.create_task(anext(trigger.run()))
    await asyncio.sleep(0.05)
    loop_goes_on.set()
    while not answered:
        await asyncio.sleep(0.01)
    task.cancel()
    assert answered[0]


async def test_the_wait_for_data_ends_when_they_come(tmp_path):
    path = tmp_path / "set"
    task = asyncio.create_task(anext(DataReadyTrigger(str(path), 0.02).run()))
    await asyncio.sleep(0.05)
    path.mkdir()
    await asyncio.sleep(0.1)
    assert not task.done()
    (path / "a.parquet").write_bytes(b"x")
    event = await asyncio.wait_for(task, 5)
    assert event.payload == {"status": "ready", "uri": str(path)}


async def test_the_first_look_can_wait(tmp_path):
    """Data that were there already have been looked at."""
    (tmp_path / "month.parquet").write_bytes(b"")
    trigger = DataReadyTrigger(str(tmp_path / "month.parquet"), poll_interval=0.01, delay=60)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(anext(trigger.run()), 0.3)


async def test_an_unreachable_place_is_tried_again(monkeypatch):
    answers = [OSError("down"), PermissionError("denied"), True]

    def look(uri):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(drift, "data_ready", look)
    event = await asyncio.wait_for(anext(DataReadyTrigger("s3://b/x", 0.01).run()), 5)
    assert event.payload["status"] == "ready" and answers == []


def test_data_are_ready_as_file_folder_and_glob(tmp_path):
    assert not data_ready(str(tmp_path)) and not data_ready(f"{tmp_path}/*.parquet")
    (tmp_path / "note.txt").write_text("x")
    assert not data_ready(str(tmp_path))
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "part.parquet").write_bytes(b"x")
    (tmp_path / ".a.parquet").write_bytes(b"x")
    assert not data_ready(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "days").mkdir()
    (tmp_path / "days" / "a.CSV").write_bytes(b"x")
    assert data_ready(f"{tmp_path}/days")
    for uri in (str(tmp_path), f"{tmp_path}/*.parquet", f"{tmp_path}/a.parquet", f"file://{tmp_path}"):
        assert data_ready(uri)
