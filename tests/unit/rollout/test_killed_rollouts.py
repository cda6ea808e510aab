"""Whole rollouts, judge and all, killed at random and continued by other processes: the same verdict and weights."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from support.kube_api import KubeApi
from support.kube_serving import KilledError, MemoryClient
from support.rollout_world import KINDS, World, uri

from airflow_mlops.rollout.controller import Hands, run_rollout
from airflow_mlops.rollout.observation import Observation
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy
from airflow_mlops.rollout.spec import RolloutSpec

SPEC = RolloutSpec(
    "fraud",
    "2",
    uri("2"),
    "1",
    uri("1"),
    "dag/canary/run/-1",
    RolloutPolicy(steps=(5, 50, 100), min_requests=50, deadline_seconds=7200),
    (Guardrail.errors(),),
    poll_interval=10.0,
    ttl=60.0,
)
#: Error rates of (stable, canary).
EQUAL, BAD = (0.02, 0.02), (0.02, 0.2)


class Traffic:
    """Users of both arms, by the clock: every second 400 requests, split as the target splits them.

    :param world: whose clock it is, and whose split
    :param errors: rates of (stable, canary)
    """

    def __init__(self, world: World, errors: tuple[float, float]) -> None:
        self.world, self.errors = world, errors
        self.served = {"stable": [0.0, 0.0], "canary": [0.0, 0.0]}
        self.until = world.time.now

    async def check(self, state: Any, now: float) -> None:
        """Nothing can be wrong."""

    async def observe(self, state: Any, now: float) -> Observation:
        seconds, self.until = self.world.time.now - self.until, self.world.time.now
        for arm, share, rate in zip(self.served, (1 - state.weight / 100, state.weight / 100), self.errors):
            self.served[arm][0] += 400 * seconds * share
            self.served[arm][1] += 400 * seconds * share * rate
        counters = {
            arm: {"": {"counts": {"requests": int(requests), "errors": int(errors)}}}
            for arm, (requests, errors) in self.served.items()
        }
        return Observation(now, "boot", state.epoch, state.weight, **counters, problem=state.problem)


async def attempt(world: World, traffic: Traffic, number: int) -> dict[str, Any]:
    """One try of the task: everything of it is new but the cluster."""
    hands = Hands(clock=world.time.clock, sleep=world.time.sleep)
    return await run_rollout(world.target(), traffic, replace(SPEC, attempt=number), hands)


def kill_soon(client: MemoryClient, generator: random.Random) -> None:
    fatal, after = client.calls + generator.randint(1, 60), generator.random() < 0.5

    def kill(number: int, done: bool) -> None:
        if number == fatal and done == after:
            raise KilledError

    client.kill = kill


async def whole(kind: str, errors: tuple[float, float], generator: random.Random | None) -> tuple[Any, ...]:
    """A rollout to its end, with kills if there is a generator; verdict, final split, kills."""
    world = World(KubeApi(), kind)
    await world.target().deploy("1", uri("1"))
    traffic, kills = Traffic(world, errors), 0
    for number in range(1, 60):
        if generator and number < 25:
            kill_soon(world.client, generator)
        else:
            world.client.kill = lambda number, after: None
        try:
            result = await attempt(world, traffic, number)
            break
        except KilledError:
            kills += 1
            # Somebody notices after a while, or the lease runs out meanwhile.
            await world.time.sleep(generator.choice((1, 20, 90)))
    return result["verdict"], world.split(), kills, world


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("errors", [EQUAL, BAD], ids=["equal", "bad"])
async def test_kills_change_neither_the_verdict_nor_the_weights(kind: str, errors: tuple[float, float]) -> None:
    verdict, split, _, _ = await whole(kind, errors, None)
    assert (verdict, split) == (("PROMOTE", {"2": 100}) if errors is EQUAL else ("ROLLBACK", {"1": 100}))
    kills = 0
    for seed in range(26):
        found = await whole(kind, errors, random.Random(f"{kind} {errors} {seed}"))
        assert found[:2] == (verdict, split), seed
        kills += found[2]
    # Over all kinds and both verdicts more than 500.
    assert kills >= 63
