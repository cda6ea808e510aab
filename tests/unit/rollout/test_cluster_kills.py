"""A rollout that is killed at any request and continued by another process ends the same, and changes nothing twice."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from support.kube_api import KubeApi
from support.kube_serving import KilledError, MemoryClient
from support.rollout_world import KINDS, OWNER, World, note, uri

from airflow_mlops.exceptions import ConcurrentChangeError
from airflow_mlops.rollout.targets.base import KubernetesTarget

STEPS = (5, 25, 100)
SEEDS = 20


async def roll_out(target: KubernetesTarget, verdict: str, attempt: int) -> None:
    """A controller in small: it goes on where the annotation says that the one before was."""
    if await target.state() is None:
        await target.deploy("1", uri("1"))
    state = await target.state()
    assert state is not None
    if state.stable is None:
        await target.deploy("1", uri("1"))
    if "finished" not in state.rollout:
        await target.claim(OWNER, 60)
        at = int(state.rollout.get("step", 0))
        if "verdict" not in state.rollout:
            await target.load("2", uri("2"))
            for step in range(at, len(STEPS) if verdict == "PROMOTE" else 2):
                await target.renew(OWNER, 60, note(attempt=attempt, step=step))
                await target.split("2", STEPS[step], note(attempt=attempt, step=step))
        # First what is to be done, so that whoever continues does not do anything else again.
        await target.renew(OWNER, 60, note(attempt=attempt, verdict=verdict))
        end = note(attempt=attempt, finished={"verdict": verdict})
        await (target.promote(end) if verdict == "PROMOTE" else target.roll_back(OWNER, end))
    await target.clean_up()


def killing(client: MemoryClient, generator: random.Random, most: int) -> None:
    """Let the process die at one of its next requests, before or after it takes effect."""
    fatal, after = client.calls + generator.randint(1, most), generator.random() < 0.5

    def kill(number: int, done: bool) -> None:
        if number == fatal and done == after:
            raise KilledError

    client.kill = kill


def spare(client: MemoryClient) -> None:
    """Let the process live."""
    client.kill = lambda number, after: None


def weights(world: World) -> list[Any]:
    """The splits that were asked for, in order."""
    if world.kind == "knative":
        found = [each["spec"]["predictor"].get("canaryTrafficPercent") for each in world.patches("InferenceService")]
    elif world.kind == "standard":
        lists = [each["spec"].get("canary") for each in world.patches("InferenceService")]
        found = [each[0]["trafficPercent"] if each else None for each in lists]
    else:
        rules = [each["spec"]["rules"][0]["backendRefs"] for each in world.patches("HTTPRoute")]
        found = [{ref["name"].split("-")[1]: ref["weight"] for ref in refs}.get("v2", 0) for refs in rules]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verdict", ["PROMOTE", "ROLLBACK"])
async def test_killed_at_random(kind, verdict):
    calm = World(KubeApi(), kind)
    await roll_out(calm.target(), verdict, 1)
    kills = 0
    for seed in range(SEEDS):
        generator = random.Random(f"{kind} {verdict} {seed}")
        world = World(KubeApi(), kind)
        for attempt in range(1, 50):
            killing(world.client, generator, 40 if attempt < 20 else 10**9)
            try:
                await roll_out(world.target(), verdict, attempt)
                break
            except KilledError:
                kills += 1
                for _ in range(generator.randint(0, 4)):
                    world.serving.step()
        spare(world.client)
        assert world.split() == calm.split() == {"2" if verdict == "PROMOTE" else "1": 100}, seed
        state = await world.target().state()
        assert state is not None
        assert state.rollout["finished"] == {"verdict": verdict}
        assert (state.owner, state.canary, state.problem) == (None, None, None)
        assert weights(world) == weights(calm), seed
        assert world.serving.restarts() == 0
        services = [each["metadata"]["name"] for each in world.api.list("InferenceService")]
        assert services == [each["metadata"]["name"] for each in calm.api.list("InferenceService")]
    # Over all kinds and both verdicts more than 500.
    assert kills >= 63


@pytest.mark.parametrize("kind", KINDS)
async def test_killed_while_the_watchdog_acts(kind):
    """Whoever is killed, and however late its owner comes back: a claim that ran out has no traffic."""
    for seed in range(10):
        generator = random.Random(f"{kind} {seed}")
        world = World(KubeApi(), kind)
        dog = world.target(MemoryClient(world.api))
        for attempt in range(1, 50):
            killing(world.client, generator, 50 if attempt < 20 else 10**9)
            try:
                await roll_out(world.target(), "ROLLBACK", attempt)
                break
            except KilledError:
                pass
            if generator.random() < 0.5:
                world.time.now += 121
                spare(dog.client)
                claim = await dog.lease.read()
                killing(dog.client, generator, 12)
                for _ in range(3):
                    try:
                        done = await dog.expire(claim.number, 60)
                        assert done
                        break
                    except KilledError:
                        spare(dog.client)
                assert world.split() in ({"1": 100}, {}), seed
        assert world.split() == {"1": 100}


@pytest.mark.parametrize("kind", KINDS)
async def test_two_processes_of_one_task_at_once(kind):
    """A worker that was thought dead goes on beside the one that took over: it changes nothing any more."""
    for seed in range(10):
        generator = random.Random(f"{kind} {seed}")
        world = World(KubeApi(), kind)
        old = world.target(MemoryClient(world.api))
        fatal = generator.randint(5, 60)

        async def take_over(number: int, world: World = world, fatal: int = fatal) -> None:
            if number == fatal:
                await roll_out(world.target(), "ROLLBACK", 2)

        pausing(old, take_over)
        with contextlib.suppress(ConcurrentChangeError):
            await roll_out(old, "PROMOTE", 1)
        state = await world.target().state()
        assert state is not None
        # One of them came to an end, and what it says is so.
        verdict = state.rollout["finished"]["verdict"]
        assert world.split() == {"2" if verdict == "PROMOTE" else "1": 100}, seed


@pytest.mark.parametrize("kind", KINDS)
async def test_whoever_has_lost_the_claim_changes_nothing_more(kind):
    """At every request of a change the claim may be taken; only a request that is on its way gets through."""
    kinds = ("HTTPRoute", "InferenceService")
    for fatal in range(1, 12):
        world = World(KubeApi(), kind)
        await world.rolling(5)
        old = world.target(MemoryClient(world.api))
        taken: list[int] = []

        async def take(number: int, world: World = world, fatal: int = fatal, taken: list[int] = taken) -> None:
            if number == fatal:
                taken.append(number)
                world.time.now += 61
                await world.target(MemoryClient(world.api)).claim("another", 60)

        pausing(old, take)
        with contextlib.suppress(ConcurrentChangeError):
            await old.split("2", 25, note())
        numbers = [number for number, (found, _, _) in old.client.log if found in kinds]
        assert all(number <= fatal for number in numbers), (fatal, numbers)


def pausing(target: KubernetesTarget, between: Any) -> None:
    """Call ``between`` before each request of a target's client."""
    client = target.client
    do = client._do

    async def paused(work: Any) -> Any:
        await between(client.calls + 1)
        return await do(work)

    client._do = paused
