"""What KServe, Knative and gateways do that one does not expect, and what people do meanwhile."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from support.kube_api import KubeApi
from support.kube_serving import GATEWAY, MODE, MemoryClient
from support.rollout_world import CONFIGS, KINDS, OWNER, World, note, uri

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout import watchdog
from airflow_mlops.rollout.targets.factory import cluster_target
from airflow_mlops.rollout.targets.watch import CONFIG_VARIABLE, NUMBER_VARIABLE


def isvc(world: World) -> dict[str, Any]:
    found = world.api.get("InferenceService", "default", "fraud")
    assert found is not None
    return found


def of_others(world: World, mode: str, **predictor: Any) -> None:
    """An InferenceService that somebody has deployed by hand."""
    spec = {"predictor": {"model": {"modelFormat": {"name": "mlflow"}, "storageUri": uri("1")}, **predictor}}
    meta = {"name": "fraud", "annotations": {MODE: mode}}
    world.api.create(
        {"kind": "InferenceService", "apiVersion": "serving.kserve.io/v1beta1", "metadata": meta, "spec": spec}
    )
    world.serving.settle()


# Knative mode


async def test_the_percent_is_never_taken_away():
    """Without the field KServe gives the latest revision everything."""
    world = World(KubeApi(), "knative")
    target = await world.rolling(5)
    await target.split("2", 50, note())
    await target.roll_back(OWNER, note())
    await target.clean_up()
    for change in world.patches("InferenceService"):
        predictor = change["spec"]["predictor"]
        assert predictor.get("canaryTrafficPercent", 0) is not None
        # A new revision always comes with no traffic.
        assert "model" not in predictor or predictor.get("canaryTrafficPercent", 0) == 0


async def test_after_a_rollback_the_latest_revision_is_not_the_bad_one():
    world = World(KubeApi(), "knative")
    target = await world.rolling(100)
    before = isvc(world)["status"]["components"]["predictor"]
    assert before["latestRolledoutRevision"] == "fraud-predictor-00002"
    await target.roll_back(OWNER, note())
    world.serving.settle()
    assert isvc(world)["spec"]["predictor"]["model"]["storageUri"] == uri("1")
    assert world.split() == {"1": 100}
    # Even when somebody now takes the field away.
    world.api.patch("InferenceService", "default", "fraud", {"spec": {"predictor": {"canaryTrafficPercent": None}}})
    assert world.split() == {"1": 100}


async def test_traffic_leaves_before_the_stable_model_comes_back():
    """Otherwise KServe's last rolled out revision would be the bad one, and stay."""
    world = World(KubeApi(), "knative")
    target = await world.rolling(100)
    world.client.patches.clear()
    await target.roll_back(OWNER, note())
    percents = [each["spec"]["predictor"] for each in world.patches("InferenceService")]
    assert percents[0] == {"canaryTrafficPercent": 0}
    assert percents[1]["model"] == {"storageUri": uri("1")}


async def test_the_first_revision_that_never_came_up_has_nothing_to_go_back_to():
    world = World(KubeApi(), "knative")
    world.serving.broken.add(uri("1"))
    target = world.target()
    with pytest.raises(InvalidInputError, match="cannot be served: BlockedByFailedLoad: ModelLoadFailed cannot read"):
        await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    with pytest.raises(ExternalSystemError, match="has no revision with all traffic to go back to"):
        await target.load("2", uri("2"))


@pytest.mark.parametrize("mode", ["knative", "standard"])
async def test_an_inference_service_of_others_is_taken_over_as_it_is(mode):
    world = World(KubeApi(), mode)
    of_others(world, "Serverless" if mode == "knative" else "Standard")
    target = world.target()
    state = await target.state()
    assert (state.stable, state.ready) == (uri("1"), {"stable"})
    await target.claim(OWNER, 60)
    await target.restore("1", uri("1"))
    assert (await target.state()).stable == "1"
    assert world.patches("InferenceService") == []
    await target.load("2", uri("2"))
    await target.split("2", 10, note())
    assert world.serving.split("fraud") in ({"": 90, "2": 10},)
    await target.split("2", 100, note())
    await target.promote(note())
    await target.clean_up()
    assert world.split() == {"2": 100}


@pytest.mark.parametrize("mode", ["knative", "standard"])
async def test_a_canary_of_others_is_left_alone(mode):
    world = World(KubeApi(), mode)
    of_others(world, "Serverless" if mode == "knative" else "Standard")
    model = {"modelFormat": {"name": "mlflow"}, "storageUri": uri("7")}
    change: dict[str, Any] = {"predictor": {"model": model, "canaryTrafficPercent": 10}}
    if mode == "standard":
        change = {"canary": [{"trafficPercent": 10, "predictor": {"name": "theirs", "minReplicas": 1, "model": model}}]}
    world.api.patch("InferenceService", "default", "fraud", {"spec": change})
    world.serving.settle()
    target = world.target()
    await target.claim(OWNER, 60)
    with pytest.raises(ConcurrentChangeError, match="has a canary that no rollout of this package made"):
        await target.load("2", uri("2"))


@pytest.mark.parametrize("mode", ["knative", "standard"])
async def test_a_model_that_somebody_else_changes_in_mid_rollout(mode):
    world = World(KubeApi(), mode)
    target = await world.rolling(5)
    change = {"spec": {"predictor": {"labels": {"mlops.airflow.org/version": "7"}, "name": "other"}}}
    world.api.patch("InferenceService", "default", "fraud", change)
    with pytest.raises(ConcurrentChangeError, match="InferenceService fraud was changed by"):
        await target.renew(OWNER, 60, note())
    with pytest.raises(ConcurrentChangeError, match="InferenceService fraud was changed by"):
        await target.split("2", 25, note())


@pytest.mark.parametrize(("kind", "mode"), [("knative", "Standard"), ("standard", "Serverless")])
async def test_the_other_mode_is_told(kind, mode):
    world = World(KubeApi(), kind)
    of_others(world, mode)
    target = world.target()
    await target.claim(OWNER, 60)
    with pytest.raises(InvalidInputError, match="and this target is for"):
        await target.load("2", uri("2"))


async def test_a_model_named_by_its_framework_is_told():
    world = World(KubeApi(), "knative")
    spec = {"predictor": {"sklearn": {"storageUri": uri("1")}}}
    world.api.create(
        {
            "kind": "InferenceService",
            "apiVersion": "serving.kserve.io/v1beta1",
            "metadata": {"name": "fraud"},
            "spec": spec,
        }
    )
    target = world.target()
    await target.claim(OWNER, 60)
    with pytest.raises(InvalidInputError, match=r"in spec.predictor.sklearn; expected spec.predictor.model"):
        await target.load("2", uri("2"))


async def test_both_modes_of_one_inference_service_refuse_each_other():
    world = World(KubeApi(), "knative")
    await world.target().claim(OWNER, 60)
    with pytest.raises(ConcurrentChangeError, match="holds this target"):
        await world.target(config={"mode": "standard"}).claim("another", 60)


# Standard mode


async def test_a_release_without_weights_is_told():
    world = World(KubeApi(), "standard", weights=False)
    target = world.target()
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    await target.load("2", uri("2"))
    with pytest.raises(InvalidInputError, match=r"KServe release without canary weights in Standard mode.*Upgrade"):
        await target.split("2", 5, note())
    # The status says 5, the route says the truth.
    assert isvc(world)["status"]["canaryStatuses"][0]["trafficPercent"] == 5
    state = await target.state()
    assert (state.weight, state.configured) == (0, 5)
    await target.roll_back(OWNER, note())
    assert world.split() == {"1": 100}


async def test_a_cluster_without_gateway_api_is_told():
    world = World(KubeApi(), "standard", gateway_api=False)
    with pytest.raises(InvalidInputError, match="set enableGatewayApi"):
        await world.target().deploy("1", uri("1"))


async def test_a_canary_that_fails_in_mid_rollout_has_no_traffic_and_the_reading_says_so():
    world = World(KubeApi(), "standard")
    target = await world.rolling(25)
    world.serving.broken.add(uri("2"))
    world.serving.settle()
    state = await target.state()
    assert (state.weight, state.configured, state.ready) == (0, 25, {"stable"})
    assert "the canary is not ready" in state.problem


async def test_the_old_version_stays_warm_until_the_clean_up():
    world = World(KubeApi(), "standard")
    target = await world.rolling(100)
    await target.promote(note())
    world.serving.settle()
    spec = isvc(world)["spec"]
    assert spec["predictor"]["name"] == "v2"
    assert [(each["predictor"]["name"], each["trafficPercent"]) for each in spec["canary"]] == [("v1", 0)]
    assert spec["canary"][0]["predictor"]["minReplicas"] == 1
    await target.claim(OWNER, 60)
    began = world.time.now
    await target.restore("1", uri("1"))
    # Nothing had to start.
    assert world.time.now - began <= 6
    assert world.split() == {"1": 100}
    assert world.serving.restarts() == 0
    await target.clean_up()
    assert "canary" not in isvc(world)["spec"]


async def test_what_only_a_stable_predictor_may_have_moves_with_the_role():
    world = World(KubeApi(), "standard")
    template = {
        "maxReplicas": 4,
        "scaleMetric": "cpu",
        "minReplicas": 2,
        "model": {"resources": {"limits": {"cpu": "1"}}},
    }
    target = world.target(config={"predictor": template})
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    await target.load("2", uri("2"))
    canary = isvc(world)["spec"]["canary"][0]["predictor"]
    assert "maxReplicas" not in canary
    assert canary["minReplicas"] == 2
    assert canary["model"]["resources"] == {"limits": {"cpu": "1"}}
    await target.split("2", 100, note())
    await target.promote(note())
    spec = isvc(world)["spec"]
    assert (spec["predictor"]["maxReplicas"], spec["predictor"]["scaleMetric"]) == (4, "cpu")
    assert "maxReplicas" not in spec["canary"][0]["predictor"]


# Gateway API


async def test_a_route_that_its_gateway_refuses_is_told():
    world = World(KubeApi(), "gateway")
    target = await world.rolling(5)
    world.serving.refusal = "no listener of that name"
    with pytest.raises(ExternalSystemError, match="no listener of that name"):
        await target.split("2", 25, note())
    assert world.serving.split("fraud") == {"1": 95, "2": 5}
    state = await target.state()
    assert "gateway gateway does not take HTTPRoute fraud (Accepted=False" in state.problem
    world.serving.refusal = ""
    await target.split("2", 25, note())
    assert world.split() == {"1": 75, "2": 25}


async def test_a_route_that_its_gateway_has_not_seen_is_not_in_force():
    world = World(KubeApi(), "gateway")
    target = await world.rolling(5)
    world.serving.lag = 5
    await target.split("2", 25, note())
    assert world.serving.split("fraud") == {"1": 75, "2": 25}


async def test_a_route_of_others_keeps_everything_else():
    world = World(KubeApi(), "gateway")
    header = {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x", "value": "y"}]}}
    rules = [
        {"matches": [{"path": {"type": "PathPrefix", "value": "/docs"}}], "backendRefs": [{"name": "docs", "port": 1}]},
        {
            "filters": [header],
            "timeouts": {"request": "5s"},
            "backendRefs": [{"name": "fraud-v1", "port": 8080, "filters": [header]}],
        },
    ]
    spec = {"parentRefs": [{"name": "gateway"}], "rules": rules}
    meta = {"name": "fraud", "annotations": {"theirs": "1"}}
    world.api.create(
        {"kind": "HTTPRoute", "apiVersion": "gateway.networking.k8s.io/v1", "metadata": meta, "spec": spec}
    )
    world.api.create({"kind": "Service", "metadata": {"name": "docs", "labels": {"mlops.airflow.org/version": "docs"}}})
    target = world.target(config={"port": 8080})
    state = await target.state()
    assert (state.stable, state.weight) == ("1", 0)
    await target.claim(OWNER, 60)
    await target.load("2", uri("2"))
    await target.split("2", 0, note(), shadow=True)
    await target.split("2", 0.5, note())
    found = world.api.get("HTTPRoute", "default", "fraud")
    assert found["spec"]["rules"][0] == rules[0]
    ours = found["spec"]["rules"][1]
    assert ours["filters"] == [header]
    assert ours["timeouts"] == {"request": "5s"}
    assert ours["backendRefs"] == [
        {"name": "fraud-v1", "port": 8080, "filters": [header], "weight": 9950},
        {"name": "fraud-v2", "port": 8080, "weight": 50},
    ]
    assert (await target.state()).weight == 0.5
    await target.roll_back(OWNER, note())
    found = world.api.get("HTTPRoute", "default", "fraud")
    assert found["spec"]["rules"][1]["backendRefs"] == [{**rules[1]["backendRefs"][0], "weight": 100}]
    assert found["metadata"]["annotations"] == {"theirs": "1"}


async def test_a_rule_that_leads_elsewhere_too_is_refused():
    world = World(KubeApi(), "gateway")
    target = await world.rolling(5)
    rules = world.api.get("HTTPRoute", "default", "fraud")["spec"]["rules"]
    rules[0]["backendRefs"].append({"name": "fraud-v3", "port": 80, "weight": 10})
    world.api.patch("HTTPRoute", "default", "fraud", {"spec": {"rules": rules}})
    with pytest.raises(ConcurrentChangeError, match="also leads to fraud-v3"):
        await target.renew(OWNER, 60, note())


async def test_a_route_whose_backends_were_replaced_is_told():
    world = World(KubeApi(), "gateway")
    target = await world.rolling(5)
    rules = [{"backendRefs": [{"name": "fraud-v3", "port": 80}]}]
    world.api.patch("HTTPRoute", "default", "fraud", {"spec": {"rules": rules}})
    for call in (("renew", OWNER, 60, note()), ("split", "2", 25, note())):
        with pytest.raises(ConcurrentChangeError, match="no rule of HTTPRoute fraud leads to"):
            await getattr(target, call[0])(*call[1:])


async def test_a_route_that_was_deleted_is_told():
    world = World(KubeApi(), "gateway")
    target = await world.rolling(5)
    world.api.delete("HTTPRoute", "default", "fraud")
    assert await target.state() is None
    with pytest.raises(ConcurrentChangeError, match="HTTPRoute fraud is gone"):
        await target.split("2", 25, note())


async def test_without_a_route_and_a_gateway_nothing_is_deployed():
    world = World(KubeApi(), "gateway")
    target = world.target(config={"gateway": None})
    with pytest.raises(InvalidInputError, match="no HTTPRoute fraud and no gateway to attach one to"):
        await target.deploy("1", uri("1"))


async def test_a_service_without_addresses_is_told():
    world = World(KubeApi(), "gateway")
    world.service("1", ready=False)
    with pytest.raises(ExternalSystemError, match="Service fraud-v1 has no address that is ready"):
        await world.target().deploy("1", uri("1"))


async def test_an_inference_service_that_serves_something_else_is_not_taken():
    world = World(KubeApi(), "two services")
    target = world.target()
    await target.deploy("1", uri("1"))
    with pytest.raises(ConcurrentChangeError, match="InferenceService fraud-v1 is there and serves 1 from"):
        await world.target().deploy("1", "s3://elsewhere/1")


async def test_two_services_are_released_one_by_one():
    world = World(KubeApi(), "two services")
    target = await world.rolling(100)
    names = lambda: [each["metadata"]["name"] for each in world.api.list("InferenceService")]  # noqa: E731
    await target.promote(note())
    assert names() == ["fraud-v1", "fraud-v2"]
    await target.claim(OWNER, 60)
    await target.load("3", uri("3"))
    assert names() == ["fraud-v2", "fraud-v3"]
    await target.split("3", 5, note())
    await target.roll_back(OWNER, note())
    await target.clean_up()
    assert names() == ["fraud-v2"]


# The watchdog

DOG = {"watchdog": {"image": "registry/airflow-mlops:1", "service_account": "rollout-watchdog"}}


async def start(world: World, weight: float = 5) -> Any:
    target = world.target(config=DOG)
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    await target.load("2", uri("2"))
    await target.split("2", weight, note())
    return target


def dog_of(world: World, number: int) -> tuple[Any, int]:
    """What runs in the Job's pod."""
    job = world.api.get("Job", "default", f"rollout-{CONFIGS[world.kind]['kind']}-fraud-dog-{number}")
    assert job is not None
    container = job["spec"]["template"]["spec"]["containers"][0]
    given = {each["name"]: each["value"] for each in container["env"]}
    config = json.loads(given[CONFIG_VARIABLE])
    times = {"clock": world.time.clock, "sleep": world.time.sleep}
    return cluster_target(config, MemoryClient(world.api), **times), int(given[NUMBER_VARIABLE])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_canary_that_nobody_renews_is_ended_by_the_cluster(kind):
    world = World(KubeApi(), kind)
    target = await start(world, 25)
    assert target.unattended is None
    dog, number = dog_of(world, 1)
    began = world.time.now
    await watchdog.watch(dog, number, world.time.sleep)
    assert world.serving.split("fraud") == {"1": 100}
    # The claim lasts 60 seconds, and as long again for its owner to come back.
    assert 110 < world.time.now - began < 150
    state = await target.state()
    assert (state.owner, state.weight, state.configured, state.canary) == (None, 0, 0, "2")
    # Its owner comes back: the state is there, and it goes on.
    await target.renew(OWNER, 60, note(judge="state"))
    await target.split("2", 25, note(judge="state"))
    assert world.split() == {"1": 75, "2": 25}
    assert await dog.expire(number, 60)
    dog, number = dog_of(world, 2)
    assert not await dog.expire(number, 60)
    await target.roll_back(OWNER, note(finished={}))
    waits = world.time.waits
    await watchdog.watch(dog, number, world.time.sleep)
    assert world.time.waits == waits


@pytest.mark.parametrize("kind", KINDS)
async def test_a_canary_that_is_renewed_is_left_alone(kind):
    world = World(KubeApi(), kind)
    target = await start(world)
    dog, number = dog_of(world, 1)
    for _ in range(5):
        world.time.now += 50
        await target.renew(OWNER, 60, note())
        assert not await dog.expire(number, 60)
    assert world.split() == {"1": 95, "2": 5}
    await target.promote(note(finished={}))
    assert await dog.expire(number, 60)
    assert world.split() == {"2": 100}


async def test_the_watchdog_goes_on_when_the_server_is_away():
    world = World(KubeApi(), "gateway")
    await start(world)
    dog, number = dog_of(world, 1)
    failures = iter([ExternalSystemError("away"), ConcurrentChangeError("race")])

    def fail(call: int, after: bool) -> None:
        if error := next(failures, None):
            raise error

    dog.client.kill = fail
    await watchdog.watch(dog, number, world.time.sleep)
    assert world.split() == {"1": 100}


async def test_without_a_watchdog_the_target_says_what_that_means():
    world = World(KubeApi(), "gateway")
    assert "nothing takes traffic from the canary of fraud when Airflow is gone" in world.target().unattended


async def test_the_watchdog_needs_no_copy_of_it(monkeypatch):
    world = World(KubeApi(), "gateway")
    target = await start(world)
    await target.split("2", 25, note())
    await target.split("2", 50, note())
    assert len(world.api.list("Job")) == 1
    job = world.api.list("Job")[0]["spec"]
    assert job["template"]["spec"]["serviceAccountName"] == "rollout-watchdog"
    assert job["activeDeadlineSeconds"] >= 24 * 3600
    assert job["ttlSecondsAfterFinished"] > 0


def test_the_watchdog_says_what_it_lacks(monkeypatch, caplog):
    for name in (CONFIG_VARIABLE, NUMBER_VARIABLE, "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert watchdog.main() == 2
    assert CONFIG_VARIABLE in caplog.text
    monkeypatch.setenv(CONFIG_VARIABLE, json.dumps(CONFIGS["gateway"]))
    monkeypatch.setenv(NUMBER_VARIABLE, "1")
    assert watchdog.main() == 2
    assert "runs in no pod" in caplog.text


async def test_two_that_load_at_once_do_not_both_win():
    """Two tasks that take an expired claim at the same time: one of them is told."""
    world = World(KubeApi(), "gateway")
    await world.target().deploy("1", uri("1"))
    clients = [MemoryClient(world.api), MemoryClient(world.api)]
    owners = [f"dag/canary/run-{number}/-1" for number in (1, 2)]
    results = await asyncio.gather(
        *(world.target(client).claim(owner, 60) for client, owner in zip(clients, owners)), return_exceptions=True
    )
    assert sorted(type(each) for each in results if each) == [ConcurrentChangeError]
    assert GATEWAY
