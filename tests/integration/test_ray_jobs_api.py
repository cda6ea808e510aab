"""The Jobs API of a real Ray: what the hook and the trigger rely on, and the stand-in of the unit tests copies."""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from airflow_mlops.hooks.ray import AccessRefusedError, Endpoint, RayJobsHook
from airflow_mlops.training.limits import Limits, Times
from airflow_mlops.training.spec import TrainingSpec
from airflow_mlops.triggers.ray import RayJobTrigger

pytestmark = pytest.mark.ray

TALK = """
import sys, time
for number in range(150):
    print(f"line {number}: größer than {'x' * (number % 40)}", flush=True)
    time.sleep(0.03)
sys.stdout.write("the end")
"""
EXPECTED = [f"line {number}: größer than {'x' * (number % 40)}" for number in range(150)] + ["the end"]

SAVE_SLOWLY = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(5)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(300)
"""


@pytest.fixture
def hook(ray_cluster, monkeypatch) -> RayJobsHook:
    connection = {"conn_type": "ray", "host": ray_cluster.dashboard_url, "password": ray_cluster.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    return RayJobsHook()


def submit(hook: RayJobsHook, tmp_path, script: str, *arguments: str, **environment: str) -> str:
    file = tmp_path / "script.py"
    file.write_text(script)
    name = f"t-{uuid.uuid4().hex[:10]}"
    command = shlex.join([sys.executable, str(file), *arguments])
    assert hook.submit(name, f"exec {command}", runtime_env={"env_vars": {"PYTHONUTF8": "1", **environment}}) is True
    return name


def wait_until(hook: RayJobsHook, name: str, condition, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not condition(job := hook.look(name)):
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    return job


@asynccontextmanager
async def cutting(dashboard: str, cuts: list[int]) -> AsyncIterator[str]:
    """A relay to the dashboard that breaks log sockets after so many bytes."""
    target = urlsplit(dashboard)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(target.hostname, target.port)
        first = await reader.read(65536)
        forth.write(first)
        budget = cuts.pop(0) if b"/logs/tail" in first and cuts else None

        async def onward() -> None:
            while data := await reader.read(65536):
                forth.write(data)

        going = asyncio.create_task(onward())
        while data := await back.read(200):
            writer.write(data)
            budget = None if budget is None else budget - len(data)
            if budget is not None and budget <= 0:
                break
        going.cancel()
        for end in (writer, forth):
            end.transport.abort()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_log_is_whole_over_broken_sockets(hook, tmp_path):
    name, draw = submit(hook, tmp_path, TALK), random.Random(2)
    cuts = [draw.randrange(300, 6000) for _ in range(6)]
    token = hook.endpoint.token

    async def follow() -> list[tuple[int, str]]:
        async with cutting(hook.endpoint.address, cuts) as address:
            endpoint = Endpoint(address, token, True, "")
            async with RayJobsHook(endpoint=endpoint) as behind:
                return [entry async for entry in behind.alog_lines(name)]

    found = asyncio.run(asyncio.wait_for(follow(), 120))
    said = [line for _, line in found if line.startswith("line ") or line == "the end"]
    assert said == EXPECTED and len(cuts) < 6
    assert found[-1][0] == len(hook.logs(name).encode())

    async def rest() -> list[tuple[int, str]]:
        return [entry async for entry in hook.alog_lines(name, found[99][0])]

    assert asyncio.run(rest()) == found[100:]


def test_jobs_are_adopted_listed_and_known_by_their_times(hook, tmp_path):
    began = time.time()
    name = submit(hook, tmp_path, "print('hello')")
    assert hook.submit(name, "true") is False
    job = wait_until(hook, name, lambda job: job.over)
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0) and began - 2 < job.submitted < job.ended
    assert hook.list_jobs()[name] == asyncio.run(hook.alist_jobs())[name] == job
    assert hook.look("nobody").status == "LOST" and hook.logs("nobody") == ""
    assert asyncio.run(anext(hook.alog_lines("nobody"), None)) is None
    hook.stop(name)
    hook.stop("nobody")


@pytest.mark.parametrize(("token", "words"), [(None, "wants a token"), ("wrong", "refuses the token")])
def test_tokens_are_asked_for(hook, token, words):
    stranger = RayJobsHook(endpoint=Endpoint(hook.endpoint.address, token, True, ""))
    with pytest.raises(AccessRefusedError, match=words):
        stranger.list_jobs()
    with pytest.raises(AccessRefusedError, match=words):
        asyncio.run(anext(stranger.alog_lines("any"), None))


def test_job_stopped_for_a_limit_has_time_to_save(hook, tmp_path):
    """Ray would kill it after 3 s; it takes 5 s."""
    saved = tmp_path / "saved"
    name = submit(hook, tmp_path, SAVE_SLOWLY, str(saved), RAY_JOB_STOP_WAIT_TIME_S="20")
    wait_until(hook, name, lambda job: "ready" in hook.logs(name))
    spec, now = TrainingSpec("pkg.mod:loop", "torch", str(tmp_path), "r1"), time.time()
    trigger = RayJobTrigger(
        submission_id=name,
        ray_conn_id="ray_default",
        address=None,
        poll_interval=0.5,
        unreachable_timeout=60.0,
        cancel_on_kill=True,
        state={"spec": spec.to_json()},
        limits=Limits(attempt_timeout=1.0).to_json(),
        times=Times(now, now).to_json(),
        stop_timeout=20.0,
    )

    async def event():
        return await asyncio.wait_for(anext(trigger.run()), 60)

    told = asyncio.run(event()).payload
    assert told["breach"]["kind"] == "attempt" and told["seen"]["status"] == "STOPPED"
    assert saved.read_text() == "saved"
