"""Rollouts through the hook and over HTTP: every manifest checked by its CRD, answers lost, versions overtaken."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import yaml
from support.kube_serving import Serving
from support.rollout_world import CONFIGS, KINDS, OWNER, World, note, uri

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.hooks import _kubernetes
from airflow_mlops.hooks.kubernetes import CustomResourceHook
from airflow_mlops.rollout import watchdog
from airflow_mlops.rollout.targets.factory import cluster_target
from airflow_mlops.rollout.targets.incluster import InClusterClient
from airflow_mlops.rollout.targets.kube import HTTPROUTE, ISVC, JOB, LEASE

ROOT = pathlib.Path(__file__).parents[3]
ROLES = {
    document["metadata"]["name"]: document["rules"]
    for document in yaml.safe_load_all((ROOT / "docker/kubernetes/rbac.yaml").read_text())
    if document["kind"] == "Role"
}
DOG = {"watchdog": {"image": "registry/airflow-mlops:1", "service_account": "rollout-watchdog"}}


def rights(role: str) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in ROLES[role]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.fixture
async def hook(kubeconfig, monkeypatch):
    connection = {"conn_type": "kuberay", "extra": {"kube_config_path": str(kubeconfig), "namespace": "default"}}
    monkeypatch.setenv("AIRFLOW_CONN_KUBE", json.dumps(connection))
    monkeypatch.setattr(_kubernetes.Backoff, "after", lambda self, error=None: 0.001)
    async with CustomResourceHook("kube", patience=5.0) as opened:
        yield opened


@pytest.fixture
def account(kube_api, tmp_path) -> pathlib.Path:
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "token").write_text(kube_api.token)
    (folder / "namespace").write_text("default")
    return folder


async def roll_out(world: World, verdict: str = "PROMOTE", **config: Any) -> None:
    target = world.target(config={**DOG, **config})
    await target.deploy("1", uri("1"))
    await target.claim(OWNER, 60)
    await target.load("2", uri("2"))
    for weight in (5, 50, 100):
        await target.renew(OWNER, 60, note())
        await target.split("2", weight, note())
        assert (await target.state()).weight == weight
    if target.shadows:
        await target.split("2", 0, note(), shadow=True)
        assert (await target.state()).shadow
    end = note(finished={"verdict": verdict})
    await (target.promote(end) if verdict == "PROMOTE" else target.roll_back(OWNER, end))
    await target.clean_up()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verdict", ["PROMOTE", "ROLLBACK"])
async def test_a_rollout_passes_the_schemas(kube_api, hook, kind, verdict):
    world = World(kube_api, kind, hook)
    await roll_out(world, verdict)
    assert world.split() == {"2" if verdict == "PROMOTE" else "1": 100}
    if kube_api.crds is None:
        pytest.skip("no CRDs at hand: what was written was not checked")
    for name in ("InferenceService", "HTTPRoute"):
        for found in kube_api.list(name):
            assert kube_api.crds.errors(found) == []
    assert {request.query.get("fieldValidation") for request in kube_api.requests if request.method == "POST"} == {
        "Strict"
    }


@pytest.mark.parametrize("kind", KINDS)
async def test_a_misspelt_field_of_the_predictor_is_refused(kube_api, hook, kind):
    if kind == "gateway":
        pytest.skip("it makes no predictor")
    if kube_api.crds is None:
        pytest.skip("no CRDs at hand")
    world = World(kube_api, kind, hook)
    with pytest.raises(InvalidInputError, match=r'unknown field "spec.predictor.minReplica"'):
        await world.target(config={"predictor": {"minReplica": 2}}).deploy("1", uri("1"))


def fates(kube_api: Any, methods: tuple[str, ...] = ("POST", "PATCH", "DELETE"), **fault: Any) -> None:
    """Let every write fail once, in the way that ``fault`` says."""
    told: set[tuple[str, str, int]] = set()
    counts: dict[tuple[str, str], int] = {}

    def match(method: str, path: str) -> bool:
        if method not in methods:
            return False
        number = counts[method, path] = counts.get((method, path), 0) + 1
        # The second of two is the first one's repetition.
        return number % 2 == 1 and not told.add((method, path, number))

    kube_api.fault(match=match, times=10**6, watch=False, **fault)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fault",
    [{"drop": True, "when": "after"}, {"status": 500, "when": "after"}, {"status": 503, "when": "before"}],
    ids=["cut", "500", "503"],
)
async def test_every_answer_is_lost_once(kube_api, hook, kind, fault):
    world = World(kube_api, kind, hook)
    fates(kube_api, **fault)
    await roll_out(world)
    assert world.split() == {"2": 100}
    assert world.serving.restarts() == 0
    assert len(kube_api.list("Job")) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_every_version_is_overtaken_once(kube_api, hook, kind):
    """A controller writes a status, somebody a label: that is no change of the split."""
    world = World(kube_api, kind, hook)
    fates(kube_api, ("POST", "PATCH"), status=409, when="before")
    await roll_out(world)
    assert world.split() == {"2": 100}


@pytest.mark.parametrize("kind", KINDS)
async def test_the_server_is_away(kube_api, hook, kind):
    world = World(kube_api, kind, hook)
    target = await world.rolling(5)
    hook.patience = 0.01
    fault = kube_api.fault(status=503, times=10**6)
    for name, *args in (("state",), ("renew", OWNER, 60, note()), ("split", "2", 25, note()), ("roll_back", OWNER, {})):
        with pytest.raises(ExternalSystemError):
            await getattr(target, name)(*args)
    kube_api.faults.remove(fault)
    hook.patience = 5.0
    assert world.split() == {"1": 95, "2": 5}
    await target.roll_back(OWNER, note())
    assert world.split() == {"1": 100}


async def test_the_roles_are_what_rollouts_ask_for(kube_api, hook):
    """All kinds of targets together use each right of the role, and no other."""
    kube_api.role = ROLES["airflow-mlops-rollout"]
    for kind in KINDS:
        for name in ("InferenceService", "HTTPRoute", "Lease", "Job", "Service", "EndpointSlice"):
            for found in kube_api.list(name):
                kube_api.delete_now(name, "default", found["metadata"]["name"])
        await roll_out(World(kube_api, kind, hook))
    assert kube_api.used == rights("airflow-mlops-rollout")


async def test_the_role_of_the_watchdog_is_what_it_asks_for(kube_api, hook, account):
    used = set()
    for kind in KINDS:
        for name in ("InferenceService", "HTTPRoute", "Lease", "Job", "Service", "EndpointSlice"):
            for found in kube_api.list(name):
                kube_api.delete_now(name, "default", found["metadata"]["name"])
        kube_api.role = None
        world = World(kube_api, kind, hook)
        await world.rolling(25)
        kube_api.role = ROLES["airflow-mlops-rollout-watchdog"]
        kube_api.used.clear()
        await watchdog.watch(world.target(InClusterClient(kube_api.url, account)), 1, world.time.sleep)
        used |= kube_api.used
        assert world.split() == {"1": 100}
    assert used == rights("airflow-mlops-rollout-watchdog")


async def test_a_missing_right_is_told(kube_api, hook):
    world = World(kube_api, "gateway", hook)
    kube_api.forbid("create", "leases")
    with pytest.raises(InvalidInputError, match="lacks the verb 'create' on leases"):
        await world.target().claim(OWNER, 60)


# The watchdog's own client


async def test_the_watchdogs_client_keeps_the_protocol(kube_api, account):
    client = InClusterClient(kube_api.url, account)
    assert await client.aget(LEASE, "a") is None
    body = {
        "apiVersion": LEASE.api_version,
        "kind": "Lease",
        "metadata": {"name": "a", "labels": {"x": "1"}},
        "spec": {},
    }
    made = await client.acreate(LEASE, body)
    with pytest.raises(ConcurrentChangeError):
        await client.acreate(LEASE, body)
    version = made["metadata"]["resourceVersion"]
    changed = await client.apatch(LEASE, "a", {"spec": {"leaseTransitions": 1}}, resource_version=version)
    assert changed["spec"] == {"leaseTransitions": 1}
    for name, given in (("a", version), ("b", None)):
        with pytest.raises(ConcurrentChangeError):
            await client.apatch(LEASE, name, {"spec": {"leaseTransitions": 2}}, resource_version=given)
    found, _ = await client.alist(LEASE, {"x": "1"})
    assert [each["metadata"]["name"] for each in found] == ["a"]
    assert await client.adelete(LEASE, "a") is True
    assert await client.adelete(LEASE, "a") is False


async def test_the_watchdogs_client_tells_what_may_mend(kube_api, account):
    client = InClusterClient(kube_api.url, account)
    for fault in ({"status": 503}, {"status": 429}, {"drop": True}):
        kube_api.fault(**fault)
        with pytest.raises(ExternalSystemError):
            await client.aget(LEASE, "a")
    kube_api.forbid("get", "leases")
    with pytest.raises(ExternalSystemError, match="HTTP 403"):
        await client.aget(LEASE, "a")
    (account / "token").write_text("old")
    with pytest.raises(ExternalSystemError, match="HTTP 401"):
        await client.aget(ISVC, "a")
    (account / "token").write_text(kube_api.token)
    assert await client.aget(ISVC, "a") is None
    if kube_api.crds is not None:
        with pytest.raises(InvalidInputError, match="HTTP 400"):
            await client.acreate(ISVC, {"apiVersion": "v1", "kind": "Wrong", "metadata": {"name": "a"}})


def test_the_watchdog_imports_next_to_nothing():
    # The judge's package brings numpy, which is at hand wherever this package is installed.
    heavy = ("airflow", "scipy", "pandas", "aiohttp", "kubernetes", "mlflow", "ray")
    code = f"import sys, airflow_mlops.rollout.watchdog; sys.exit(', '.join(set({heavy!r}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# A live cluster


@pytest.fixture
async def live(cluster, kubeconfig, monkeypatch):
    """A hook for the stand-in or the live cluster, and how a target waits there."""
    if cluster.live:
        monkeypatch.delenv("AIRFLOW_CONN_KUBE", raising=False)
        async with CustomResourceHook(config_file=os.environ["KUBECONFIG"], namespace=cluster.namespace) as opened:
            yield opened, {}
        return
    connection = {"conn_type": "kuberay", "extra": {"kube_config_path": str(_config(cluster, kubeconfig))}}
    monkeypatch.setenv("AIRFLOW_CONN_KUBE", json.dumps(connection))
    async with CustomResourceHook("kube", namespace=cluster.namespace) as opened:
        yield opened, {"poll": 0.01}


def _config(cluster: Any, beside: pathlib.Path) -> pathlib.Path:
    return cluster.api.kubeconfig(beside.parent / "live-kubeconfig")


async def test_a_claim_on_a_live_cluster(cluster, live):
    """The Lease as a real API server takes it: created, prolonged, freed, refused to others."""
    client, options = live
    name = cluster.name("fraud")
    config = {"kind": "gateway", "name": name, "service": f"{name}-{{version}}", "namespace": cluster.namespace, **DOG}
    target = cluster_target(config, client, **options)
    try:
        await target.claim(OWNER, 60)
        await target.renew(OWNER, 60, note(step=1))
        with pytest.raises(ConcurrentChangeError):
            await target.claim("another", 60)
        claim = await target.lease.read()
        assert (claim.holder, claim.number, claim.rollout["step"]) == (OWNER, 1, 1)
        assert target.watchdog is not None
        # Not to be run here: the image does not exist.
        body = target.watchdog.manifest(claim)
        await client.acreate(JOB, {**body, "spec": {**body["spec"], "suspend": True}})
        await target.roll_back(OWNER, note(finished={}))
        assert (await target.lease.read()).holder is None
        await target.claim("another", 60)
        assert (await target.lease.read()).number == 2
    finally:
        await client.adelete(LEASE, target.lease.name)
        await client.adelete(JOB, f"rollout-gateway-{name}-dog-1"[:63])


async def test_a_rollout_on_a_live_cluster(cluster, live):
    """With KServe: ``KUBE_MODEL_URIS`` (two, comma-separated), ``KUBE_KSERVE`` (a target's JSON without its name)."""
    client, options = live
    name = cluster.name("m")
    if cluster.live and not os.environ.get("KUBE_MODEL_URIS"):
        pytest.skip('no models to serve: KUBE_MODEL_URIS=s3://...,s3://... and KUBE_KSERVE=\'{"mode": "standard"}\'')
    given = json.loads(os.environ.get("KUBE_KSERVE") or "{}") if cluster.live else {}
    uris = (
        (os.environ.get("KUBE_MODEL_URIS") or "s3://m/1,s3://m/2").split(",")
        if cluster.live
        else ["s3://m/1", "s3://m/2"]
    )
    config = {"mode": "standard", **given, "kind": "kserve", "name": name, "namespace": cluster.namespace}
    if not cluster.live:
        serving = Serving(cluster.api)

        async def sleep(seconds: float) -> None:
            serving.step()

        options = {**options, "sleep": sleep}
    target = cluster_target(config, client, **options)
    try:
        await target.deploy("1", uris[0])
        await target.claim(OWNER, 600)
        await target.load("2", uris[1])
        for weight in (10, 50):
            await target.split("2", weight, note())
            assert (await target.state()).weight == weight
        await target.roll_back(OWNER, note())
        assert (await target.state()).weight == 0
        await target.clean_up()
    finally:
        for kind, found in ((ISVC, name), (HTTPROUTE, name), (LEASE, target.lease.name)):
            await client.adelete(kind, found)


def test_every_kind_is_tested():
    assert set(KINDS) == set(CONFIGS)
