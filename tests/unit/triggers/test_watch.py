"""The order in which a shared watch learns things: whatever it is, followers are told the truth, once."""

from __future__ import annotations

import asyncio
import contextvars
import gc

import pytest

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.hooks._kubernetes import RAYJOB, HistoryGone, Unavailable
from airflow_mlops.triggers import _watch
from airflow_mlops.triggers._watch import Row, watch

COLUMNS = [{"name": "Name"}, {"name": "job status"}]


def row(name, version, status="", uid="u1"):
    meta = {"name": name, "uid": uid, "resourceVersion": str(version)}
    return {"cells": [name, status or None], "object": {"metadata": meta}}


def table(*rows, version="", proceed=None, columns=True):
    meta = {"resourceVersion": str(version), **({"continue": proceed} if proceed else {})}
    return {"kind": "Table", "metadata": meta, "rows": [*rows], "columnDefinitions": COLUMNS if columns else None}


class Scripted:
    """An API server's answers, given when the test says so."""

    def __init__(self):
        self.lists, self.looks, self.asked = asyncio.Queue(), {}, []
        self.events, self.connections = asyncio.Queue(), 0

    async def __aenter__(self):
        self.connections += 1
        return self

    async def __aexit__(self, *_):
        self.connections -= 1

    async def atable_page(self, resource, selector, *, name=None, proceed=None):
        self.asked.append(("look", name) if name else ("list", proceed))
        answer = await (self.looks[name] if name else self.lists).get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def awatch(self, resource, version, selector, *, seconds, accept, opened):
        self.asked.append(("watch", version))
        opened()
        while True:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                return
            yield event


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_watch.Backoff, "after", lambda self, error=None: 0.0)
    scripted = Scripted()
    monkeypatch.setattr("airflow_mlops.hooks.kubernetes.CustomResourceHook", lambda **_: scripted)
    return scripted


def watched():
    return watch("kube", RAYJOB, "ml", {"run": "x"})


async def soon(follower):
    return await asyncio.wait_for(anext(follower), 2)


async def nothing(follower):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(follower), 0.03)


async def status(follower):
    found = await soon(follower)
    return found and found.columns["job status"]


async def test_a_row_has_what_is_printed_and_the_metadata(server):
    meta = {
        "name": "a",
        "uid": "u",
        "resourceVersion": "3",
        "labels": {"l": "1"},
        "annotations": {"a": "2", "kubectl.kubernetes.io/last-applied-configuration": "{}"},
        "deletionTimestamp": "2026-01-01T00:00:00Z",
        "managedFields": [{}],
    }
    server.lists.put_nowait(table({"cells": ["a", None], "object": {"metadata": meta}}, version=3))
    async with watched() as shared:
        found = await soon(shared.follow("a"))
    assert found == Row("a", "u", "3", {"l": "1"}, {"a": "2"}, True, {"Name": "a", "job status": ""})


async def test_all_pages_are_read_before_anybody_is_told(server):
    server.lists.put_nowait(table(row("a", 1), version=9, proceed="p2"))
    async with watched() as shared:
        follower = shared.follow("b")
        await nothing(follower)
        server.lists.put_nowait(table(row("b", 2, "RUNNING"), version=9))
        assert await status(follower) == "RUNNING"
        await asyncio.sleep(0)
        assert server.asked == [("list", None), ("list", "p2"), ("watch", "9")]


async def test_an_object_younger_than_the_watch_is_looked_for(server):
    """A task creates its RayJob and defers: the trigger must not take the watch's delay for a lost RayJob."""
    server.lists.put_nowait(table(version=10))
    server.looks["a"] = asyncio.Queue()
    async with watched() as shared:
        server.looks["a"].put_nowait(table(row("a", 12, "RUNNING"), version=13))
        follower = shared.follow("a")
        assert await status(follower) == "RUNNING"
        # The watch brings what is known already, then what is new.
        server.events.put_nowait(("ADDED", table(row("a", 11))))
        server.events.put_nowait(("MODIFIED", table(row("a", 12, "RUNNING"))))
        server.events.put_nowait(("MODIFIED", table(row("a", 14, "SUCCEEDED"))))
        assert await status(follower) == "SUCCEEDED"
        await nothing(follower)


async def test_an_answer_that_the_watch_has_overtaken_does_not_bring_an_object_back(server):
    server.lists.put_nowait(table(version=10))
    server.looks["a"] = asyncio.Queue()
    async with watched() as shared:
        follower = shared.follow("a")
        waiting = asyncio.create_task(soon(follower))
        await asyncio.sleep(0.01)
        server.events.put_nowait(("ADDED", table(row("a", 11))))
        server.events.put_nowait(("DELETED", table(row("a", 12))))
        await asyncio.sleep(0.01)
        server.looks["a"].put_nowait(table(row("a", 11), version=11))
        assert await waiting is None
        await nothing(follower)


async def test_a_new_list_does_not_take_away_what_is_younger(server):
    server.lists.put_nowait(table(version=10))
    server.looks["a"] = asyncio.Queue()
    async with watched() as shared:
        server.events.put_nowait(HistoryGone("410"))
        await asyncio.sleep(0.01)
        server.looks["a"].put_nowait(table(row("a", 22, "RUNNING"), version=22))
        follower = shared.follow("a")
        assert await status(follower) == "RUNNING"
        server.lists.put_nowait(table(version=20))
        await nothing(follower)
        server.events.put_nowait(("DELETED", table(row("a", 23))))
        assert await soon(follower) is None


async def test_a_deletion_of_an_earlier_object_of_that_name_is_none(server):
    server.lists.put_nowait(table(row("a", 20, "RUNNING", uid="u2"), version=20))
    async with watched() as shared:
        follower = shared.follow("a")
        assert await status(follower) == "RUNNING"
        server.events.put_nowait(("DELETED", table(row("a", 15, uid="u1"))))
        await nothing(follower)


async def test_followers_of_an_object_that_was_replaced_see_it_go(server):
    server.lists.put_nowait(table(row("a", 5, uid="u1"), version=5))
    async with watched() as shared:
        follower = shared.follow("a")
        await soon(follower)
        server.events.put_nowait(HistoryGone("410"))
        server.lists.put_nowait(table(row("a", 9, uid="u2"), version=9))
        assert await soon(follower) is None
        assert (await soon(follower)).uid == "u2"


async def test_a_wait_that_is_given_up_loses_nothing(server):
    server.lists.put_nowait(table(row("a", 1), version=1))
    versions = [str(version) for version in range(2, 200)]

    async def happen():
        for version in versions:
            server.events.put_nowait(("MODIFIED", table(row("a", version), columns=False)))
            await asyncio.sleep(0.001)

    async with watched() as shared:
        follower = shared.follow("a")
        await soon(follower)
        happening, seen, given_up = asyncio.create_task(happen()), [], 0
        while len(seen) < len(versions):
            try:
                seen.append((await asyncio.wait_for(anext(follower), 0.0008)).resource_version)
            except TimeoutError:
                given_up += 1
        await happening
    assert seen == versions
    assert given_up > 10


async def test_bookmarks_move_the_version_and_nothing_else(server):
    server.lists.put_nowait(table(row("a", 1), version=1))
    async with watched() as shared:
        follower = shared.follow("a")
        await soon(follower)
        server.events.put_nowait(("BOOKMARK", table(row("", 7), version=7)))
        server.events.put_nowait(("BOOKMARK", {"kind": "RayJob", "metadata": {"resourceVersion": "8"}}))
        server.events.put_nowait(None)
        await nothing(follower)
        assert server.asked[-1] == ("watch", "8")


async def test_silence_is_seen_and_ends(server):
    server.lists.put_nowait(ExternalSystemError("away"))
    async with watched() as shared:
        await asyncio.sleep(0.01)
        assert shared.silent_since is not None
        assert shared.trouble == "away"
        first = shared.silent_since
        server.lists.put_nowait(Unavailable("busy", None))
        await asyncio.sleep(0.01)
        assert (shared.silent_since, shared.trouble) == (first, "busy")
        server.lists.put_nowait(table(row("a", 1), version=1))
        await soon(shared.follow("a"))
        assert shared.silent_since is None
        assert shared.trouble == ""


async def test_what_never_worked_is_told_to_all(server):
    server.lists.put_nowait(InvalidInputError("may not list"))
    async with watched() as shared:
        followers = [shared.follow(name) for name in "ab"]
        for follower in followers * 2:
            with pytest.raises(InvalidInputError, match="may not list"):
                await soon(follower)
        # Who comes later tries again.
        server.lists.put_nowait(table(row("a", 1), version=1))
        async with watched() as other:
            assert other is not shared
            await soon(other.follow("a"))


async def test_rights_that_are_gone_for_a_while_end_nothing(server):
    server.lists.put_nowait(table(row("a", 1), version=1))
    async with watched() as shared:
        follower = shared.follow("a")
        await soon(follower)
        server.events.put_nowait(InvalidInputError("may not watch"))
        server.events.put_nowait(("MODIFIED", table(row("a", 2, "RUNNING"))))
        assert await status(follower) == "RUNNING"


async def test_a_plain_list_is_refused(server):
    server.lists.put_nowait({"kind": "RayJobList", "items": []})
    async with watched() as shared:
        with pytest.raises(InvalidInputError, match="RayJobList"):
            await soon(shared.follow("a"))


async def test_one_watch_for_all_until_the_last_leaves(server):
    server.lists.put_nowait(table(row("a", 1), version=1))
    async with watched() as first:
        async with watched() as second:
            assert second is first
            assert watch("kube", RAYJOB, "other", {"run": "x"}) is not first
            await soon(second.follow("a"))
        server.events.put_nowait(("MODIFIED", table(row("a", 2, "RUNNING"))))
        follower = first.follow("a")
        await soon(follower)
        assert server.connections == 1
    assert server.connections == 0
    # Nobody listens any more; who comes now sees the present, not what was left behind.
    server.lists.put_nowait(table(row("a", 8, "FAILED"), version=8))
    async with watched() as third:
        assert await status(third.follow("a")) == "FAILED"
    assert [asked for asked in server.asked if asked[0] == "list"] == [("list", None)] * 2


async def test_a_burst_leaves_the_loop_to_others(server):
    server.lists.put_nowait(table(row("a", 1), version=1))
    left = []

    async def other():
        while True:
            left.append(server.events.qsize())
            await asyncio.sleep(0)

    async with watched() as shared:
        follower = shared.follow("a")
        await soon(follower)
        for version in range(2, 1002):
            server.events.put_nowait(("MODIFIED", table(row("a", version))))
        task = asyncio.create_task(other())
        while (await soon(follower)).resource_version != "1001":
            pass
        task.cancel()
    assert max(before - after for before, after in zip([1000, *left], left)) <= 100


TASK = contextvars.ContextVar("TASK", default="nobody's")


@pytest.mark.parametrize(("own", "whose"), [(False, "nobody's"), (True, "the first's")])
async def test_what_a_shared_watch_logs_belongs_to_no_task(server, monkeypatch, own, whose):
    logged = []
    monkeypatch.setattr(_watch.log, "info", lambda *args: logged.append(TASK.get()))
    server.lists.put_nowait(ExternalSystemError("away"))
    server.lists.put_nowait(table(row("a", 1), version=1))
    TASK.set("the first's")
    async with watch("kube", RAYJOB, "ml", hook=server if own else None) as shared:
        await soon(shared.follow("a"))
    assert logged == [whose]


async def test_names_that_nobody_follows_any_more_are_forgotten(server):
    server.lists.put_nowait(table(*(row(f"a{number}", 1) for number in range(50)), version=1))
    async with watched() as shared:
        for number in range(50):
            await soon(shared.follow(f"a{number}"))
        again, other = shared.follow("a0"), shared.follow("a0")
        await soon(again)
        await soon(other)
        del other
        gc.collect()
        assert list(shared._followers) == ["a0"]
        server.events.put_nowait(("MODIFIED", table(row("a0", 2, "RUNNING"))))
        assert await status(again) == "RUNNING"
