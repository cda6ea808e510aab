"""RayJobsHook against a stand-in for Ray's dashboard: adoption, tokens, the API server's proxy, logs."""

from __future__ import annotations

import asyncio
import json
import random
from datetime import datetime, timedelta, timezone

import pytest
from support.ray_dashboard import RayDashboard

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.hooks import ray as module
from airflow_mlops.hooks.ray import AccessRefusedError, RayJobsHook

TEXT = "".join(f"line {i}: 98 % – größer\n" if i % 7 else "\n" for i in range(60)) + "the end without a newline"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(module, "SUBMIT_PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(module, "LOG_PAUSE", 0.01)


@pytest.fixture
def ray(monkeypatch):
    with RayDashboard() as dashboard:
        monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", dashboard.connection())
        yield dashboard


async def collect(lines, until: int | None = None) -> list[tuple[int, str]]:
    found = []
    async for entry in lines:
        found.append(entry)
        if len(found) == until:
            break
    return found


def test_submission_whose_answer_is_lost_is_known_as_its_own(ray):
    ray.failures = [500]
    assert RayJobsHook().submit("j", "true") is True
    assert len(ray.submitted) == 1


def test_submission_of_somebody_else_is_adopted(ray):
    assert RayJobsHook().submit("j", "true") is True
    assert RayJobsHook().submit("j", "true") is False
    assert len(ray.submitted) == 1


def test_submission_is_tried_again_while_the_cluster_has_no_agent(ray, monkeypatch):
    ray.down = True
    waited = []

    def come_up(seconds: float) -> None:
        waited.append(seconds)
        ray.down = len(waited) < 2

    monkeypatch.setattr(module.time, "sleep", come_up)
    assert RayJobsHook().submit("j", "true") is True
    assert len(ray.submitted) == 1 and len(waited) == 2


def test_submission_that_fails_for_long_says_so(ray):
    ray.down = True
    with pytest.raises(ExternalSystemError, match="HTTP 503"):
        RayJobsHook().submit("j", "true")


def test_list_has_the_submitted_jobs_only(ray):
    for name in ("a", "b"):
        RayJobsHook().submit(name, "true")
    ray.finish("b", "FAILED", driver_exit_code=-9, message="killed")
    jobs = RayJobsHook().list_jobs()
    assert asyncio.run(RayJobsHook().alist_jobs()) == jobs and set(jobs) == {"a", "b"}
    assert not jobs["a"].over and jobs["b"].over
    assert (jobs["b"].observation.exit_code, jobs["b"].message) == (-9, "killed")
    assert jobs["a"].submitted and jobs["b"].ended >= jobs["b"].submitted
    assert RayJobsHook().look("a") == jobs["a"] and RayJobsHook().look("c").status == "LOST"


def test_rotated_token_is_read_again(ray, monkeypatch):
    hook, other = RayJobsHook(), RayJobsHook()
    ray.jobs["j"] = {"status": "RUNNING"}
    assert hook.look("j").status == asyncio.run(other.alook("j")).status == "RUNNING"
    ray.token = "rotated"
    with pytest.raises(AccessRefusedError, match="refuses the token"):
        hook.look("j")
    with pytest.raises(AccessRefusedError, match="refuses the token"):
        asyncio.run(other.alook("j"))
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", ray.connection())
    assert hook.look("j").status == asyncio.run(other.alook("j")).status == "RUNNING"


def test_one_session_serves_all_requests_of_a_use(ray, monkeypatch):
    import aiohttp

    opened = []
    original = aiohttp.ClientSession.__init__

    def counted(self, *args, **kwargs) -> None:
        opened.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(aiohttp.ClientSession, "__init__", counted)
    ray.jobs["j"] = {"status": "SUCCEEDED"}

    async def use() -> None:
        async with RayJobsHook() as hook:
            await hook.alook("j")
            await hook.alogs("j")
            await collect(hook.alog_lines("j"))

    asyncio.run(use())
    assert len(opened) == 1 and opened[0].closed


def test_log_is_whole_however_often_and_wherever_it_is_cut(ray):
    expected = TEXT.split("\n")
    draw = random.Random(5)
    size = len(TEXT.encode())
    for round_ in range(25):
        name = f"j{round_}"
        ray.jobs[name] = {"status": "SUCCEEDED"}
        ray.write(name, TEXT)
        ray.cuts = [draw.randrange(size + 1) for _ in range(draw.randrange(5))]
        ray.cut_politely = bool(round_ % 2)
        found = asyncio.run(collect(RayJobsHook().alog_lines(name)))
        assert [line for _, line in found] == expected, ray.cuts
        assert [offset for offset, _ in found] == sorted({offset for offset, _ in found})
        assert found[-1][0] == size


def test_log_goes_on_after_any_line(ray):
    ray.jobs["j"] = {"status": "SUCCEEDED"}
    ray.write("j", TEXT)
    first = asyncio.run(collect(RayJobsHook().alog_lines("j")))
    for seen in (1, 7, 30, len(first)):
        rest = asyncio.run(collect(RayJobsHook().alog_lines("j", first[seen - 1][0])))
        assert rest == first[seen:]


def test_socket_that_closes_well_while_the_job_runs_is_not_the_end(ray):
    """An agent on the way that goes away closes the socket as the end of the job does."""
    ray.jobs["j"] = {"status": "RUNNING"}
    ray.write("j", "one\ntwo\n")
    ray.cuts, ray.cut_politely = [4, 8, 8], True

    async def watch() -> list[str]:
        found = []
        async for _, line in RayJobsHook().alog_lines("j"):
            found.append(line)
            if line == "two":
                ray.write("j", "three\n")
                ray.finish("j")
        return found

    assert asyncio.run(asyncio.wait_for(watch(), 20)) == ["one", "two", "three"]


def test_log_of_a_job_whose_cluster_is_away_for_a_moment(ray):
    ray.jobs["j"] = {"status": "RUNNING"}
    ray.write("j", "one\n")
    ray.cuts = [4]

    async def watch() -> list[str]:
        found = []
        async for _, line in RayJobsHook().alog_lines("j"):
            found.append(line)
            if line == "one":
                ray.down = True
                asyncio.get_running_loop().call_later(0.2, back)
        return found

    def back() -> None:
        ray.write("j", "two\n")
        ray.finish("j")
        ray.down = False

    assert asyncio.run(asyncio.wait_for(watch(), 20)) == ["one", "two"]


def test_log_of_an_unknown_job_is_empty_and_of_a_wrong_token_an_error(ray, monkeypatch):
    assert asyncio.run(collect(RayJobsHook().alog_lines("nobody"))) == []
    ray.jobs["j"] = {"status": "RUNNING"}
    ray.token = "rotated"
    with pytest.raises(AccessRefusedError, match="refuses the token"):
        asyncio.run(collect(RayJobsHook().alog_lines("j")))


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: here
clusters: [{{name: here, cluster: {{server: "{server}"}}}}]
users: [{{name: me, user: {{token: "{token}"}}}}]
contexts: [{{name: here, context: {{cluster: here, user: me}}}}]
"""


@pytest.fixture
def proxied(tmp_path, monkeypatch):
    with RayDashboard(gate="cluster-token") as dashboard:
        file = tmp_path / "kubeconfig"
        file.write_text(KUBECONFIG.format(server=dashboard.address, token="cluster-token"))
        kubernetes = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(file)}}
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", json.dumps(kubernetes))
        extra = {"proxy_service": "training/cluster-head-svc", "kubernetes_conn_id": "cluster"}
        connection = {"conn_type": "ray", "password": dashboard.token, "extra": extra}
        monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
        dashboard.kubeconfig = file
        yield dashboard


def test_cluster_behind_an_api_server(proxied):
    assert RayJobsHook().submit("j", "true") is True
    proxied.write("j", "hello\n")
    proxied.finish("j")
    assert RayJobsHook().look("j").status == asyncio.run(RayJobsHook().alook("j")).status == "SUCCEEDED"
    assert asyncio.run(collect(RayJobsHook().alog_lines("j"))) == [(6, "hello")]
    ok, message = RayJobsHook().test_connection()
    assert ok and message.endswith("/api/v1/namespaces/training/services/cluster-head-svc:8265/proxy")
    assert "cluster-token" not in repr(RayJobsHook().endpoint)
    assert RayJobsHook().python == "python", "the API server may be on this machine, the cluster is not"


def test_api_server_that_refuses_is_told_from_ray_that_does(proxied):
    proxied.gate = "another"
    with pytest.raises(AccessRefusedError, match=r"API server before Ray.*Unauthorized.*services/proxy"):
        RayJobsHook().look("j")
    proxied.gate, proxied.token = "cluster-token", "another"
    with pytest.raises(AccessRefusedError, match="refuses the token in the connection's password"):
        RayJobsHook().look("j")


def test_service_account_token_that_was_rotated_is_read_again(proxied):
    hook = RayJobsHook()
    assert hook.look("j").status == "LOST"
    proxied.gate = "rotated"
    proxied.kubeconfig.write_text(KUBECONFIG.format(server=proxied.address, token="rotated"))
    assert hook.look("j").status == "LOST"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"proxy_service": "head"}, "expected namespace/service"),
        ({"proxy_service": "a/b/c"}, "expected namespace/service"),
        ({"proxy_service": "a/b", "kubernetes_conn_id": "nowhere"}, "Kubernetes connection 'nowhere'"),
    ],
)
def test_proxy_that_is_described_wrongly(monkeypatch, extra, words):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "extra": extra}))
    with pytest.raises(InvalidInputError, match=words):
        _ = RayJobsHook().endpoint


def identity(folder, name: str) -> tuple[str, str]:
    """Files of a certificate and its key, overwritten where they are there."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, who = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    began, pem = datetime.now(timezone.utc), serialization.Encoding.PEM
    made = x509.CertificateBuilder(who, who, key.public_key(), 1, began, began + timedelta(days=1))
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    return str(folder / "cert.pem"), str(folder / "key.pem")


def test_certificates_that_were_rotated_in_place_are_read_again(tmp_path):
    """A triggerer runs for longer than a certificate lives."""
    files = identity(tmp_path, "first")
    endpoint = module.Endpoint("https://ray", None, files[0], "", certificate=files)

    def trusted() -> str:
        return endpoint.ssl.get_ca_certs()[0]["subject"][0][0][1]

    assert trusted() == "first" and endpoint.ssl is endpoint.ssl
    identity(tmp_path, "second")
    assert trusted() == "second"
    only_client = module.Endpoint("https://ray", None, True, "", certificate=files)
    before = only_client.ssl
    identity(tmp_path, "third")
    assert only_client.ssl is not before and only_client.ssl is only_client.ssl
