"""What a RayJob's status means for the attempt it runs, as one table.

KubeRay keeps two states and a reason: ``jobDeploymentStatus`` (how far KubeRay is), ``jobStatus`` (what Ray last said
of the job) and, on failure, ``reason``. They contradict each other at times: a job can be called Failed while it runs,
and Complete though it was stopped. Success is ``jobStatus`` SUCCEEDED and nothing else. Behaviour after KubeRay 1.5 to
1.7, https://github.com/ray-project/kuberay/blob/v1.7.0/ray-operator/controllers/ray/rayjob_controller.go
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from airflow_mlops.training.decide import Observation

#: On the RayJob: number of the attempt, and which try of the task follows it.
ATTEMPT_LABEL = "mlops.airflow.org/attempt"
OWNER_ANNOTATION = "mlops.airflow.org/owner"
OWNER_TRY_ANNOTATION = "mlops.airflow.org/owner-try"
KUEUE_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

#: Seconds that KubeRay has to catch up with a job that has ended.
SETTLE = 300.0
#: Non-final: a row of a table does not say enough, the object itself is needed.
INCOMPLETE = "INCOMPLETE"

#: ``jobStatus`` in which Ray's job has ended.
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
#: ``jobDeploymentStatus`` that KubeRay leaves no more (Failed it does where the RayJob has a backoffLimit).
OVER = ("Complete", "Failed", "ValidationFailed")

_LIVE = ("", "PENDING", "RUNNING")
_ANY = None
#: Not statuses but rules: take the job's own status, at once or after :data:`SETTLE`; or name what is not known.
_JOB, _JOB_SOON, _UNKNOWN = "=job", "=job, soon", "=unknown"


class Rule(NamedTuple):
    """One row: the first whose three columns fit holds; None fits everything.

    :param status: of the observation
    :param says: sentence for the observation, besides KubeRay's own message
    """

    deployment: tuple[str, ...] | None
    job: tuple[str, ...] | None
    reason: tuple[str, ...] | None
    status: str
    says: str = ""


RULES = (
    Rule(("Complete",), ENDED, _ANY, _JOB),
    Rule(("Complete",), _ANY, _ANY, "LOST", "KubeRay calls the RayJob complete and the job has not ended."),
    Rule(("ValidationFailed",), _ANY, _ANY, "INVALID", "KubeRay refuses the RayJob."),
    Rule(("Failed",), _ANY, ("ValidationFailed",), "INVALID", "KubeRay refuses the RayJob."),
    Rule(("Failed",), _ANY, ("DeadlineExceeded",), "DEADLINE", "The RayJob's activeDeadlineSeconds are over."),
    Rule(
        ("Failed",),
        _ANY,
        ("PreRunningDeadlineExceeded",),
        "CAPACITY",
        "The cluster was not ready within the RayJob's preRunningDeadlineSeconds.",
    ),
    Rule(("Failed",), ENDED, _ANY, _JOB),
    Rule(("Failed",), _ANY, ("JobStatusCheckTimeoutExceeded",), "LOST", "KubeRay cannot reach the Ray cluster."),
    Rule(
        ("Failed",),
        _ANY,
        ("JobDeploymentStatusTransitionGracePeriodExceeded",),
        "LOST",
        "KubeRay gave up waiting for the job's end.",
    ),
    # Also with reasons that are not known: the job may live, and only Ray can tell.
    Rule(("Failed",), _ANY, _ANY, "SUBMITTER_LOST", "KubeRay calls the RayJob failed and the job has not ended."),
    Rule(("Waiting",), _ANY, _ANY, "INVALID", 'The RayJob waits for a job id, as in submissionMode "InteractiveMode".'),
    # A stale jobStatus stays on these: Kueue takes pods away in the middle, a retry of KubeRay's starts anew.
    Rule(("Suspending", "Suspended"), _ANY, _ANY, "QUEUED"),
    Rule(("Retrying",), _ANY, _ANY, "PENDING", "KubeRay itself retries the RayJob, which has a backoffLimit."),
    Rule(_ANY, ENDED, _ANY, _JOB_SOON, "The job has ended; waiting for KubeRay to see it."),
    Rule(("", "Initializing"), _LIVE, _ANY, "PENDING"),
    Rule(("Running",), ("RUNNING",), _ANY, "RUNNING"),
    Rule(("Running",), ("", "PENDING"), _ANY, "PENDING"),
    Rule(_ANY, _ANY, _ANY, _UNKNOWN, "This version does not know that state."),
)


@dataclass(frozen=True)
class RayJobView:
    """What is read of a RayJob.

    :param deployment_status: ``status.jobDeploymentStatus``, empty before KubeRay has seen the RayJob
    :param job_status: ``status.jobStatus``, empty before there is a job
    :param cluster: name of its RayCluster
    :param deleting: whether somebody has deleted it and it is about to go
    :param queued: the Kueue queue it belongs to
    :param owner: the task that follows it, and its try
    :param partial: made from a row of a table, which has neither reason nor message
    """

    name: str
    uid: str
    resource_version: str
    deployment_status: str = ""
    job_status: str = ""
    reason: str = ""
    message: str = ""
    cluster: str | None = None
    deleting: bool = False
    queued: str | None = None
    owner: str | None = None
    owner_try: int | None = None
    partial: bool = False

    @classmethod
    def of(cls, obj: Mapping[str, Any]) -> RayJobView:
        """The view of a RayJob as the API server gives it."""
        status = obj.get("status") or {}
        return cls(
            **_of_metadata(obj.get("metadata") or {}),
            deployment_status=status.get("jobDeploymentStatus") or "",
            job_status=status.get("jobStatus") or "",
            reason=status.get("reason") or "",
            message=status.get("message") or "",
            cluster=status.get("rayClusterName") or None,
        )

    @classmethod
    def of_row(cls, columns: Mapping[str, str], metadata: Mapping[str, Any]) -> RayJobView:
        """The view of a row of the API server's table.

        :param columns: cells by the names of the CRD's printer columns, in whatever case
        :param metadata: of the object
        """
        cells = {name.lower(): value or "" for name, value in columns.items()}
        return cls(
            **_of_metadata(metadata),
            deployment_status=cells.get("deployment status", ""),
            job_status=cells.get("job status", ""),
            cluster=cells.get("ray cluster name") or None,
            partial=True,
        )

    @property
    def over(self) -> bool:
        """Whether KubeRay has finished with it."""
        return self.deployment_status in OVER

    @property
    def settling(self) -> bool:
        """Whether the job has ended and KubeRay has not seen that yet; :func:`observe` wants to know since when."""
        return _rule(self).status == _JOB_SOON


def observe(
    view: RayJobView | None,
    *,
    now: float,
    terminal_since: float | None = None,
    last: RayJobView | None = None,
) -> Observation:
    """What a RayJob says of its attempt.

    Made from a row of a table, an end whose cause matters is :data:`INCOMPLETE`: get the object and ask again.

    :param view: the RayJob as it is now, None if there is none
    :param now: seconds on any clock
    :param terminal_since: since when, on that clock, the view has been ``settling``; None: since now
    :param last: the RayJob as it was last seen, if ``view`` is None: one that was deleted while its job could run was
        stopped by whoever did that, and one that was over has its outcome
    """
    if view is None:
        return _gone(last)
    settled = terminal_since is not None and now - terminal_since >= SETTLE
    seen = _observed(view, settled)
    if view.deleting and (not view.over or seen.status == "SUBMITTER_LOST"):
        return Observation("STOPPING", message=f"RayJob {view.name} is being deleted.")
    return seen


def _gone(last: RayJobView | None) -> Observation:
    if last is None:
        return Observation("LOST", message="There is no such RayJob.")
    if not (last.over or last.settling):
        was = f" while it was {last.deployment_status}" if last.deployment_status else ""
        return Observation("STOPPED", message=f"RayJob {last.name} was deleted{was}.")
    seen = _observed(last, settled=True)
    if seen.status in ("SUBMITTER_LOST", INCOMPLETE):
        return Observation("LOST", message=f"RayJob {last.name} is gone. {seen.message}".strip())
    return seen


def _observed(view: RayJobView, settled: bool) -> Observation:
    rule = _rule(view)
    said = " ".join(part for part in (rule.says, _queue(view), _reason(view), view.message[-2000:]) if part)
    if rule.status == _UNKNOWN:
        state = "/".join([view.deployment_status, view.job_status])
        return Observation(state, message=f"RayJob {view.name} is {state}. {said}")
    if rule.status == _JOB_SOON and not settled:
        return Observation("RUNNING", message=said)
    if view.partial and _wants_words(view, rule):
        return Observation(INCOMPLETE, message=f"RayJob {view.name} has ended; the row does not say why.")
    if rule.status in (_JOB, _JOB_SOON):
        return Observation(view.job_status, _exit_code(view.message), view.message[-2000:])
    return Observation(rule.status, message=said)


def _rule(view: RayJobView) -> Rule:
    state = (view.deployment_status, view.job_status, view.reason)
    return next(
        rule
        for rule in RULES
        if all(fits is None or value in fits for fits, value in zip((rule.deployment, rule.job, rule.reason), state))
    )


def _wants_words(view: RayJobView, rule: Rule) -> bool:
    """Whether reason or message decide: of what KubeRay calls failed, and of a driver that failed."""
    if view.over and view.deployment_status != "Complete":
        return True
    return rule.status in (_JOB, _JOB_SOON) and view.job_status == "FAILED"


def _queue(view: RayJobView) -> str:
    if view.deployment_status not in ("Suspending", "Suspended"):
        return ""
    if view.queued:
        return f"Kueue holds it in queue {view.queued}."
    return "It is suspended (spec.suspend), and not by Kueue: somebody has to resume it."


def _reason(view: RayJobView) -> str:
    return f"{view.reason}:" if view.reason and view.message else view.reason


def _exit_code(message: str) -> int | None:
    # Ray's sentence comes first; what follows is the end of the driver's log and may say anything.
    found = re.match(r"Job entrypoint command failed with exit code (-?\d+)", message)
    return int(found[1]) if found else None


def _of_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    return {
        "name": metadata.get("name") or "",
        "uid": metadata.get("uid") or "",
        "resource_version": metadata.get("resourceVersion") or "",
        "deleting": bool(metadata.get("deletionTimestamp")),
        "queued": labels.get(KUEUE_QUEUE_LABEL) or None,
        "owner": annotations.get(OWNER_ANNOTATION),
        "owner_try": _number(annotations.get(OWNER_TRY_ANNOTATION)),
    }


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else None
