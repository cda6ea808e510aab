"""Why an attempt does not start: the one sentence that a person would find with ``kubectl describe``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from airflow_mlops.training.parts import Gang

#: ``schedulerName`` of the pods that each scheduler takes.
SCHEDULER_NAMES = {"volcano": "volcano", "yunikorn": "yunikorn", "kai": "kai-scheduler"}

_Object = Mapping[str, Any]

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError")
_PRESSURE = ("Evicted", "NodeLost", "NodeShutdown", "NodeAffinity", "Terminated", "Preempting", "Shutdown")
_QUOTA = re.compile(r"exceeded quota|quota.*exceed|insufficient quota|maximum .* usage per", re.IGNORECASE)
_GANG = re.compile(r"gang|minAvailable|min ?member|placeholder|pod ?group", re.IGNORECASE)
#: Reasons of events of volumes and sandboxes, and what to call them.
_SETUP = {
    "FailedMount": "a volume cannot be mounted",
    "FailedAttachVolume": "a volume cannot be attached",
    "FailedCreatePodSandBox": "the pod's network or sandbox cannot be set up",
    "FailedPrepareDynamicResources": "a claimed device cannot be prepared",
}


def preflight(
    gang: Gang, *, pods: Sequence[_Object] = (), pod_groups: Sequence[_Object] = (), workloads: Sequence[_Object] = ()
) -> str | None:
    """Whether the promised scheduler acts on the attempt: None if it does, else what is missing.

    A label alone does nothing where the scheduler is not installed, or KubeRay was started without it
    (``batchScheduler``): the pods would be scheduled one by one, and a gang would be none. To be asked when
    it has had time to act.

    :param pods: of the attempt
    :param pod_groups: Volcano's of the attempt (``ray-<RayJob>-pg``)
    :param workloads: Kueue's of the attempt (label ``kueue.x-k8s.io/job-uid``: the RayJob's uid)
    """
    if gang.scheduler == "kueue":
        if workloads:
            return None
        return (
            f"Kueue has made no Workload for queue {gang.queue!r}: is Kueue installed, with ray.io/rayjob among its "
            "integrations, and does it manage this namespace?"
        )
    name = SCHEDULER_NAMES[gang.scheduler]
    if pod_groups and gang.scheduler == "volcano":
        return None
    schedulers = {str(_at(pod, "spec", "schedulerName") or "default-scheduler") for pod in pods}
    if schedulers == {name} or (name in schedulers and gang.scheduler != "volcano"):
        return None
    seen = f"its pods have schedulerName {', '.join(sorted(schedulers))}" if pods else "no pod has appeared yet"
    group = "there is no PodGroup and " if gang.scheduler == "volcano" else ""
    return (
        f"{gang.scheduler} does not act on the RayJob ({group}{seen}): is it installed, and was KubeRay started with "
        f"batchScheduler.name={name}?"
    )


def diagnose_startup(pods: Sequence[_Object], events: Sequence[_Object], workload: _Object | None = None) -> str | None:
    """What keeps an attempt from running, in one sentence; None if nothing seen explains it.

    :param pods: of the attempt, submitter included
    :param events: of RayJob, RayCluster, pods, PodGroup and submitter Job, in any order
    :param workload: Kueue's of the attempt
    """
    ordered = sorted(pods, key=_rank)
    recent = sorted(events, key=_when, reverse=True)
    for found in (
        _queue(workload),
        _containers(ordered),
        _lost(ordered),
        _quota(recent),
        _unschedulable(ordered, recent),
        _setup(ordered, recent),
        _pulling(ordered, recent),
    ):
        if found:
            return found
    if not pods and workload is None:
        warning = next((event for event in recent if event.get("type") == "Warning"), None)
        if warning is not None:
            return f"No pod was created: {_message(warning)}"
        return "No pod was created: does the KubeRay operator run, and does it watch this namespace?"
    return None


def queue_problem(workload: _Object) -> str | None:
    """Why waiting for Kueue is in vain: it deactivated the Workload, or cannot admit it; None otherwise."""
    conditions = _conditions(workload)
    if _at(workload, "spec", "active") is False or conditions.get("DeactivationTarget", {}).get("status") == "True":
        evicted = conditions.get("DeactivationTarget") or conditions.get("Evicted") or {}
        return f"Kueue deactivated the workload: {_said(evicted)}"
    quota = conditions.get("QuotaReserved", {})
    if quota.get("status") == "False" and quota.get("reason") == "Inadmissible":
        return f"Kueue cannot admit the workload: {_said(quota)}"
    return None


def _queue(workload: _Object | None) -> str | None:
    if workload is None:
        return None
    if problem := queue_problem(workload):
        return problem
    conditions = _conditions(workload)
    if conditions.get("Admitted", {}).get("status") == "True":
        return None
    queue = _at(workload, "spec", "queueName")
    why = conditions.get("QuotaReserved") or conditions.get("Admitted") or conditions.get("Evicted") or {}
    return f"It waits for quota in Kueue's queue {queue!r}: {_said(why)}"


def _containers(pods: Iterable[_Object]) -> str | None:
    for pod, status in _statuses(pods):
        waiting = _at(status, "state", "waiting") or {}
        reason, image = str(waiting.get("reason") or ""), status.get("image")
        if reason in _IMAGE:
            return f"The image {image} of pod {_name(pod)} cannot be pulled ({reason}): {_said(waiting)}"
        if reason in _CONFIG:
            return f"Container {status.get('name')} of pod {_name(pod)} cannot start ({reason}): {_said(waiting)}"
        ended = _at(status, "lastState", "terminated") or _at(status, "state", "terminated") or {}
        if reason == "CrashLoopBackOff" or (int(status.get("restartCount") or 0) >= 2 and ended):
            why = f"exit code {ended.get('exitCode')}, {ended.get('reason')}" if ended else "no exit code known"
            text = f"Container {status.get('name')} of pod {_name(pod)} crashes again and again ({why})"
            return f"{text}: {ended['message'].strip()}" if ended.get("message") else f"{text}."
    return None


def _lost(pods: Iterable[_Object]) -> str | None:
    for pod in pods:
        status = pod.get("status") or {}
        if status.get("phase") == "Failed" and status.get("reason") in _PRESSURE:
            return f"The node took away pod {_name(pod)} ({status['reason']}): {_said(status)}"
    return None


def _quota(events: Iterable[_Object]) -> str | None:
    for event in events:
        if event.get("type") == "Warning" and _QUOTA.search(str(event.get("message"))):
            return f"A quota of the namespace is used up: {_message(event)}"
    return None


def _unschedulable(pods: Sequence[_Object], events: Sequence[_Object]) -> str | None:
    for event in events:
        # A PodGroup's own event says more than the pods that wait for it.
        if _at(event, "involvedObject", "kind") == "PodGroup" and event.get("type") == "Warning":
            return f"The gang cannot be scheduled as a whole: {_message(event)}"
    waiting = [pod for pod in pods if _conditions(pod).get("PodScheduled", {}).get("status") == "False"]
    if not waiting:
        return None
    condition = _conditions(waiting[0])["PodScheduled"]
    mine = [event for event in events if _of(event, waiting[0]) and event.get("reason") == "FailedScheduling"]
    message = condition.get("message") or (_message(mine[0]) if mine else condition.get("reason") or "no reason given")
    if _GANG.search(message):
        return f"The gang cannot be scheduled as a whole: {_sentence(message)}"
    if condition.get("reason") == "SchedulingGated":
        return f"{len(waiting)} pod(s) are held back by a scheduling gate: {_sentence(message)}"
    return f"{len(waiting)} of {len(pods)} pods cannot be scheduled (first {_name(waiting[0])}): {_sentence(message)}"


def _setup(pods: Sequence[_Object], events: Sequence[_Object]) -> str | None:
    for pod in pods:
        if _at(pod, "status", "phase") not in ("Pending", None):
            continue
        for event in events:
            what = _SETUP.get(str(event.get("reason")))
            if what and _of(event, pod):
                return f"Pod {_name(pod)} waits, because {what}: {_message(event)}"
    return None


def _pulling(pods: Sequence[_Object], events: Sequence[_Object]) -> str | None:
    for pod in pods:
        mine = [event for event in events if _of(event, pod)]
        done = {event.get("reason") for event in mine}
        if "Pulling" in done and not done & {"Pulled", "Started"}:
            pulling = next(event for event in mine if event.get("reason") == "Pulling")
            return f"Pod {_name(pod)} still pulls its image: {_message(pulling)}"
    return None


def _statuses(pods: Iterable[_Object]) -> Iterator[tuple[_Object, _Object]]:
    for pod in pods:
        for field in ("initContainerStatuses", "containerStatuses"):
            for status in _at(pod, "status", field) or ():
                yield pod, status


def _conditions(obj: _Object) -> dict[str, Mapping[str, Any]]:
    return {condition["type"]: condition for condition in _at(obj, "status", "conditions") or ()}


def _rank(pod: _Object) -> tuple[int, str]:
    # Workers wait for the head, and the submitter for both: the first cause is the head's.
    roles = {"head": 0, "worker": 1}
    return roles.get(str((_at(pod, "metadata", "labels") or {}).get("ray.io/node-type")), 2), _name(pod)


def _when(event: _Object) -> str:
    metadata = event.get("metadata") or {}
    times = (event.get("lastTimestamp"), event.get("eventTime"), metadata.get("creationTimestamp"))
    return str(next((time for time in times if time), ""))


def _of(event: _Object, pod: _Object) -> bool:
    involved = event.get("involvedObject") or {}
    uid = _at(pod, "metadata", "uid")
    return involved["uid"] == uid if involved.get("uid") and uid else involved.get("name") == _name(pod)


def _name(obj: _Object) -> str:
    return str(_at(obj, "metadata", "name") or "?")


def _message(event: _Object) -> str:
    return _sentence(str(event.get("message") or event.get("reason") or "no message"))


def _said(value: _Object) -> str:
    return _sentence(str(value.get("message") or value.get("reason") or "no reason given"))


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _at(obj: _Object, *path: str) -> Any:
    value: Any = obj
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
