"""One list and one watch for a thousand followers, whatever happens to the server and the connections."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time

import pytest
from support.kube_api import KubeApi

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks.kubernetes import RAYJOB
from airflow_mlops.triggers import _watch
from airflow_mlops.triggers._watch import watch

RUN = {"run": "r1"}
FINAL = "SUCCEEDED"


def rayjob(name, labels=RUN):
    spec = {"entrypoint": "true", "rayClusterSpec": {"headGroupSpec": {"rayStartParams": {}, "template": {}}}}
    meta = {"name": name, "labels": dict(labels)}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta, "spec": spec}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server without schemas: what is watched is not what is checked here."""
    with KubeApi(None, bookmark_seconds=0.05) as api:
        extra = {"kube_config_path": str(api.kubeconfig(tmp_path / "kubeconfig"))}
        monkeypatch.setenv("AIRFLOW_CONN_KUBE", json.dumps({"conn_type": "kuberay", "extra": extra}))
        yield api


async def statuses(shared, name, until=FINAL):
    """The statuses of an object up to the last, as a follower is told."""
    told = []
    async for row in shared.follow(name):
        told.append(None if row is None else row.columns["job status"])
        if told[-1] == until:
            return told


def listed_or_watched(server):
    return server.count(method="GET", path_contains="/rayjobs")


async def test_a_thousand_followers_cost_one_list_and_one_watch(server):
    names = [f"job-{number:04}" for number in range(1000)]
    for name in names:
        server.create(rayjob(name))

    def happen():
        for status in ("PENDING", "RUNNING", FINAL):
            for name in names:
                server.put_status("RayJob", "default", name, {"jobStatus": status})

    async with watch("kube", RAYJOB, "default", RUN) as shared:
        following = [asyncio.create_task(statuses(shared, name)) for name in names]
        await asyncio.wait_for(anext(shared.follow(names[-1])), 60)
        await asyncio.sleep(0)
        await asyncio.to_thread(happen)
        told = await asyncio.wait_for(asyncio.gather(*following), 60)
    # Two pages and a watch.
    assert listed_or_watched(server) == 3
    assert told == [["", "PENDING", "RUNNING", FINAL]] * 1000


async def test_triggers_that_begin_and_end_share_it_too(server):
    for number in range(20):
        server.create(rayjob(f"job-{number}"))

    async def trigger(number):
        async with watch("kube", RAYJOB, "default", RUN) as shared:
            return await statuses(shared, f"job-{number}")

    running = [asyncio.create_task(trigger(number)) for number in range(20)]
    while server.count(watch=True) == 0:
        await asyncio.sleep(0.01)
    for number in range(20):
        server.put_status("RayJob", "default", f"job-{number}", {"jobStatus": FINAL})
        await asyncio.sleep(0.01)
    await asyncio.wait_for(asyncio.gather(*running), 30)
    assert listed_or_watched(server) == 2
    while server.watches:
        await asyncio.sleep(0.01)


class Trouble:
    """A thread that changes objects and breaks things, by a seed; keeps what it did to each object.

    :ivar done: per name the states it has had, None for its end
    """

    def __init__(self, server, seed, names):
        self.server, self.rng, self.names = server, random.Random(seed), names
        self.done = {name: [] for name in names}

    def _compact(self):
        self.server.compact()

    def _forget(self):
        self.server.compact()
        self.server.drop_watches()

    def _cut(self):
        self.server.drop_watches()

    def _fail(self):
        status = self.rng.choice([410, 429, 500, 503, 504])
        self.server.fault(status=status, times=self.rng.randint(1, 3), watch=self.rng.choice([True, False, None]))
        self.server.drop_watches()

    def _refuse(self):
        self.server.fault(drop=True, times=self.rng.randint(1, 3))
        self.server.drop_watches()

    def _pause(self):
        time.sleep(self.rng.choice([0.01, 0.05, 0.12]))

    def _change(self, name):
        states = self.done[name]
        step = self.rng.random()
        if not states or states[-1] is None:
            self.server.create(rayjob(name))
            states.append("")
        elif step < 0.15:
            self.server.delete_now("RayJob", "default", name)
            states.append(None)
        else:
            states.append(f"S{len(states)}")
            self.server.put_status("RayJob", "default", name, {"jobStatus": states[-1]})

    def run(self):
        troubles = [self._compact, self._forget, self._cut, self._fail, self._refuse, self._pause]
        for _ in range(80):
            for _ in range(self.rng.randint(0, 4)):
                self._change(self.rng.choice(self.names))
            if self.rng.random() < 0.35:
                self.rng.choice(troubles)()
        for name in self.names:
            if not self.done[name] or self.done[name][-1] is None:
                self._change(name)
            self.done[name].append(FINAL)
            self.server.put_status("RayJob", "default", name, {"jobStatus": FINAL})


def in_order(told, done):
    """Whether what a follower was told happened in that order, and ended as it did."""
    rest = iter(done)
    return all(any(state == other for other in rest) for state in told)


@pytest.mark.parametrize("seed", range(10))
async def test_followers_learn_the_truth_through_any_trouble(server, monkeypatch, seed):
    monkeypatch.setattr(_watch.Backoff, "after", lambda self, error=None: 0.004)
    names = [f"job-{number}" for number in range(8)]
    trouble = Trouble(server, seed, names)
    rng = random.Random(seed)

    async def follow(name):
        await asyncio.sleep(rng.random() * 0.3)
        async with watch("kube", RAYJOB, "default", RUN) as shared:
            return await statuses(shared, name)

    following = [asyncio.create_task(follow(name)) for name in names for _ in range(3)]
    thread = threading.Thread(target=trouble.run)
    thread.start()
    told = await asyncio.wait_for(asyncio.gather(*following), 60)
    thread.join()
    for name, states in zip([name for name in names for _ in range(3)], told):
        # Before it was made there was none; what happened while history was forgotten may be told as one step.
        assert in_order(states, [None, *trouble.done[name]]), (states, trouble.done[name])
        assert states[-1] == FINAL


@pytest.mark.parametrize("seed", range(5))
async def test_cut_connections_lose_and_double_nothing(server, monkeypatch, seed):
    """Without a forgotten history every single state is told, and once."""
    monkeypatch.setattr(_watch.Backoff, "after", lambda self, error=None: 0.004)
    rng = random.Random(seed)
    names = [f"job-{number}" for number in range(5)]
    done = {name: [""] for name in names}
    for name in names:
        server.create(rayjob(name))

    def happen():
        for number in range(120):
            name = rng.choice(names)
            done[name].append(f"S{number}")
            server.put_status("RayJob", "default", name, {"jobStatus": f"S{number}"})
            if rng.random() < 0.2:
                server.drop_watches()
            if rng.random() < 0.1:
                status = rng.choice([429, 500, 503, None])
                server.fault(status=status, drop=status is None, times=2, watch=True)
            time.sleep(rng.choice([0, 0, 0.004]))
        for name in names:
            done[name].append(FINAL)
            server.put_status("RayJob", "default", name, {"jobStatus": FINAL})

    async with watch("kube", RAYJOB, "default", RUN) as shared:
        followers = {name: shared.follow(name) for name in names}
        told = {name: [(await anext(follower)).columns["job status"]] for name, follower in followers.items()}
        happening = asyncio.create_task(asyncio.to_thread(happen))
        for name, follower in followers.items():
            while told[name][-1] != FINAL:
                row = await asyncio.wait_for(anext(follower), 30)
                told[name].append(row and row.columns["job status"])
        await happening
    assert told == done


async def test_a_forgotten_history_is_listed_anew_at_once_but_not_forever(server):
    server.create(rayjob("a"))
    async with watch("kube", RAYJOB, "default", RUN) as shared:
        follower = shared.follow("a")
        await anext(follower)
        server.fault(status=410, times=100, watch=True)
        server.drop_watches()
        await asyncio.sleep(1.5)
        # The first time at once, then after pauses that grow.
        assert 2 <= server.count(watch=False, path_contains="/rayjobs") <= 6
        server.faults.clear()
        server.put_status("RayJob", "default", "a", {"jobStatus": FINAL})
        assert (await asyncio.wait_for(anext(follower), 10)).columns["job status"] == FINAL


async def test_a_server_that_wants_to_be_left_alone_is(server):
    server.create(rayjob("a"))
    server.fault(status=429, retry_after=1.0)
    began = time.monotonic()
    async with watch("kube", RAYJOB, "default", RUN) as shared:
        await asyncio.sleep(0.4)
        assert server.count(path_contains="/rayjobs") == 1
        assert shared.silent_since is not None
        await anext(shared.follow("a"))
        assert shared.silent_since is None
    assert time.monotonic() - began >= 1.0


async def test_a_job_that_was_made_a_moment_ago_is_never_taken_for_lost(server):
    """Tasks create and defer while the watch lags behind: followers must not begin with None."""
    server.create(rayjob("first"))
    async with watch("kube", RAYJOB, "default", RUN) as shared:
        await anext(shared.follow("first"))
        for number in range(100):
            # The watch is cut, so it cannot have brought the new object yet.
            if number % 10 == 0:
                server.drop_watches()
            server.create(rayjob(f"job-{number}"))
            assert await asyncio.wait_for(anext(shared.follow(f"job-{number}")), 10) is not None


async def test_only_what_the_selector_matches_is_there(server):
    server.create(rayjob("mine"))
    server.create(rayjob("other", {"run": "r2"}))
    async with watch("kube", RAYJOB, "default", RUN) as shared:
        follower = shared.follow("mine")
        assert await anext(follower) is not None
        assert await anext(shared.follow("other")) is None
        server.patch("RayJob", "default", "mine", {"metadata": {"labels": {"run": "r2"}}})
        assert await asyncio.wait_for(anext(follower), 10) is None


async def test_missing_rights_are_told_to_every_follower(server):
    server.forbid("watch", "rayjobs")
    server.create(rayjob("a"))
    async with watch("kube", RAYJOB, "default", RUN) as shared:
        follower = shared.follow("a")
        with pytest.raises(InvalidInputError, match="'watch' on rayjobs"):
            while True:
                await asyncio.wait_for(anext(follower), 10)
    server.allow_all()
    server.forbid("list", "rayjobs")
    async with watch("kube", RAYJOB, "default", RUN) as shared:
        with pytest.raises(InvalidInputError, match="'list' on rayjobs"):
            await anext(shared.follow("a"))


async def test_new_credentials_are_taken_up(server, tmp_path):
    server.create(rayjob("a"))
    async with watch("kube", RAYJOB, "default", RUN) as shared:
        follower = shared.follow("a")
        await anext(follower)
        while not server.watches:
            await asyncio.sleep(0.01)
        old, server.token = server.token, "renewed"
        server.drop_watches()
        while shared.silent_since is None:
            await asyncio.sleep(0.01)
        config = tmp_path / "kubeconfig"
        config.write_text(config.read_text().replace(old, "renewed"))
        server.put_status("RayJob", "default", "a", {"jobStatus": FINAL})
        assert (await asyncio.wait_for(anext(follower), 20)).columns["job status"] == FINAL
        assert (await shared.hook.aget(RAYJOB, "a"))["status"] == {"jobStatus": FINAL}


async def test_the_shared_hook_asks_for_the_rest(server):
    server.create(rayjob("a"))
    async with watch("kube", RAYJOB, "default", RUN) as shared:
        row = await anext(shared.follow("a"))
        found = await shared.hook.aget(RAYJOB, row.name)
        assert found["metadata"]["uid"] == row.uid
        assert found["spec"]["entrypoint"] == "true"
