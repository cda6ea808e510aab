"""Every target in a cluster keeps the promises of the protocol, whatever splits its traffic."""

from __future__ import annotations

from typing import Any

import pytest
from support.kube_api import KubeApi
from support.rollout_world import KINDS, OWNER, World, note, uri

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError

OTHER = "dag/canary/other-run/-1"


@pytest.fixture(params=KINDS)
def world(request) -> World:
    return World(KubeApi(), request.param)


async def test_nothing_is_deployed_at_first(world):
    assert await world.target().state() is None


async def test_the_first_version_gets_all_traffic(world):
    target = world.target()
    await target.deploy("1", uri("1"))
    state = await target.state()
    assert (state.stable, state.canary, state.weight, state.problem) == ("1", None, 0.0, None)
    assert state.ready == {"stable"}
    assert world.split() == {"1": 100}


async def test_a_rollout_to_the_end(world):
    target = await world.rolling(5)
    for weight in (5, 25, 50, 100):
        await target.split("2", weight, note(step=weight))
        state = await target.state()
        assert (state.weight, state.configured, state.stable, state.canary) == (weight, weight, "1", "2")
        assert (state.problem, state.owner, state.rollout["step"]) == (None, OWNER, weight)
        assert state.ready == {"stable", "canary"}
        assert world.split() == {v: w for v, w in (("1", 100 - weight), ("2", weight)) if w}
    await target.promote(note(finished={"verdict": "PROMOTE"}))
    state = await target.state()
    assert (state.stable, state.canary, state.weight, state.owner) == ("2", None, 0.0, None)
    assert state.rollout["finished"] == {"verdict": "PROMOTE"}
    assert state.problem is None
    assert world.split() == {"2": 100}
    await target.clean_up()
    assert world.split() == {"2": 100}
    assert (await target.state()).problem is None


async def test_a_loaded_version_has_no_traffic(world):
    target = world.target()
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    await target.load("2", uri("2"))
    state = await target.state()
    assert (state.stable, state.canary, state.weight) == ("1", "2", 0.0)
    assert state.ready == {"stable", "canary"}
    assert world.split() == {"1": 100}


@pytest.mark.parametrize("weight", [1, 50, 100])
async def test_a_rollback_takes_all_traffic_from_the_canary(world, weight):
    target = await world.rolling(weight)
    began = world.time.now
    await target.roll_back(OWNER, note(finished={"verdict": "ROLLBACK"}))
    assert world.serving.split("fraud") == {"1": 100}
    assert world.time.now - began < 10
    state = await target.state()
    assert (state.stable, state.canary, state.weight, state.owner) == ("1", None, 0.0, None)
    assert (state.problem, state.rollout["finished"]) == (None, {"verdict": "ROLLBACK"})
    assert world.split() == {"1": 100}
    await target.clean_up()
    assert world.split() == {"1": 100}
    assert (await target.state()).problem is None


async def test_after_a_rollback_the_next_version_is_rolled_out(world):
    target = await world.rolling(100)
    await target.roll_back(OWNER, {})
    await target.claim(OTHER, 60)
    await target.load("3", uri("3"))
    assert world.split() == {"1": 100}
    await target.split("3", 20, note(owner=OTHER))
    assert world.split() == {"1": 80, "3": 20}
    await target.promote(note(owner=OTHER))
    assert world.split() == {"3": 100}
    await target.claim(OWNER, 60)
    await target.load("2", uri("2"))
    await target.split("2", 10, note())
    assert world.split() == {"3": 90, "2": 10}


async def test_each_call_may_be_repeated_by_another_process(world):
    async def twice(call: str, *args: Any) -> None:
        for _ in range(2):
            await getattr(world.target(), call)(*args)

    await twice("deploy", "1", uri("1"))
    await twice("claim", OWNER, 60)
    await twice("load", "2", uri("2"))
    await twice("split", "2", 10, note())
    await twice("renew", OWNER, 60, note(look=1))
    assert world.split() == {"1": 90, "2": 10}
    await twice("promote", note(finished={"verdict": "PROMOTE"}))
    assert world.split() == {"2": 100}
    await twice("clean_up")
    assert world.split() == {"2": 100}
    for kind in ("HTTPRoute", "InferenceService"):
        texts = [str({**change, "metadata": 0}) for change in world.patches(kind)]
        assert len(texts) == len(set(texts)), texts


async def test_a_rollback_may_be_repeated(world):
    target = await world.rolling(10)
    await target.roll_back(OWNER, note())
    await world.target().roll_back(OWNER, note())
    assert world.split() == {"1": 100}


async def test_two_rollouts_refuse_each_other(world):
    await world.rolling(5)
    other = world.target()
    with pytest.raises(ConcurrentChangeError, match=f"{OWNER} holds this target"):
        await other.claim(OTHER, 60)
    with pytest.raises(ConcurrentChangeError, match="holds this target"):
        await other.split("2", 50, note(owner=OTHER))
    with pytest.raises(ConcurrentChangeError, match="holds this target"):
        await other.roll_back(OTHER, {})
    with pytest.raises(ConcurrentChangeError, match="holds this target"):
        await other.renew(OTHER, 60, note(owner=OTHER))
    assert world.split() == {"1": 95, "2": 5}


async def test_a_claim_that_ran_out_can_be_taken_and_its_owner_is_told(world):
    target = await world.rolling(5)
    world.time.now += 61
    assert (await target.state()).owner is None
    await world.target().claim(OTHER, 60)
    with pytest.raises(ConcurrentChangeError):
        await target.renew(OWNER, 60, note())
    with pytest.raises(ConcurrentChangeError):
        await target.split("2", 50, note())
    assert world.split() == {"1": 95, "2": 5}


async def test_a_claim_that_ran_out_is_renewed_by_its_owner_if_nobody_took_it(world):
    target = await world.rolling(5)
    world.time.now += 61
    await target.renew(OWNER, 60, note())
    assert (await target.state()).owner == OWNER


async def test_an_earlier_attempt_is_refused(world):
    target = await world.rolling(5)
    await target.renew(OWNER, 60, note(attempt=2))
    for name, *args in (("renew", OWNER, 60), ("split", "2", 50), ("promote",), ("roll_back", OWNER)):
        with pytest.raises(ConcurrentChangeError, match="attempt 2 of"):
            await getattr(target, name)(*args, note(attempt=1))
    assert world.split() == {"1": 95, "2": 5}


async def test_the_last_attempt_ends_the_rollout_whatever_it_says_of_attempts(world):
    target = await world.rolling(5)
    await target.renew(OWNER, 60, note(attempt=3))
    await target.promote({"owner": OWNER, "version": "2", "finished": {}})
    assert world.split() == {"2": 100}


async def test_a_version_that_serves_already_is_promoted_without_what_another_rollout_left(world):
    target = await world.rolling(5, OTHER)
    world.time.now += 61
    await target.claim(OWNER, 60)
    with pytest.raises(ConcurrentChangeError, match=r"ended from outside|has version 2 as canary, not 3"):
        await target.promote({"owner": OWNER, "version": "3", "finished": {}})
    await target.promote({"owner": OWNER, "version": "1", "finished": {}})
    state = await target.state()
    assert (state.stable, state.canary, state.owner) == ("1", None, None)
    assert world.split() == {"1": 100}


async def test_what_is_deleted_is_deployed_anew(world):
    target = await world.rolling(5)
    for kind in ("HTTPRoute", "InferenceService"):
        for found in world.api.list(kind):
            world.api.delete_now(kind, "default", found["metadata"]["name"])
    assert await target.state() is None
    await target.deploy("3", uri("3"))
    state = await target.state()
    assert (state.stable, state.canary, state.weight) == ("3", None, 0)
    assert world.split() == {"3": 100}


async def test_a_version_that_is_coming_up_is_no_canary_yet(world):
    """Whoever continues has to load it again, not to split."""
    target = world.target()
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    world.serving.startup = 100
    if world.kind == "gateway":
        world.service("2", ready=False)
    with pytest.raises(ExternalSystemError):
        await target.load("2", uri("2"))
    assert (await target.state()).canary is None
    with pytest.raises(ConcurrentChangeError, match="has no version as canary, not 2: load it first"):
        await target.split("2", 5, note())


async def test_after_the_end_a_rollout_changes_nothing_more(world):
    target = await world.rolling(5)
    await target.roll_back(OWNER, note(finished={}))
    calls = (
        ("renew", OWNER, 60, note()),
        ("split", "2", 50, note()),
        ("promote", note(finished={"verdict": "PROMOTE"})),
    )
    for name, *args in calls:
        with pytest.raises(ConcurrentChangeError, match="ended from outside"):
            await getattr(target, name)(*args)
    await target.roll_back(OWNER, note(finished={"verdict": "late"}))
    assert (await target.state()).rollout["finished"] == {}


@pytest.mark.parametrize("percent", [0, 50])
async def test_a_split_that_somebody_else_changed_is_told(world, percent):
    target = await world.rolling(5)
    world.meddle(percent)
    with pytest.raises(ConcurrentChangeError, match=rf"changed by kubectl-edit .*{percent} %|{percent}"):
        await target.renew(OWNER, 60, note())
    with pytest.raises(ConcurrentChangeError, match="changed by kubectl-edit"):
        await target.split("2", 25, note())
    assert "kubectl-edit" in (await target.state()).problem
    assert world.split().get("2", 0) == percent
    await target.roll_back(OWNER, note())
    assert world.split() == {"1": 100}


async def test_a_canary_that_cannot_start_is_told_and_gets_nothing(world):
    target = world.target()
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    if world.kind == "gateway":
        with pytest.raises(InvalidInputError, match="there is no Service fraud-v9"):
            await target.load("9", uri("9"))
        assert world.split() == {"1": 100}
        return
    world.serving.broken.add(uri("2"))
    with pytest.raises(
        InvalidInputError, match=r"version 2 of fraud cannot be served: .*cannot read s3://models/fraud/2"
    ):
        await target.load("2", uri("2"))
    assert world.split() == {"1": 100}
    await target.roll_back(OWNER, note())
    assert world.split() == {"1": 100}
    assert (await target.state()).canary is None
    await target.claim(OWNER, 60)
    await target.load("3", uri("3"))
    await target.split("3", 30, note())
    assert world.split() == {"1": 70, "3": 30}


async def test_a_canary_that_is_slow_to_start_may_be_waited_for_again(world):
    target = world.target()
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    world.serving.startup = 100
    if world.kind == "gateway":
        world.service("2", ready=False)
    with pytest.raises(ExternalSystemError, match="version 2 of fraud was not ready within 60 s"):
        await target.load("2", uri("2"))
    if world.kind == "gateway":
        world.service("2")
    await target.load("2", uri("2"))
    await target.split("2", 5, note())
    assert world.split() == {"1": 95, "2": 5}


async def test_a_version_that_was_not_loaded_gets_nothing(world):
    target = await world.rolling(5)
    with pytest.raises(ConcurrentChangeError, match="has version 2 as canary, not 3"):
        await target.split("3", 5, note())


async def test_the_champion_is_restored(world):
    target = world.target()
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    await target.restore("2", uri("2"))
    state = await target.state()
    assert (state.stable, state.canary, state.owner) == ("2", None, OWNER)
    assert world.split() == {"2": 100}
    await target.restore("2", uri("2"))
    await target.load("3", uri("3"))
    await target.split("3", 10, note())
    assert world.split() == {"2": 90, "3": 10}
    await target.restore("2", uri("2"))
    assert world.split() == {"2": 100}


async def test_what_a_lost_rollout_left_gets_no_traffic_under_the_next(world):
    await world.rolling(50)
    world.time.now += 61
    target = world.target()
    await target.claim(OTHER, 60)
    await target.load("3", uri("3"))
    assert world.split() == {"1": 100}
    state = await target.state()
    assert (state.stable, state.canary, state.weight) == ("1", "3", 0)
    await target.split("3", 5, note(owner=OTHER))
    assert world.split() == {"1": 95, "3": 5}


async def test_a_state_that_is_too_large_is_refused(world):
    target = await world.rolling(5)
    with pytest.raises(InvalidInputError, match="at most 200000"):
        await target.renew(OWNER, 60, note(judge="x" * 200_001))


@pytest.mark.parametrize("weight", [-1, 101, 12.345])
async def test_weights_that_cannot_be_had(world, weight):
    target = await world.rolling(5)
    with pytest.raises(InvalidInputError, match=r"expected"):
        await target.split("2", weight, note())
    assert world.split() == {"1": 95, "2": 5}


async def test_copies_of_requests(world):
    target = await world.rolling(0)
    if world.kind in ("knative", "standard"):
        assert not target.shadows
        with pytest.raises(InvalidInputError, match="no mirroring"):
            await target.split("2", 0, note(), shadow=True)
        return
    await target.split("2", 0, note(), shadow=True)
    state = await target.state()
    assert (state.shadow, state.weight, state.problem) == (True, 0, None)
    world.serving.settle()
    assert (world.split(), world.serving.copies("fraud")) == ({"1": 100}, ["2"])
    await target.split("2", 2.5, note())
    assert not (await target.state()).shadow
    assert world.split() == {"1": 97.5, "2": 2.5}
    assert world.serving.copies("fraud") == []


async def test_pods_are_not_restarted(world):
    target = await world.rolling(5)
    for look in range(3):
        await target.renew(OWNER, 60, note(look=look))
    await target.split("2", 100, note())
    await target.promote(note())
    await target.clean_up()
    world.serving.settle()
    assert world.serving.restarts() == 0
    for revisions in world.serving.revisions.values():
        assert [pods.version for pods in revisions] == ["1", "2"]


async def test_epochs_change_with_weights_and_versions_only(world):
    target = await world.rolling(5)
    first = (await target.state()).epoch
    await target.renew(OWNER, 60, note())
    assert (await target.state()).epoch == first
    await target.split("2", 25, note())
    second = (await target.state()).epoch
    await target.split("2", 5, note())
    assert len({first, second, (await target.state()).epoch}) == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_metrics_know_each_arm_by_a_name_of_its_own(kind):
    world = World(KubeApi(), kind)
    state = await (await world.rolling(5)).state()
    assert state is not None
    names = {
        "gateway": ("fraud-v1", "fraud-v2"),
        "two services": ("fraud-v1", "fraud-v2"),
        "standard": ("fraud-v1", "fraud-v2"),
        "knative": ("fraud-predictor-00001", "fraud-predictor-00002"),
    }
    assert (state.workloads["stable"], state.workloads["canary"]) == names[kind]
