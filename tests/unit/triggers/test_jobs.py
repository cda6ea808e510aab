"""One look at a Ray cluster for many waiting triggers."""

from __future__ import annotations

import asyncio
import time

import pytest
from support.ray_dashboard import RayDashboard

from airflow_mlops.exceptions import ExternalSystemError
from airflow_mlops.hooks.ray import AccessRefusedError, RayJobsHook
from airflow_mlops.triggers import _jobs
from airflow_mlops.triggers._jobs import next_look


@pytest.fixture
def ray(monkeypatch):
    with RayDashboard() as dashboard:
        monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", dashboard.connection())
        yield dashboard


async def until_over(ray, name: str, interval: float) -> tuple[str, float]:
    endpoint = RayJobsHook().endpoint
    while not (job := await next_look(endpoint, name, interval)).over:
        pass
    return job.status, time.monotonic()


def test_hundreds_wait_with_one_list_a_round(ray):
    names = [f"j{number}" for number in range(300)]
    ray.jobs = {name: {"status": "RUNNING"} for name in names}

    async def wait() -> float:
        asyncio.get_running_loop().call_later(1.0, lambda: [ray.finish(name) for name in names])
        began = time.monotonic()
        ends = await asyncio.gather(*(until_over(ray, name, 0.2) for name in names))
        assert {status for status, _ in ends} == {"SUCCEEDED"}
        return time.monotonic() - began

    took = asyncio.run(asyncio.wait_for(wait(), 30))
    assert ray.requests["get"] == 0 and 2 <= ray.requests["list"] <= took / 0.2 + 2


def test_few_are_asked_for_one_by_one_at_the_same_pace(ray):
    ray.jobs = {name: {"status": "RUNNING"} for name in "abcde"}

    async def wait() -> None:
        asyncio.get_running_loop().call_later(0.5, lambda: [ray.finish(name) for name in "abcde"])
        await asyncio.gather(*(until_over(ray, name, 0.1) for name in "aabcde"))

    asyncio.run(asyncio.wait_for(wait(), 30))
    assert ray.requests["list"] == 0 and 10 <= ray.requests["get"] <= 5 * 7


def test_who_waits_longer_is_no_hindrance_to_who_waits_less(ray):
    ray.jobs = {name: {"status": "RUNNING"} for name in "ab"}

    async def wait() -> float:
        slow = asyncio.create_task(until_over(ray, "a", 60.0))
        await asyncio.sleep(0.2)
        ray.finish("b")
        began = time.monotonic()
        await until_over(ray, "b", 0.2)
        slow.cancel()
        return time.monotonic() - began

    assert asyncio.run(asyncio.wait_for(wait(), 30)) < 5


def test_job_that_is_not_in_the_list_is_asked_for_before_it_counts_as_lost(ray):
    names = [f"j{number}" for number in range(8)]
    ray.jobs = {name: {"status": "RUNNING"} for name in names[1:]}

    async def wait() -> list[str]:
        endpoint = RayJobsHook().endpoint
        return [job.status for job in await asyncio.gather(*(next_look(endpoint, name, 1.0) for name in names))]

    assert asyncio.run(wait()) == ["LOST"] + ["RUNNING"] * 7
    assert ray.requests == {"list": 1, "get": 1}


@pytest.mark.parametrize("jobs", [1, 9])
def test_silence_and_refusal_reach_everybody_and_pass(ray, jobs):
    names = [f"j{number}" for number in range(jobs)]
    ray.jobs = {name: {"status": "RUNNING"} for name in names}

    async def look() -> list[object]:
        endpoint = RayJobsHook().endpoint
        return await asyncio.gather(*(next_look(endpoint, name, 0.05) for name in names), return_exceptions=True)

    async def wait() -> None:
        ray.down = True
        assert {type(error) for error in await look()} == {ExternalSystemError}
        ray.down, token = False, ray.token
        ray.token = "another"
        assert {type(error) for error in await look()} == {AccessRefusedError}
        ray.token = token
        assert {job.status for job in await look()} == {"RUNNING"}

    asyncio.run(asyncio.wait_for(wait(), 30))


def test_poll_ends_with_the_last_who_waits_and_begins_again(ray):
    ray.jobs = {"a": {"status": "RUNNING"}}

    async def wait() -> None:
        for _ in range(2):
            waiting = asyncio.create_task(until_over(ray, "a", 0.05))
            await asyncio.sleep(0.3)
            assert len(_jobs._POLLS[asyncio.get_running_loop()]) == 1
            waiting.cancel()
            await asyncio.sleep(0.3)
            assert not _jobs._POLLS[asyncio.get_running_loop()]
            before = ray.requests["get"]
            await asyncio.sleep(0.2)
            assert ray.requests["get"] == before

    asyncio.run(asyncio.wait_for(wait(), 30))


def test_poll_that_closes_its_session_leaves_the_one_that_has_begun_meanwhile(ray, monkeypatch):
    ray.jobs = {"a": {"status": "RUNNING"}}
    leave = RayJobsHook.__aexit__

    async def slowly(self, *args) -> None:
        await asyncio.sleep(0.4)
        await leave(self, *args)

    monkeypatch.setattr(RayJobsHook, "__aexit__", slowly)

    async def wait() -> None:
        polls = _jobs._POLLS.setdefault(asyncio.get_running_loop(), {})
        await next_look(RayJobsHook().endpoint, "a", 0.1)
        (first,) = polls.values()
        while polls:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(until_over(ray, "a", 0.1))
        await asyncio.wait({first._task})
        (second,) = polls.values()
        assert second is not first
        waiting.cancel()

    asyncio.run(asyncio.wait_for(wait(), 30))
