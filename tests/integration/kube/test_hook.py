"""The hook against an API server: as a task and as a trigger, over every way to connect, through every fault."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import threading
import time
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address

import pytest
from aiohttp import web
from support.kube_api import KubeApi
from support.kube_training import until

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.hooks import _kubernetes_connection as connection
from airflow_mlops.hooks.kubernetes import (
    POD,
    RAYJOB,
    AlreadyExists,
    CustomResourceHook,
    HistoryGone,
    Resource,
)

CONTAINER = {"name": "c", "image": "i"}
HEAD = {"rayStartParams": {}, "template": {"spec": {"containers": [CONTAINER]}}}
SPEC = {"entrypoint": "true", "rayClusterSpec": {"headGroupSpec": HEAD}}


def rayjob(name, spec=SPEC, **annotations):
    meta = {"name": name, "labels": {"run": "r1"}, "annotations": annotations}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta, "spec": spec}


def connect(monkeypatch, **extra):
    monkeypatch.setenv("AIRFLOW_CONN_KUBE", json.dumps({"conn_type": "kuberay", "extra": extra}))


@pytest.fixture(params=["sync", "async"])
def call(request, kube_api, kubeconfig, monkeypatch):
    """``call("get", ...)``: the hook's method, or its asynchronous twin."""
    connect(monkeypatch, kube_config_path=str(kubeconfig))

    def made(method, *args, patience=10.0, **kwargs):
        hook = CustomResourceHook("kube", patience=patience)
        if request.param == "sync":
            return getattr(hook, method)(*args, **kwargs)
        return asyncio.run(getattr(hook, f"a{method}")(*args, **kwargs))

    return made


def test_an_object_lives(call, kube_api):
    made = call("create", RAYJOB, rayjob("a", owner="1"))
    assert made["metadata"]["uid"]
    assert call("get", RAYJOB, "a") == made
    assert call("get", RAYJOB, "b") is None
    version = made["metadata"]["resourceVersion"]
    changed = call("patch", RAYJOB, "a", {"metadata": {"annotations": {"owner": "2"}}}, resource_version=version)
    assert changed["metadata"]["annotations"]["owner"] == "2"
    with pytest.raises(ConcurrentChangeError):
        call("patch", RAYJOB, "a", {"metadata": {"annotations": {"owner": "3"}}}, resource_version=version)
    with pytest.raises(ConcurrentChangeError):
        call("delete", RAYJOB, "a", uid=made["metadata"]["uid"], resource_version=version)
    with pytest.raises(ConcurrentChangeError):
        call("delete", RAYJOB, "a", uid="another")
    assert call("delete", RAYJOB, "a", uid=made["metadata"]["uid"]) is True
    assert call("delete", RAYJOB, "a") is False
    with pytest.raises(ConcurrentChangeError):
        call("patch", RAYJOB, "a", {"metadata": {"labels": {"x": "y"}}})
    assert kube_api.list("RayJob") == []


def test_a_name_is_taken_once(call):
    call("create", RAYJOB, rayjob("a"))
    with pytest.raises(AlreadyExists, match="'a'"):
        call("create", RAYJOB, rayjob("a"))


def test_unknown_fields_and_kinds_are_refused(call, kube_api):
    if kube_api.crds is not None:
        with pytest.raises(InvalidInputError, match=r"spec\.entryPoint"):
            call("create", RAYJOB, rayjob("a", {**SPEC, "entryPoint": "x"}))
        with pytest.raises(InvalidInputError, match=r"spec\.entryPoint"):
            body = rayjob("a", {**SPEC, "entryPoint": "x"})
            call("apply", RAYJOB, body, "test")
    with pytest.raises(InvalidInputError, match="CRD installed"):
        call("create", Resource("example.org", "v1", "things", "Thing"), rayjob("a"))
    assert kube_api.list("RayJob") == []


def test_apply_creates_changes_and_respects_other_managers(call):
    body = {"metadata": {"name": "a", "labels": {"who": "one"}}, "spec": SPEC}
    call("apply", RAYJOB, body, "one")
    again = call("apply", RAYJOB, {**body, "spec": {**SPEC, "entrypoint": "false"}}, "one")
    assert again["spec"]["entrypoint"] == "false"
    stranger = {"metadata": {"name": "a", "labels": {"who": "two"}}}
    with pytest.raises(ConcurrentChangeError):
        call("apply", RAYJOB, stranger, "two")
    assert call("apply", RAYJOB, stranger, "two", force=True)["metadata"]["labels"]["who"] == "two"


def test_lists_are_whole_and_selected(call, kube_api, monkeypatch):
    monkeypatch.setattr("airflow_mlops.hooks._kubernetes.PAGE", 7)
    for number in range(20):
        kube_api.create({**rayjob(f"j{number:02}"), "status": {}})
    kube_api.create({**rayjob("other"), "metadata": {"name": "other", "labels": {"run": "r2"}}})
    items, version = call("list", RAYJOB, {"run": "r1"})
    assert [item["metadata"]["name"] for item in items] == [f"j{number:02}" for number in range(20)]
    assert {item["kind"] for item in items} == {"RayJob"}
    assert int(version) >= max(int(item["metadata"]["resourceVersion"]) for item in items)
    assert kube_api.count(method="GET", path_contains="rayjobs") == 3
    assert len(call("list", RAYJOB)[0]) == 21


def pod(name, restart="Never", **labels):
    meta = {"name": name, "labels": labels}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta,
        "spec": {"containers": [CONTAINER], "restartPolicy": restart},
    }


def test_pods_events_and_logs(call, kube_api):
    made = kube_api.create(pod("p1", cluster="c1"))
    kube_api.create(pod("p2", cluster="c2"))
    assert [found["metadata"]["name"] for found in call("pods", {"cluster": "c1"})] == ["p1"]
    about = {"kind": "Pod", "name": "p1", "namespace": "default", "uid": made["metadata"]["uid"]}
    for name, reason, when in (("e2", "Pulled", "2026-01-01T00:00:02Z"), ("e1", "Scheduled", "2026-01-01T00:00:01Z")):
        meta = {"name": name, "namespace": "default"}
        event = {"metadata": meta, "involvedObject": about, "reason": reason, "lastTimestamp": when}
        kube_api.create({"apiVersion": "v1", "kind": "Event", **event})
    assert [event["reason"] for event in call("events", "p1")] == ["Scheduled", "Pulled"]
    assert len(call("events", uid=made["metadata"]["uid"])) == 2
    assert call("events", "p2") == []
    with pytest.raises(InvalidInputError, match="name or the uid"):
        call("events")
    kube_api.add_pod_log("p1", [f"line {number}" for number in range(300)])
    assert call("pod_log", "p1").splitlines() == [f"line {number}" for number in range(100, 300)]
    assert len(call("pod_log", "p1", tail=None, container="c").splitlines()) == 300
    assert call("pod_log", "gone") == ""


FAULTS = [
    {"status": 429, "retry_after": 0.1},
    {"status": 500},
    {"status": 503},
    {"drop": True},
    {"status": 500, "when": "after"},
    {"status": 503, "when": "after"},
    {"drop": True, "when": "after"},
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_each_call_has_its_effect_once_through_faults(call, kube_api, fault, monkeypatch):
    monkeypatch.setattr("airflow_mlops.hooks._kubernetes.Backoff.after", lambda self, error=None: 0.01)

    def break_next(times=2):
        kube_api.faults.clear()
        kube_api.fault(times=times, **fault)

    break_next(1)
    made = call("create", RAYJOB, rayjob("a", owner="1"))
    break_next()
    version = made["metadata"]["resourceVersion"]
    changed = call("patch", RAYJOB, "a", {"metadata": {"annotations": {"owner": "2"}}}, resource_version=version)
    assert changed["metadata"]["annotations"]["owner"] == "2"
    break_next()
    assert call("get", RAYJOB, "a") == changed
    break_next()
    assert call("list", RAYJOB)[0][0]["metadata"] == changed["metadata"]
    break_next()
    version = changed["metadata"]["resourceVersion"]
    assert call("delete", RAYJOB, "a", uid=made["metadata"]["uid"], resource_version=version) is True
    assert kube_api.list("RayJob") == []


def test_a_deletion_that_waits_for_a_finalizer_has_begun(call, kube_api, monkeypatch):
    monkeypatch.setattr("airflow_mlops.hooks._kubernetes.Backoff.after", lambda self, error=None: 0.01)
    body = rayjob("a")
    body["metadata"]["finalizers"] = ["ray.io/x"]
    made = call("create", RAYJOB, body)
    kube_api.fault(drop=True, when="after", match=lambda method, path: method == "DELETE")
    meta = made["metadata"]
    assert call("delete", RAYJOB, "a", uid=meta["uid"], resource_version=meta["resourceVersion"]) is True
    assert kube_api.get("RayJob", "default", "a")["metadata"]["deletionTimestamp"]


def test_patience_has_an_end(call, kube_api):
    kube_api.fault(status=503, times=1000)
    began = time.monotonic()
    with pytest.raises(ExternalSystemError, match="503"):
        call("get", RAYJOB, "a", patience=1.0)
    assert time.monotonic() - began < 3


def test_a_server_that_is_not_there(call, kube_api):
    kube_api.stop()
    with pytest.raises(ExternalSystemError, match="does not answer"):
        call("get", RAYJOB, "a", patience=0.0)


def test_missing_rights_are_named(call, kube_api):
    kube_api.forbid("create", "rayjobs")
    with pytest.raises(InvalidInputError, match="lacks the verb 'create' on rayjobs in 'default'"):
        call("create", RAYJOB, rayjob("a"))


def test_a_wrong_token_says_so(call, kube_api):
    kube_api.token = "another"
    with pytest.raises(InvalidInputError, match="credentials"):
        call("get", RAYJOB, "a")


# Ways to connect


async def both(hook):
    """Whether both twins reach the server."""
    assert hook.get(RAYJOB, "a") is None
    assert await hook.aget(RAYJOB, "a") is None


async def test_a_kubeconfig_in_the_connection(kube_api, kubeconfig, monkeypatch):
    import yaml

    content = yaml.safe_load(kubeconfig.read_text())
    for value in (content, json.dumps(content)):
        connect(monkeypatch, kube_config=value)
        await both(CustomResourceHook("kube"))


async def test_the_default_kubeconfig_and_its_contexts(kube_api, kubeconfig, monkeypatch):
    import yaml

    content = yaml.safe_load(kubeconfig.read_text())
    content["contexts"].append({"name": "nobody", "context": {"cluster": "stand-in", "user": "nobody"}})
    content["users"].append({"name": "nobody", "user": {"token": "wrong"}})
    kubeconfig.write_text(yaml.safe_dump(content))
    for module in ("kubernetes", "kubernetes_asyncio"):
        monkeypatch.setattr(f"{module}.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    # No connection is needed, and the default one need not exist.
    await both(CustomResourceHook())
    await both(CustomResourceHook(cluster_context="stand-in"))
    for refused in (CustomResourceHook(cluster_context="nobody"), CustomResourceHook(cluster_context="missing")):
        with pytest.raises(InvalidInputError):
            refused.get(RAYJOB, "a")
        with pytest.raises(InvalidInputError):
            await refused.aget(RAYJOB, "a")


async def test_a_kubeconfig_given_to_the_hook(kube_api, kubeconfig):
    await both(CustomResourceHook(config_file=str(kubeconfig)))


class Lenient(KubeApi):
    """Takes the name of the authentication scheme in any case, as a real server does."""

    async def _answer(self, request):
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return await super()._answer(
            request.clone(headers={**request.headers, "Authorization": f"{scheme.capitalize()} {token}"})
        )


async def test_the_service_account_of_the_pod(crds, tmp_path, monkeypatch):
    from kubernetes.client import Configuration
    from kubernetes_asyncio.client import Configuration as AsyncConfiguration

    with Lenient(crds) as server:
        certificate(tmp_path)
        (tmp_path / "token").write_text(server.token)
        (tmp_path / "namespace").write_text("team-a\n")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
        for module, configuration in (("kubernetes", Configuration), ("kubernetes_asyncio", AsyncConfiguration)):
            loader = f"{module}.config.incluster_config"
            monkeypatch.setattr(f"{loader}.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
            monkeypatch.setattr(f"{loader}.SERVICE_CERT_FILENAME", str(tmp_path / "ca.pem"))
            # The stand-in speaks no TLS, and a pod knows no other.
            monkeypatch.setattr(configuration, "host", property(lambda _: server.url, lambda *_: None))
        monkeypatch.setattr(connection, "_ACCOUNT_NAMESPACE", tmp_path / "namespace")
        server.create_namespace("team-a")
        for extra in ({"in_cluster": True}, {}):
            connect(monkeypatch, **extra)
            hook = CustomResourceHook("kube")
            hook.create(RAYJOB, rayjob("mine"))
            assert server.get("RayJob", "team-a", "mine")
            assert (await hook.aget(RAYJOB, "mine"))["metadata"]["namespace"] == "team-a"
            assert hook.delete(RAYJOB, "mine")


async def test_namespaces_in_their_order(kubeconfig, monkeypatch, tmp_path):
    (tmp_path / "namespace").write_text("account")
    monkeypatch.setattr(connection, "_ACCOUNT_NAMESPACE", tmp_path / "namespace")
    connect(monkeypatch, namespace="connections")
    assert CustomResourceHook("kube", namespace="hooks").namespace_of("calls") == "calls"
    assert CustomResourceHook("kube", namespace="hooks").namespace_of() == "hooks"
    assert CustomResourceHook("kube").namespace_of() == "connections"
    assert await CustomResourceHook("kube").anamespace_of() == "connections"
    assert CustomResourceHook().namespace_of() == "account"
    assert CustomResourceHook(config_file=str(kubeconfig)).namespace_of() == "default"


async def test_a_connection_that_does_not_exist():
    hook = CustomResourceHook("nowhere")
    with pytest.raises(InvalidInputError, match="'nowhere' does not exist"):
        hook.get(RAYJOB, "a")
    with pytest.raises(InvalidInputError, match="'nowhere' does not exist"):
        await CustomResourceHook("nowhere").aget(RAYJOB, "a")


async def test_a_connection_that_leads_nowhere(monkeypatch, tmp_path):
    connect(monkeypatch, kube_config_path=str(tmp_path / "missing"))
    for hook in (CustomResourceHook("kube"), CustomResourceHook("kube", in_cluster=True)):
        with pytest.raises(InvalidInputError, match="leads to no Kubernetes cluster"):
            hook.get(RAYJOB, "a")
        with pytest.raises(InvalidInputError, match="leads to no Kubernetes cluster"):
            await hook.aget(RAYJOB, "a")


def certificate(folder):
    """Paths of a certificate for 127.0.0.1 that nobody signed, and of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stand-in")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
    )
    signing = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, encipher_only=False, decipher_only=False, **usage
    )
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(signing, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    return folder / "ca.pem", folder / "key.pem"


@pytest.fixture
def secure(tmp_path):
    """URL and CA of an HTTPS server that knows no RayJob."""
    authority, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, key)
    loop = asyncio.new_event_loop()
    app = web.Application()
    missing = {"kind": "Status", "code": 404, "details": {"name": "a"}}

    async def answer(request):
        return web.json_response(missing, status=404)

    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{runner.addresses[0][1]}", authority
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


async def test_certificates_are_checked_unless_told_otherwise(secure, monkeypatch):
    url, authority = secure

    def config(**cluster):
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": url, **cluster}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }

    connect(monkeypatch, kube_config=config(**{"certificate-authority": str(authority)}))
    await both(CustomResourceHook("kube"))
    connect(monkeypatch, kube_config=config(), disable_verify_ssl="true")
    await both(CustomResourceHook("kube"))
    connect(monkeypatch, kube_config=config(), disable_verify_ssl="false")
    with pytest.raises(InvalidInputError, match="not trusted"):
        CustomResourceHook("kube").get(RAYJOB, "a")
    with pytest.raises(InvalidInputError, match="not trusted"):
        await CustomResourceHook("kube").aget(RAYJOB, "a")


async def test_a_token_that_was_renewed_is_read_again(kube_api, kubeconfig, monkeypatch):
    connect(monkeypatch, kube_config_path=str(kubeconfig))
    hook = CustomResourceHook("kube")
    async with hook:
        await both(hook)
        old, kube_api.token = kube_api.token, "renewed"
        kubeconfig.write_text(kubeconfig.read_text().replace(old, "renewed"))
        await asyncio.gather(*(hook.aget(RAYJOB, "a") for _ in range(20)))
        assert hook.get(RAYJOB, "a") is None


async def test_many_tasks_share_a_connection_and_an_event_loop(kube_api, kubeconfig, monkeypatch):
    connect(monkeypatch, kube_config_path=str(kubeconfig))
    for number in range(50):
        kube_api.create(rayjob(f"j{number}"))

    def blocks(*_, **__):
        raise AssertionError("this blocks the event loop")

    monkeypatch.setattr("urllib3.PoolManager.request", blocks)
    monkeypatch.setattr("time.sleep", blocks)
    longest = 0.0
    async with CustomResourceHook("kube") as hook:
        await hook.aget(RAYJOB, "j1")
        kube_api.fault(status=503, times=3)
        work = asyncio.gather(*(hook.alist(RAYJOB) for _ in range(60)))
        while not work.done():
            # Processor time, which a busy machine does not add to.
            before = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - before)
        assert all(len(items) == 50 for items, _ in work.result())
    assert longest < 0.25


# Watches


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_watch_tells_what_happens_after_a_version(kube_api, kubeconfig, monkeypatch, kind):
    connect(monkeypatch, kube_config_path=str(kubeconfig))
    hook = CustomResourceHook("kube")
    kube_api.create(rayjob("old"))
    _, version = hook.list(RAYJOB, {"run": "r1"})
    kube_api.create(rayjob("a"))
    kube_api.put_status("RayJob", "default", "a", {"jobStatus": "RUNNING"})
    kube_api.delete("RayJob", "default", "a")

    async def collect():
        return [event async for event in hook.awatch(RAYJOB, version, {"run": "r1"}, seconds=1)]

    events = [*hook.watch(RAYJOB, version, {"run": "r1"}, seconds=1)] if kind == "sync" else asyncio.run(collect())
    told = [(kind, found["metadata"].get("name")) for kind, found in events]
    assert told[:3] == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
    assert {kind for kind, _ in told[3:]} == {"BOOKMARK"}
    kube_api.compact()
    with pytest.raises(HistoryGone):
        [*hook.watch(RAYJOB, version)] if kind == "sync" else asyncio.run(collect())


def test_a_watch_without_rights_or_server(kube_api, kubeconfig, monkeypatch):
    connect(monkeypatch, kube_config_path=str(kubeconfig))
    hook = CustomResourceHook("kube")
    kube_api.forbid("watch", "rayjobs")
    with pytest.raises(InvalidInputError, match="'watch' on rayjobs"):
        next(hook.watch(RAYJOB, "1"))
    kube_api.allow_all()
    kube_api.fault(status=429, retry_after=3, watch=True)
    with pytest.raises(ExternalSystemError, match="429"):
        next(hook.watch(RAYJOB, "1"))


# Logs


def read(hook, name, since=None):
    async def collect():
        return [line async for line in hook.alog_lines(name, since)]

    return asyncio.run(collect())


@pytest.mark.parametrize("seed", range(4))
def test_a_live_log_survives_cut_connections(kube_api, kubeconfig, monkeypatch, seed):
    connect(monkeypatch, kube_config_path=str(kubeconfig))
    monkeypatch.setattr("airflow_mlops.hooks._kubernetes.Backoff.after", lambda self, error=None: 0.005)
    rng = random.Random(seed)
    waiting = {"name": "c", "state": {"waiting": {"reason": "ContainerCreating"}}}
    kube_api.create({**pod("p"), "status": {"phase": "Pending", "containerStatuses": [waiting]}})
    wanted = [f"line {number}" for number in range(400)]

    def write():
        time.sleep(0.05)
        kube_api.put_status("Pod", "default", "p", {"phase": "Running"})
        place = 0
        while place < len(wanted):
            step = rng.randint(1, 30)
            kube_api.add_pod_log("p", wanted[place : place + step])
            place += step
            time.sleep(rng.choice([0, 0.01, 0.05]))
            if rng.random() < 0.4:
                kube_api.drop_watches()
            if rng.random() < 0.2:
                kube_api.fault(**rng.choice(FAULTS[:4]))
        kube_api.put_status("Pod", "default", "p", {"phase": "Succeeded"})

    writer = threading.Thread(target=write)
    writer.start()
    lines = read(CustomResourceHook("kube"), "p")
    writer.join()
    assert [line.text for line in lines] == wanted
    # A restarted triggerer goes on after the last line that it kept.
    half = lines[len(lines) // 2]
    rest = CustomResourceHook("kube").log_lines("p", str(half.cursor))
    assert [line.text for line in rest] == wanted[len(lines) // 2 + 1 :]
    assert [line.text for line in read(CustomResourceHook("kube"), "p", str(half.cursor))] == [
        line.text for line in rest
    ]


def test_a_live_log_outlasts_a_server_that_is_away_for_long(kube_api, kubeconfig, monkeypatch):
    connect(monkeypatch, kube_config_path=str(kubeconfig))
    kube_api.create({**pod("p"), "status": {"phase": "Running"}})
    kube_api.add_pod_log("p", ["before"])

    def outage():
        until(lambda: kube_api.count(path_contains="pods/p/log"))
        away = kube_api.fault(status=503, times=10_000)
        kube_api.drop_watches()
        time.sleep(1.5)
        kube_api.faults.remove(away)
        kube_api.add_pod_log("p", ["after"])
        kube_api.put_status("Pod", "default", "p", {"phase": "Succeeded"})

    trouble = threading.Thread(target=outage)
    trouble.start()
    assert [line.text for line in read(CustomResourceHook("kube", patience=0.2), "p")] == ["before", "after"]
    trouble.join()


def test_the_log_of_a_pod_that_is_gone_ends(kube_api, kubeconfig, monkeypatch):
    connect(monkeypatch, kube_config_path=str(kubeconfig))
    assert read(CustomResourceHook("kube"), "gone") == []


# Test of the connection


class Reviewing(KubeApi):
    """Says what an account may do, by what was forbidden."""

    async def _answer(self, request):
        if not request.path.endswith("/selfsubjectaccessreviews"):
            return await super()._answer(request)
        wanted = (await request.json())["spec"]["resourceAttributes"]
        name = "/".join(filter(None, [wanted["resource"], wanted.get("subresource")]))
        denied = any(verb in ("*", wanted["verb"]) and resource in ("*", name) for verb, resource, _ in self._forbidden)
        return web.json_response({"status": {"allowed": not denied}}, status=201)


def test_the_connection_says_what_it_lacks(crds, tmp_path, monkeypatch):
    with Reviewing(crds) as server:
        connect(monkeypatch, kube_config_path=str(server.kubeconfig(tmp_path / "config")), namespace="ml")
        hook = CustomResourceHook("kube", patience=1.0)
        good, message = hook.test_connection()
        assert good
        assert "v1.36.0" in message and "'ml'" in message
        server.forbid("delete", "rayjobs")
        server.forbid("get", "pods/log")
        good, message = hook.test_connection()
        assert not good
        assert message.endswith("in namespace 'ml' the account may not delete rayjobs.ray.io, get pods/log")
        server.token = "another"
        good, message = hook.test_connection()
        assert not good
        assert "credentials" in message
    good, message = hook.test_connection()
    assert not good
    assert "does not answer" in message


def test_a_cluster_without_kuberay(tmp_path, monkeypatch):
    class Bare(KubeApi):
        def _discovery(self, parts):
            return None if parts[:2] == ["apis", "ray.io"] else super()._discovery(parts)

    with Bare(None) as server:
        connect(monkeypatch, kube_config_path=str(server.kubeconfig(tmp_path / "config")))
        good, message = CustomResourceHook("kube").test_connection()
    assert not good
    assert "install KubeRay 1.6" in message


def test_the_connection_page_finds_the_hook(kubeconfig, monkeypatch):
    from airflow.sdk import BaseHook

    connect(monkeypatch, kube_config_path=str(kubeconfig))
    made = CustomResourceHook(**{CustomResourceHook.conn_name_attr: "kube"})
    assert made.namespace_of() == "default"
    assert BaseHook.get_connection("kube").conn_type == CustomResourceHook.conn_type
    assert POD.api_version == "v1"
