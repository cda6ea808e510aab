"""The hands of the stand-in API server and of its simulated KubeRay: faults, lost pods, queues, rights."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from support.kube_api import Fault, KubeApi
from support.kube_cluster import PODS, RAYJOBS, Cluster
from support.kube_pods import Stop
from support.kube_sim import RayJobSimulator

RUN = "mlops.airflow.org/run"


@pytest.fixture
def server(kube_api, kubeconfig) -> Cluster:
    """A client of the stand-in."""
    return Cluster(str(kubeconfig), kube_api, strict=kube_api.crds is not None)


class Script:
    """An entrypoint that runs until it is told to end; ``saved`` has the names of those that could save something."""

    def __init__(self) -> None:
        self.release, self.code = threading.Event(), 0
        self.saved: list[str] = []

    def __call__(self, rayjob: dict[str, Any], stop: Stop) -> int:
        stop.log("one line")
        while not self.release.is_set() and not stop.wait(0.005):
            pass
        if not stop.killed:
            self.saved.append(rayjob["metadata"]["name"])
        return self.code


@pytest.fixture
def script() -> Iterator[Script]:
    found = Script()
    yield found
    found.release.set()


@pytest.fixture
def simulator(kube_api, script) -> Iterator[RayJobSimulator]:
    with RayJobSimulator(kube_api, scale=0.001, script=script) as found:
        yield found


def state(api: Any, name: str) -> list[str]:
    status = (api.get("RayJob", "default", name) or {}).get("status") or {}
    return [status.get(key, "") for key in ("jobDeploymentStatus", "jobStatus", "reason")]


def running(server: Any, simulator: RayJobSimulator, name: str = "job", **spec: Any) -> str:
    """A RayJob whose entrypoint runs; its full name."""
    body = server.rayjob(name, managed=True, **spec)
    body["metadata"]["labels"][RUN] = "run-1"
    full = server.create(body)["metadata"]["name"]
    server.until(lambda: state(server.api, full)[1] == "RUNNING", "the job runs")
    return full


# Faults


def test_a_request_that_fails_before_has_no_effect_and_one_that_fails_after_has(server):
    body = server.rayjob("fault")
    path = server.path(RAYJOBS)
    server.api.faults.append(Fault(lambda method, path: method == "POST", 500))
    assert server.call("POST", path, body).status_code == 500
    assert server.api.list("RayJob") == []
    server.api.faults.append(Fault(lambda method, path: method == "POST", 503, when="after", retry_after=7))
    answer = server.call("POST", path, body)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    assert answer.json()["details"]["retryAfterSeconds"] == 7
    assert [item["metadata"]["name"] for item in server.api.list("RayJob")] == [body["metadata"]["name"]]
    assert server.call("POST", path, body).status_code == 409
    assert server.api.count(method="POST") == 3


def test_a_connection_that_is_cut_after_the_effect(server):
    server.api.fault(match=lambda method, path: method == "POST", drop=True, when="after")
    with pytest.raises(requests.ConnectionError):
        server.call("POST", server.path(RAYJOBS), server.rayjob("cut"))
    assert len(server.api.list("RayJob")) == 1


def test_faults_for_watches_leave_other_requests_alone(server):
    server.api.fault(watch=True, status=410, times=2)
    assert server.call("GET", server.path(RAYJOBS)).status_code == 200
    for _ in range(2):
        ((kind, status),) = server.watch(server.path(RAYJOBS), timeoutSeconds=1)
        assert (kind, status["code"]) == ("ERROR", 410)
    assert list(server.watch(server.path(RAYJOBS), timeoutSeconds=1)) == []
    assert (server.api.count(watch=True), server.api.count(watch=False)) == (3, 1)


def test_open_watches_can_be_cut(server):
    def cut() -> None:
        server.until(lambda: server.api.watches == 1, "the watch is open")
        server.api.drop_watches()

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(requests.RequestException):
        list(server.watch(server.path(RAYJOBS), timeoutSeconds=20))
    thread.join()
    server.until(lambda: server.api.watches == 0, "the watch is closed")


def test_an_open_watch_outlives_a_compaction(server):
    listed = server.call("GET", server.path(RAYJOBS)).json()["metadata"]["resourceVersion"]

    def later() -> None:
        server.until(lambda: server.api.watches == 1, "the watch is open")
        server.api.compact()
        server.create(server.rayjob("after"))

    thread = threading.Thread(target=later)
    thread.start()
    events = list(server.watch(server.path(RAYJOBS), resourceVersion=listed, timeoutSeconds=1))
    thread.join()
    assert [kind for kind, _ in events] == ["ADDED"]


def test_old_pages_are_gone_after_a_compaction(server):
    for name in ("a", "b"):
        server.create(server.rayjob(name))
    token = server.call("GET", server.path(RAYJOBS), limit=1).json()["metadata"]["continue"]
    server.api.compact()
    answer = server.call("GET", server.path(RAYJOBS), limit=1, **{"continue": token})
    assert (answer.status_code, answer.json()["reason"]) == (410, "Expired")


def test_a_wrong_token_is_unauthorized(server):
    server.api.token = "rotated"
    assert server.call("GET", server.path(RAYJOBS)).status_code == 401


def test_a_role_allows_what_it_says_and_what_was_used_is_known(server):
    server.api.role = [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list"]}]
    name = server.create(server.rayjob("role"))["metadata"]["name"]
    assert server.call("GET", server.path(RAYJOBS, name)).status_code == 200
    assert server.call("DELETE", server.path(RAYJOBS, name)).status_code == 403
    assert server.call("GET", server.path(PODS)).status_code == 403
    assert {("ray.io", "rayjobs", "create"), ("", "pods", "list")} <= server.api.used
    server.api.role = None
    server.api.forbid("get", "pods/log")
    assert server.call("GET", server.path(PODS, "x/log")).status_code == 403
    assert server.call("GET", server.path(PODS, "x")).status_code == 404


def test_a_log_can_be_followed(server):
    pod = {"kind": "Pod", "metadata": {"name": "talks"}, "spec": {"containers": [{"name": "main"}]}}
    server.api.create({**pod, "status": {"phase": "Running"}})
    server.api.add_pod_log("talks", ["one", "two"])

    def later() -> None:
        time.sleep(0.2)
        server.api.add_pod_log("talks", "three")
        server.api.put_status("Pod", "default", "talks", {"phase": "Succeeded"})

    thread = threading.Thread(target=later)
    thread.start()
    answer = server.session.get(server.url + server.path(PODS, "talks/log"), params={"follow": "true", "tailLines": 1})
    thread.join()
    assert answer.text == "two\nthree\n"


def test_a_followed_log_has_every_line_whenever_it_was_written(server):
    pod = {"kind": "Pod", "metadata": {"name": "talks"}, "spec": {"containers": [{"name": "main"}]}}
    wanted = [f"line {number}" for number in range(3000)]
    for _ in range(5):
        server.api.create({**pod, "status": {"phase": "Running"}})
        server.api.add_pod_log("talks", wanted[:1000])

        def write() -> None:
            for line in wanted[1000:]:
                server.api.add_pod_log("talks", line)
            server.api.put_status("Pod", "default", "talks", {"phase": "Succeeded"})

        thread = threading.Thread(target=write)
        thread.start()
        answer = server.session.get(server.url + server.path(PODS, "talks/log"), params={"follow": "true"})
        thread.join()
        assert answer.text.splitlines() == wanted
        server.api.delete_now("Pod", "default", "talks")


# KubeRay


def test_a_lost_head_kills_the_entrypoint_and_is_noticed_late(server, simulator, script):
    name = running(server, simulator)
    simulator.kill_head(name)
    assert simulator.running_attempts() == []
    assert simulator.driver(name).status == "RUNNING"
    server.until(lambda: state(server.api, name)[0] == "Failed", "the loss is noticed")
    assert state(server.api, name) == ["Failed", "RUNNING", "JobStatusCheckTimeoutExceeded"]
    server.until(lambda: simulator.live_attempts() == [], "nothing of the attempt is left")
    assert script.saved == []


def test_a_lost_head_that_ray_reports(server, simulator):
    name = running(server, simulator)
    simulator.kill_head(name, reason="AppFailed")
    server.until(lambda: state(server.api, name) == ["Failed", "FAILED", "AppFailed"], "the job is missing")


def test_a_dead_submitter_leaves_the_entrypoint_alive(server, simulator, script):
    name = running(server, simulator, ttlSecondsAfterFinished=300)
    simulator.kill_submitter(name)
    server.until(lambda: state(server.api, name)[0] == "Failed", "the submission failed")
    assert state(server.api, name) == ["Failed", "RUNNING", "SubmissionFailed"]
    assert simulator.running_attempts() == [name]
    # The cluster goes at its time to live; the entrypoint is asked to end first.
    server.until(lambda: simulator.live_attempts() == [], "the cluster is gone")
    assert script.saved == [name]


def test_the_jobs_api_is_reached_through_the_proxy(server, simulator):
    name = running(server, simulator)
    status = server.api.get("RayJob", "default", name)["status"]
    service = f"/api/v1/namespaces/default/services/{status['rayClusterName']}-head-svc:8265/proxy/api"
    job = server.call("GET", f"{service}/jobs/{status['jobId']}").json()
    assert (job["status"], job["submission_id"]) == ("RUNNING", status["jobId"])
    assert server.call("GET", f"{service}/jobs/absent").status_code == 404
    assert "one line" in server.call("GET", f"{service}/jobs/{status['jobId']}/logs").json()["logs"]
    assert server.call("POST", f"{service}/jobs/{status['jobId']}/stop").json() == {"stopped": True}
    server.until(lambda: state(server.api, name) == ["Complete", "STOPPED", ""], "the job is stopped")
    server.until(lambda: server.call("GET", f"{service}/version").status_code == 503, "the cluster is gone")


def test_pods_linger_after_their_rayjob(server, simulator):
    simulator.pods_linger(1000)
    first = running(server, simulator, "first")
    server.api.delete("RayJob", "default", first)
    server.until(lambda: server.api.get("RayJob", "default", first) is None, "the RayJob is gone")
    server.until(lambda: simulator.running_attempts() == [], "its entrypoint has ended")
    assert simulator.live_attempts("run-1") == [first]
    second = running(server, simulator, "second")
    server.until(lambda: simulator.live_attempts() == [second], "the first one's pods are gone")
    assert simulator.max_overlap == {"run-1": 2}
    assert simulator.max_running == {"run-1": 1}


def test_two_attempts_at_once_are_seen(server, simulator):
    running(server, simulator, "one")
    running(server, simulator, "two")
    assert simulator.max_overlap == {"run-1": 2}
    assert simulator.max_running == {"run-1": 2}


def test_a_running_job_is_suspended_and_resumed(server, simulator, script):
    name = running(server, simulator)
    simulator.suspend(name)
    server.until(lambda: state(server.api, name)[0] == "Suspended", "the job is suspended")
    assert simulator.live_attempts() == []
    assert script.saved == [name]
    script.release.set()
    simulator.suspend(name, value=False)
    server.until(lambda: state(server.api, name) == ["Complete", "SUCCEEDED", ""], "the job has ended")


@pytest.mark.parametrize(
    ("trouble", "kind", "reason"),
    [
        ("image_pull_error", "Pod", "Failed"),
        ("unschedulable", "Pod", "FailedScheduling"),
        ("quota_exceeded", "RayCluster", "FailedToCreateHeadPod"),
    ],
)
def test_a_cluster_that_cannot_start_says_why_and_ends_at_its_limit(server, simulator, trouble, kind, reason):
    getattr(simulator, trouble)("stuck")
    body = server.rayjob("stuck", managed=True, preRunningDeadlineSeconds=300)
    name = server.create(body)["metadata"]["name"]
    server.until(lambda: state(server.api, name)[0] == "Initializing", "the job begins")

    def reasons() -> set[tuple[str, str]]:
        events = server.api.list("Event")
        return {(event["involvedObject"]["kind"], event["reason"]) for event in events if event["type"] == "Warning"}

    server.until(lambda: (kind, reason) in reasons(), "an event names the cause")
    assert state(server.api, name) == ["Initializing", "", ""]
    server.until(lambda: state(server.api, name)[0] == "Failed", "the limit is over")
    assert state(server.api, name) == ["Failed", "", "PreRunningDeadlineExceeded"]


def test_trouble_that_is_over_lets_the_cluster_start(server, simulator, script):
    script.release.set()
    simulator.unschedulable()
    name = server.create(server.rayjob("later", managed=True))["metadata"]["name"]
    server.until(lambda: state(server.api, name)[0] == "Initializing", "the job begins")
    simulator.heal()
    server.until(lambda: state(server.api, name)[0] == "Complete", "the job has ended")


def test_a_deadline_ends_the_rayjob_but_not_the_entrypoint(server, simulator):
    name = running(server, simulator, activeDeadlineSeconds=400, ttlSecondsAfterFinished=300)
    server.until(lambda: state(server.api, name)[0] == "Failed", "the deadline is over")
    assert state(server.api, name) == ["Failed", "RUNNING", "DeadlineExceeded"]
    assert simulator.running_attempts() == [name]


def test_a_rayjob_that_kuberay_refuses(server, simulator):
    body = server.rayjob("x" * 60, managed=True)
    name = server.create(body)["metadata"]["name"]
    server.until(lambda: state(server.api, name)[0] == "ValidationFailed", "the job is refused")


def test_schedulers_act_where_they_are_installed(server, script):
    script.release.set()
    with RayJobSimulator(server.api, scale=0.001, script=script, schedulers=("volcano", "kueue")) as simulator:
        labels = {"volcano": "volcano.sh/queue-name", "kueue": "kueue.x-k8s.io/queue-name"}
        names = {}
        for name, label in labels.items():
            body = server.rayjob(name, managed=True)
            body["metadata"]["labels"][label] = "team"
            names[name] = body["metadata"]["name"]
            simulator.hold_queue(names["kueue"]) if name == "kueue" else None
            server.create(body)
        server.until(lambda: state(server.api, names["volcano"])[0] == "Complete", "the gang has run")
        (group,) = server.api.list("PodGroup")
        assert group["spec"] == {**group["spec"], "minMember": 2, "queue": "team"}
        uid = server.api.get("RayJob", "default", names["kueue"])["metadata"]["uid"]
        server.until(lambda: server.api.list("Workload", selector=f"kueue.x-k8s.io/job-uid={uid}"), "it is queued")
        assert state(server.api, names["kueue"])[0] == "Suspended"
        simulator.admit(names["kueue"])
        server.until(lambda: state(server.api, names["kueue"])[0] == "Complete", "the job has run")


def test_the_simulator_takes_over_what_is_there(server, script):
    script.release.set()
    body = server.rayjob("earlier", managed=True)
    server.create(body)
    with RayJobSimulator(server.api, scale=0.001, script=script):
        name = body["metadata"]["name"]
        server.until(lambda: state(server.api, name)[0] == "Complete", "the job has run")
        assert script.saved == [name]


def test_timestamps_follow_the_clock(crds):
    ticks = itertools.count(0.0, 3600.0)
    with KubeApi(crds, clock=lambda: next(ticks)) as api:
        first, second = (api.create({"kind": "Secret", "metadata": {"name": name}})["metadata"] for name in "ab")
    assert first["creationTimestamp"] < second["creationTimestamp"]
