"""What a person is told when pods do not start: objects as Kubernetes, Volcano, YuniKorn and Kueue write them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from airflow_mlops.training.diagnose import diagnose_startup, preflight, queue_problem
from airflow_mlops.training.parts import Gang


def pod(name="job-x-head-1", role="head", **status) -> dict[str, Any]:
    labels = {"ray.io/node-type": role} if role else {}
    return {"metadata": {"name": name, "uid": f"uid-{name}", "labels": labels}, "spec": {}, "status": status}


def waiting(reason, message="", **more) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    status = {"name": "ray-worker", "image": "team/x:1", "state": state, "restartCount": 0, **more}
    return {"phase": "Pending", "containerStatuses": [status]}


def unscheduled(message, reason="Unschedulable") -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def event(reason, message, kind="Pod", name="job-x-head-1", at="2026-01-01T00:00:00Z", warn=True) -> dict[str, Any]:
    return {
        "type": "Warning" if warn else "Normal",
        "reason": reason,
        "message": message,
        "lastTimestamp": at,
        "involvedObject": {"kind": kind, "name": name},
    }


def workload(*conditions, active=True) -> dict[str, Any]:
    fields = ("type", "status", "reason", "message")
    listed = [dict(zip(fields, condition)) for condition in conditions]
    return {"spec": {"queueName": "team", "active": active}, "status": {"conditions": listed}}


RUNNING = {"phase": "Running", "containerStatuses": [{"name": "ray-head", "state": {"running": {}}, "restartCount": 0}]}
NO_NODE = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu. preemption: 0/4 nodes are available"
PENDING = workload(("QuotaReserved", "False", "Pending", "couldn't assign flavors to pod set head: insufficient quota"))
DEACTIVATED = workload(("Evicted", "True", "Deactivated", "The workload is deactivated"), active=False)
TIMED_OUT = workload(
    ("DeactivationTarget", "True", "MaximumExecutionTimeExceeded", "exceeding the maximum execution time")
)
INADMISSIBLE = workload(("QuotaReserved", "False", "Inadmissible", "LocalQueue team doesn't exist"))
ADMITTED = workload(("QuotaReserved", "True", "QuotaReserved", ""), ("Admitted", "True", "Admitted", ""))


@pytest.mark.parametrize(
    ("pods", "events", "kueue", "sentence"),
    [
        (
            [pod(**waiting("ImagePullBackOff", 'Back-off pulling image "team/x:1"'))],
            [],
            None,
            "The image team/x:1 of pod job-x-head-1 cannot be pulled (ImagePullBackOff): Back-off pulling",
        ),
        ([pod(**waiting("ErrImagePull", "401"))], [], None, "cannot be pulled (ErrImagePull): 401."),
        ([pod(**waiting("InvalidImageName"))], [], None, "(InvalidImageName): InvalidImageName."),
        (
            [pod(**waiting("CreateContainerConfigError", 'secret "s3" not found'))],
            [],
            None,
            'Container ray-worker of pod job-x-head-1 cannot start (CreateContainerConfigError): secret "s3" not',
        ),
        (
            [pod(**waiting("CrashLoopBackOff", lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}))],
            [],
            None,
            "Container ray-worker of pod job-x-head-1 crashes again and again (exit code 137, OOMKilled).",
        ),
        ([pod(**waiting("CrashLoopBackOff"))], [], None, "(no exit code known)"),
        (
            [
                pod(
                    phase="Running",
                    initContainerStatuses=[
                        {
                            "name": "wait-gcs-ready",
                            "restartCount": 2,
                            "state": {"running": {}},
                            "lastState": {"terminated": {"exitCode": 1, "reason": "Error", "message": "no head\n"}},
                        }
                    ],
                )
            ],
            [],
            None,
            "Container wait-gcs-ready of pod job-x-head-1 crashes again and again (exit code 1, Error): no head",
        ),
        (
            [pod(), pod("job-x-w-1", "worker", **unscheduled(NO_NODE))],
            [],
            None,
            "1 of 2 pods cannot be scheduled (first job-x-w-1): 0/4 nodes are available: 4 Insufficient",
        ),
        (
            [pod(**unscheduled(""))],
            [event("FailedScheduling", "untolerated taint {gpu}")],
            None,
            "cannot be scheduled (first job-x-head-1): untolerated taint {gpu}.",
        ),
        (
            [pod(**unscheduled("pod group is not ready, 2 Pending, 3 minAvailable"))],
            [],
            None,
            "The gang cannot be scheduled as a whole: pod group is not ready, 2 Pending, 3 minAvailable.",
        ),
        (
            [pod(**unscheduled("0/1 nodes"))],
            [event("Unschedulable", "3/3 tasks in gang unschedulable", "PodGroup", "ray-job-pg")],
            None,
            "The gang cannot be scheduled as a whole: 3/3 tasks in gang unschedulable.",
        ),
        (
            [pod(**unscheduled("Scheduling is blocked due to non-empty scheduling gates", "SchedulingGated"))],
            [],
            None,
            "1 pod(s) are held back by a scheduling gate",
        ),
        (
            [],
            [event("FailedToCreateHeadPod", 'pods "x" is forbidden: exceeded quota: team', "RayCluster")],
            None,
            'A quota of the namespace is used up: pods "x" is forbidden: exceeded quota: team.',
        ),
        (
            [pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory.")],
            [],
            None,
            "The node took away pod job-x-head-1 (Evicted): The node was low on resource: memory.",
        ),
        (
            [pod(phase="Pending")],
            [event("FailedMount", 'secret "s3" not found')],
            None,
            'Pod job-x-head-1 waits, because a volume cannot be mounted: secret "s3" not found.',
        ),
        (
            [pod(phase="Pending")],
            [event("Pulling", 'Pulling image "team/x:1"', warn=False)],
            None,
            'Pod job-x-head-1 still pulls its image: Pulling image "team/x:1".',
        ),
        ([], [], None, "No pod was created: does the KubeRay operator run, and does it watch this namespace?"),
        ([], [event("InvalidRayJobSpec", "bad spec", "RayJob")], None, "No pod was created: bad spec."),
        ([], [], PENDING, "waits for quota in Kueue's queue 'team': couldn't assign flavors"),
        ([], [], DEACTIVATED, "Kueue deactivated the workload: The workload is deactivated."),
        ([], [], TIMED_OUT, "Kueue deactivated the workload: exceeding the maximum execution time."),
        ([], [], INADMISSIBLE, "Kueue cannot admit the workload: LocalQueue team doesn't exist."),
        ([pod(**unscheduled(NO_NODE))], [], ADMITTED, "1 of 1 pods cannot be scheduled"),
    ],
)
def test_each_cause_is_one_sentence(pods, events, kueue, sentence):
    said = diagnose_startup(pods, events, kueue)
    assert said is not None and sentence in said and "\n" not in said


def test_nothing_is_made_up():
    assert diagnose_startup([pod(**RUNNING)], []) is None
    pulled = [event("Pulling", "x", warn=False), event("Pulled", "x", warn=False)]
    assert diagnose_startup([pod(phase="Pending")], pulled) is None
    assert diagnose_startup([pod(phase="Pending")], [event("FailedMount", "x", name="another")]) is None
    assert diagnose_startup([], [], ADMITTED) is None


def test_the_head_is_named_before_those_that_wait_for_it():
    broken = waiting("ImagePullBackOff")
    pods = [pod("submitter", None, **broken), pod("w-1", "worker", **broken), pod("z-head", "head", **broken)]
    for order in (pods, pods[::-1]):
        assert "pod z-head" in str(diagnose_startup(order, []))


def test_the_newest_event_is_told():
    events = [
        event("FailedToCreateHeadPod", f"exceeded quota {number}", "RayCluster", at=f"2026-01-01T00:00:0{number}Z")
        for number in (1, 3, 2)
    ]
    assert "quota 3" in str(diagnose_startup([], events))


@pytest.mark.parametrize(
    ("kueue", "fatal"),
    [(PENDING, False), (ADMITTED, False), (DEACTIVATED, True), (TIMED_OUT, True), (INADMISSIBLE, True)],
)
def test_kueue_is_waited_for_unless_that_is_in_vain(kueue, fatal):
    assert (queue_problem(kueue) is not None) == fatal


def scheduled_by(name) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": {"schedulerName": name}}


@pytest.mark.parametrize(
    ("scheduler", "seen"),
    [
        ("volcano", {"pod_groups": [{}]}),
        ("volcano", {"pods": [scheduled_by("volcano")]}),
        ("yunikorn", {"pods": [scheduled_by("yunikorn")]}),
        ("kai", {"pods": [scheduled_by("kai-scheduler")]}),
        ("kueue", {"workloads": [{}]}),
    ],
)
def test_a_scheduler_that_acts_is_seen(scheduler, seen):
    assert preflight(Gang(scheduler, "q"), **seen) is None


@pytest.mark.parametrize(
    ("scheduler", "seen", "words"),
    [
        ("volcano", {}, "there is no PodGroup and no pod has appeared yet"),
        ("volcano", {"pods": [scheduled_by("default-scheduler")]}, "its pods have schedulerName default-scheduler"),
        ("volcano", {"pods": [scheduled_by("volcano"), scheduled_by(None)]}, "default-scheduler, volcano"),
        ("yunikorn", {"pods": [scheduled_by("default-scheduler")]}, "batchScheduler.name=yunikorn"),
        ("yunikorn", {"pod_groups": [{}]}, "no pod has appeared yet"),
        ("kai", {"pods": [scheduled_by(None)]}, "batchScheduler.name=kai-scheduler"),
        ("kueue", {"pods": [scheduled_by("default-scheduler")]}, "Kueue has made no Workload for queue 'q'"),
    ],
)
def test_a_scheduler_that_does_not_act_is_named(scheduler, seen, words):
    assert re.search(re.escape(words), str(preflight(Gang(scheduler, "q"), **seen)))
