"""The rollout's own loop on every target in a cluster: verdicts, weights, and kills of whoever runs it."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from typing import Any

import pytest
from support.kube_api import KubeApi
from support.kube_serving import KilledError, MemoryClient
from support.rollout_world import KINDS, World, uri

from airflow_mlops.exceptions import ConcurrentChangeError
from airflow_mlops.rollout.controller import Hands, abort, go_back, run_rollout
from airflow_mlops.rollout.observation import Observation
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy
from airflow_mlops.rollout.spec import RolloutSpec
from airflow_mlops.rollout.targets.protocol import TargetState

SPEC = RolloutSpec(
    "fraud",
    "2",
    uri("2"),
    "1",
    uri("1"),
    "dag/canary/run/-1",
    RolloutPolicy(steps=(20, 50, 100), min_requests=100, deadline_seconds=3600),
    (Guardrail.errors(tolerance=0.05),),
    poll_interval=5.0,
    ttl=60.0,
)
RUNS = 70


class Traffic:
    """Requests that go where the cluster sends them, counted by who served them.

    :param errors: rate by version
    """

    def __init__(self, world: World, errors: dict[str, float]) -> None:
        self.world, self.errors = world, errors
        self.counts: dict[str, float] = {}
        self.switched = world.time.now
        self.split: dict[str, float] = {}
        self.seen = world.time.now

    def flow(self) -> None:
        """A hundred requests a second since the last time."""
        now = self.world.time.now
        split = {}
        with contextlib.suppress(KeyError, TypeError):
            split = self.world.serving.split("fraud")
        for version, percent in self.split.items():
            self.counts[version] = self.counts.get(version, 0) + percent * (now - self.seen)
        if split != self.split:
            self.switched = now
        self.seen, self.split = now, split

    def counters(self, version: str | None) -> dict[str, Any]:
        requests = int(self.counts.get(version or "", 0))
        return {"": {"counts": {"requests": requests, "errors": int(requests * self.errors.get(version or "", 0.0))}}}

    async def check(self, state: TargetState, now: float) -> None:
        pass

    async def observe(self, state: TargetState, now: float) -> Observation:
        arms = {"stable": self.counters(state.stable), "canary": self.counters(state.canary)}
        plain = {"time": now, "epoch": state.epoch, "weight": state.weight, "shadow": state.shadow}
        return Observation(**plain, **arms, problem=state.problem)


def begin(kind: str, bad: float = 0.0) -> tuple[World, Traffic, Hands]:
    world = World(KubeApi(), kind)
    traffic = Traffic(world, {"2": bad})

    def each() -> None:
        world.serving.step()
        traffic.flow()

    world.time.each = each
    return world, traffic, Hands(clock=world.time.clock, sleep=world.time.sleep)


def asked(world: World) -> list[int]:
    """The canary's weights in the order in which they were patched, without what came after the verdict."""
    found: list[int] = []
    for kind, _, change in world.client.patches:
        spec = change.get("spec", {})
        if kind == "InferenceService" and "canaryTrafficPercent" in spec.get("predictor", {}):
            found.append(spec["predictor"]["canaryTrafficPercent"])
        elif kind == "InferenceService" and spec.get("canary"):
            found.append(spec["canary"][0]["trafficPercent"])
        elif kind == "HTTPRoute":
            weights = {ref["name"]: ref["weight"] for ref in spec["rules"][0]["backendRefs"]}
            found.append(next((weight for name, weight in weights.items() if "v2" in name), 0))
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_a_version_that_is_as_good_is_promoted(kind):
    world, traffic, hands = begin(kind)
    result = await run_rollout(world.target(), traffic, SPEC, hands)
    assert (result["verdict"], result["previous"]) == ("PROMOTE", "1")
    assert world.split() == {"2": 100}
    assert [weight for weight in asked(world) if weight] in ([20, 50, 100], [20, 50, 100, 0])
    # Whoever asks again is told the same.
    assert await run_rollout(world.target(), traffic, replace(SPEC, attempt=2), hands) == result


@pytest.mark.parametrize("kind", KINDS)
async def test_a_bad_version_has_no_traffic_ten_seconds_after_the_verdict(kind):
    world, traffic, hands = begin(kind, bad=0.3)
    times: list[float] = []
    hands = replace(hands, on_look=lambda verdict: times.append(world.time.now))
    result = await run_rollout(world.target(), traffic, SPEC, hands)
    assert result["verdict"] == "ROLLBACK"
    assert world.serving.split("fraud") == {"1": 100}
    assert traffic.switched - times[-1] < 10
    assert world.split() == {"1": 100}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bad", "verdict"), [(0.0, "PROMOTE"), (0.3, "ROLLBACK")])
async def test_killed_at_random_the_verdict_and_the_weights_are_the_same(kind, bad, verdict):
    calm, traffic, hands = begin(kind, bad)
    await run_rollout(calm.target(), traffic, SPEC, hands)
    kills = 0
    for run in range(RUNS):
        generator = random.Random(f"{kind} {bad} {run}")
        world, traffic, hands = begin(kind, bad)
        result: dict[str, Any] = {}
        for attempt in range(1, 30):
            fatal, after = world.client.calls + generator.randint(1, 90), generator.random() < 0.5

            def kill(number: int, done: bool, fatal: int = fatal, after: bool = after, attempt: int = attempt) -> None:
                if number == fatal and done == after and attempt < 20:
                    raise KilledError

            world.client.kill = kill
            with contextlib.suppress(KilledError):
                result = await run_rollout(world.target(), traffic, replace(SPEC, attempt=attempt), hands)
                break
            kills += 1
        world.client.kill = lambda number, done: None
        assert result["verdict"] == verdict, (run, result["reasons"])
        assert world.split() == calm.split() == {"2" if verdict == "PROMOTE" else "1": 100}
        assert asked(world) == asked(calm), run
        assert world.serving.restarts() == 0
    # Over all kinds and both verdicts more than 500.
    assert kills >= 63


@pytest.mark.parametrize("kind", KINDS)
async def test_a_task_that_is_ended_gives_all_traffic_back(kind):
    world, traffic, hands = begin(kind)
    endless = replace(SPEC, policy=replace(SPEC.policy, min_requests=10**9))
    world.client.kill = lambda number, done: _die(number)
    with pytest.raises(KilledError):
        await run_rollout(world.target(), traffic, endless, hands)
    world.client.kill = lambda number, done: None
    assert world.split() == {"1": 80, "2": 20}
    assert await abort(world.target(), endless)
    assert world.split() == {"1": 100}
    assert not await abort(world.target(), endless)


def _die(number: int) -> None:
    if number == 150:
        raise KilledError


@pytest.mark.parametrize("kind", KINDS)
async def test_somebody_elses_change_ends_the_rollout(kind):
    world, traffic, hands = begin(kind)
    endless = replace(SPEC, policy=replace(SPEC.policy, min_requests=10**9))
    looks = iter(range(100))

    def meddle(verdict: Any) -> None:
        if next(looks) == 3:
            world.meddle(50)

    with pytest.raises(ConcurrentChangeError, match="changed by kubectl-edit"):
        await run_rollout(world.target(), traffic, endless, replace(hands, on_look=meddle))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_person_goes_back_after_the_fact(kind):
    world, traffic, hands = begin(kind)
    await run_rollout(world.target(), traffic, SPEC, hands)
    assert await go_back(world.target(), "1", uri("1"), "person", 60)
    assert world.split() == {"1": 100}
    assert not await go_back(world.target(), "1", uri("1"), "person", 60)
    state = await world.target(MemoryClient(world.api)).state()
    assert state is not None
    assert (state.stable, state.canary, state.owner) == ("1", None, None)
