# ruff: noqa: E501
"""What every state of a RayJob means, against a table written from KubeRay's behaviour and not from the code's rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from airflow_mlops.training.decide import ACTIVE, FINAL
from airflow_mlops.training.rayjob import INCOMPLETE, RULES, SETTLE, RayJobView, observe

# "-" is an empty status; "A>B" is A while KubeRay may still catch up and B once it had its time; "?" waits, by a name
# of its own. Cleaning and PAUSED are states of a KubeRay to come.
BY_STATE = """
deployment        -               PENDING         RUNNING         SUCCEEDED           FAILED           STOPPED          PAUSED
-                 PENDING         PENDING         PENDING         RUNNING>SUCCEEDED   RUNNING>FAILED   RUNNING>STOPPED  ?
Initializing      PENDING         PENDING         PENDING         RUNNING>SUCCEEDED   RUNNING>FAILED   RUNNING>STOPPED  ?
Running           PENDING         PENDING         RUNNING         RUNNING>SUCCEEDED   RUNNING>FAILED   RUNNING>STOPPED  ?
Complete          LOST            LOST            LOST            SUCCEEDED           FAILED           STOPPED          LOST
Suspending        QUEUED          QUEUED          QUEUED          QUEUED              QUEUED           QUEUED           QUEUED
Suspended         QUEUED          QUEUED          QUEUED          QUEUED              QUEUED           QUEUED           QUEUED
Waiting           INVALID         INVALID         INVALID         INVALID             INVALID          INVALID          INVALID
Retrying          PENDING         PENDING         PENDING         PENDING             PENDING          PENDING          PENDING
ValidationFailed  INVALID         INVALID         INVALID         INVALID             INVALID          INVALID          INVALID
Cleaning          ?               ?               ?               RUNNING>SUCCEEDED   RUNNING>FAILED   RUNNING>STOPPED  ?
"""
OF_FAILED = """
reason                                            -               PENDING         RUNNING         SUCCEEDED  FAILED    STOPPED   PAUSED
-                                                 SUBMITTER_LOST  SUBMITTER_LOST  SUBMITTER_LOST  SUCCEEDED  FAILED    STOPPED   SUBMITTER_LOST
AppFailed                                         SUBMITTER_LOST  SUBMITTER_LOST  SUBMITTER_LOST  SUCCEEDED  FAILED    STOPPED   SUBMITTER_LOST
SubmissionFailed                                  SUBMITTER_LOST  SUBMITTER_LOST  SUBMITTER_LOST  SUCCEEDED  FAILED    STOPPED   SUBMITTER_LOST
DeadlineExceeded                                  DEADLINE        DEADLINE        DEADLINE        DEADLINE   DEADLINE  DEADLINE  DEADLINE
PreRunningDeadlineExceeded                        CAPACITY        CAPACITY        CAPACITY        CAPACITY   CAPACITY  CAPACITY  CAPACITY
JobStatusCheckTimeoutExceeded                     LOST            LOST            LOST            SUCCEEDED  FAILED    STOPPED   LOST
JobDeploymentStatusTransitionGracePeriodExceeded  LOST            LOST            LOST            SUCCEEDED  FAILED    STOPPED   LOST
ValidationFailed                                  INVALID         INVALID         INVALID         INVALID    INVALID   INVALID   INVALID
NoSuchReasonYet                                   SUBMITTER_LOST  SUBMITTER_LOST  SUBMITTER_LOST  SUCCEEDED  FAILED    STOPPED   SUBMITTER_LOST
"""


def cells(table: str) -> list[tuple[str, str, str]]:
    header, *lines = (line.split() for line in table.strip().splitlines())
    rows = [(line[0], job, cell) for line in lines for job, cell in zip(header[1:], line[1:], strict=True)]
    return [("" if first == "-" else first, "" if job == "-" else job, cell) for first, job, cell in rows]


REASONS = sorted({reason for reason, _, _ in cells(OF_FAILED)})
PAIRS = [
    *((state, job, reason, cell) for state, job, cell in cells(BY_STATE) for reason in REASONS),
    *(("Failed", job, reason, cell) for reason, job, cell in cells(OF_FAILED)),
]
VIEW = RayJobView("run-a1", "uid-1", "7")


def check(seen, cell: str, view: RayJobView) -> None:
    if cell == "?":
        assert seen.status not in FINAL and seen.status not in ACTIVE and view.deployment_status in seen.status, view
    else:
        assert seen.status == cell, view


@pytest.mark.parametrize("state", sorted({pair[0] for pair in PAIRS}))
def test_every_state(state):
    for job, reason, cell in (pair[1:] for pair in PAIRS if pair[0] == state):
        view = replace(VIEW, deployment_status=state, job_status=job, reason=reason, message="said")
        soon, _, later = cell.partition(">")
        for since in (None, 1000.0, 1000.0 - SETTLE + 1):
            check(observe(view, now=1000.0, terminal_since=since), soon, view)
        check(observe(view, now=1000.0, terminal_since=1000.0 - SETTLE), later or soon, view)
        assert view.settling == bool(later), view


def test_every_rule_is_the_one_for_some_state():
    from airflow_mlops.training import rayjob

    views = [replace(VIEW, deployment_status=state, job_status=job, reason=reason) for state, job, reason, _ in PAIRS]
    assert {rayjob._rule(view) for view in views} == set(RULES)


def test_success_is_the_jobs_own_word_alone():
    for state, job, reason, _ in PAIRS:
        view = replace(VIEW, deployment_status=state, job_status=job, reason=reason)
        for seen in (observe(view, now=9e9, terminal_since=0.0), observe(None, now=0.0, last=view)):
            assert seen.status != "SUCCEEDED" or job == "SUCCEEDED", view


def test_row_of_a_table_never_says_more_than_the_object():
    for state, job, reason, _ in PAIRS:
        whole = replace(VIEW, deployment_status=state, job_status=job, reason=reason, message="said")
        row = replace(whole, reason="", message="", partial=True)
        for since in (None, 0.0):
            of_row, of_whole = (observe(view, now=1000.0, terminal_since=since).status for view in (row, whole))
            assert of_row in (INCOMPLETE, of_whole), whole
            # An end that needs no words is known from the row, and so is everything before the end.
            if of_whole in ("PENDING", "RUNNING", "QUEUED") or (state, job) == ("Complete", "SUCCEEDED"):
                assert of_row == of_whole, whole
            if state == "Failed" or of_whole == "FAILED":
                assert of_row == INCOMPLETE, whole


def test_incomplete_is_waited_for():
    assert INCOMPLETE not in FINAL and INCOMPLETE not in ACTIVE


# Gone after having been seen in a state, and: being deleted in that state.
@pytest.mark.parametrize(
    ("state", "job", "reason", "deleting", "gone"),
    [
        ("", "", "", "STOPPING", "STOPPED"),
        ("Initializing", "", "", "STOPPING", "STOPPED"),
        ("Running", "PENDING", "", "STOPPING", "STOPPED"),
        ("Running", "RUNNING", "", "STOPPING", "STOPPED"),
        ("Running", "PAUSED", "", "STOPPING", "STOPPED"),
        ("Suspended", "", "", "STOPPING", "STOPPED"),
        ("Suspending", "RUNNING", "", "STOPPING", "STOPPED"),
        ("Retrying", "FAILED", "", "STOPPING", "STOPPED"),
        ("Waiting", "", "", "STOPPING", "STOPPED"),
        ("Cleaning", "RUNNING", "", "STOPPING", "STOPPED"),
        ("Running", "SUCCEEDED", "", "STOPPING", "SUCCEEDED"),
        ("Running", "FAILED", "", "STOPPING", "FAILED"),
        ("Running", "STOPPED", "", "STOPPING", "STOPPED"),
        ("Complete", "SUCCEEDED", "", "SUCCEEDED", "SUCCEEDED"),
        ("Complete", "STOPPED", "", "STOPPED", "STOPPED"),
        ("Complete", "RUNNING", "", "LOST", "LOST"),
        ("Failed", "FAILED", "AppFailed", "FAILED", "FAILED"),
        ("Failed", "RUNNING", "SubmissionFailed", "STOPPING", "LOST"),
        ("Failed", "", "", "STOPPING", "LOST"),
        ("Failed", "RUNNING", "DeadlineExceeded", "DEADLINE", "DEADLINE"),
        ("Failed", "", "PreRunningDeadlineExceeded", "CAPACITY", "CAPACITY"),
        ("ValidationFailed", "", "", "INVALID", "INVALID"),
    ],
)
def test_deletion(state, job, reason, deleting, gone):
    view = replace(VIEW, deployment_status=state, job_status=job, reason=reason)
    assert observe(replace(view, deleting=True), now=0.0).status == deleting
    for last in (view, replace(view, deleting=True)):
        assert observe(None, now=0.0, last=last).status == gone


def test_gone_before_its_reason_was_read_is_lost():
    row = replace(VIEW, deployment_status="Failed", job_status="FAILED", partial=True)
    assert observe(None, now=0.0, last=row).status == "LOST"


def test_never_there_is_lost():
    assert observe(None, now=0.0).status == "LOST"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Job entrypoint command failed with exit code 70, last available logs (truncated to 20,000 chars):\nx", 70),
        ("Job entrypoint command failed with exit code -9. No logs available.", -9),
        ("Job supervisor actor died: node 10.0.0.1 is gone; Job entrypoint command failed with exit code 1", None),
        ("", None),
    ],
)
def test_exit_code_is_rays_and_not_the_logs(message, code):
    view = replace(VIEW, deployment_status="Failed", job_status="FAILED", reason="AppFailed", message=message)
    seen = observe(view, now=0.0)
    assert seen.exit_code == code and seen.message == message


def test_kuberays_words_reach_the_message():
    view = replace(VIEW, deployment_status="ValidationFailed", reason="ValidationFailed", message="bad name")
    assert "ValidationFailed: bad name" in observe(view, now=0.0).message
    assert len(observe(replace(view, message="x" * 30_000), now=0.0).message) < 2_200
    unknown = observe(replace(VIEW, deployment_status="Cleaning"), now=0.0)
    assert "Cleaning" in unknown.message


def test_who_suspended_it_is_told():
    view = replace(VIEW, deployment_status="Suspended")
    assert "not by Kueue" in observe(view, now=0.0).message
    assert "Kueue holds it in queue team-a" in observe(replace(view, queued="team-a"), now=0.0).message


OBJECT = {
    "metadata": {
        "name": "train-0123456789ab-a2",
        "uid": "9128c77c",
        "resourceVersion": "682",
        "labels": {"mlops.airflow.org/attempt": "2", "kueue.x-k8s.io/queue-name": "team-a"},
        "annotations": {"mlops.airflow.org/owner-try": "3"},
        "deletionTimestamp": "2026-11-21T08:57:10Z",
    },
    "spec": {"suspend": True},
    "status": {
        "dashboardURL": "lab-job-nvlgt-head-svc.default.svc.cluster.local:8265",
        "endTime": "2026-11-21T08:57:08Z",
        "jobDeploymentStatus": "Complete",
        "jobId": "train-0123456789ab-a2",
        "jobStatus": "SUCCEEDED",
        "message": "Job finished successfully.",
        "rayClusterName": "lab-job-nvlgt",
        "rayJobInfo": {"endTime": "2026-11-21T08:57:02Z", "startTime": "2026-11-21T08:56:55Z"},
        "startTime": "2026-11-21T08:56:07Z",
    },
}


def test_view_of_an_object():
    assert RayJobView.of(OBJECT) == RayJobView(
        name="train-0123456789ab-a2",
        uid="9128c77c",
        resource_version="682",
        deployment_status="Complete",
        job_status="SUCCEEDED",
        message="Job finished successfully.",
        cluster="lab-job-nvlgt",
        deleting=True,
        queued="team-a",
        owner_try=3,
    )


def test_view_of_a_row():
    columns = {
        "job status": "SUCCEEDED",
        "deployment status": "Complete",
        "ray cluster name": "lab-job-nvlgt",
        "start time": "2026-11-21T08:56:07Z",
        "end time": "2026-11-21T08:57:08Z",
        "age": "5m",
    }
    whole = RayJobView.of(OBJECT)
    expected = replace(whole, message="", partial=True)
    assert RayJobView.of_row(columns, OBJECT["metadata"]) == expected
    assert RayJobView.of_row({name.title(): value for name, value in columns.items()}, OBJECT["metadata"]) == expected


@pytest.mark.parametrize("status", [None, {}, {"startTime": "yesterday", "jobStatus": None, "rayJobInfo": None}])
def test_view_of_a_new_or_odd_object(status):
    odd = {"labels": None, "annotations": {"mlops.airflow.org/owner-try": "x"}, "name": "n"}
    view = RayJobView.of({"metadata": odd, "status": status})
    assert (view.queued, view.owner_try, view.deleting) == (None, None, False)
    assert observe(view, now=0.0).status == "PENDING"
    assert RayJobView.of_row({"job status": None}, {}).job_status == ""


#: States of the three RayJobs that were recorded with a real KubeRay, and what an operator has to make of each.
RECORDED = {
    "succeeds": [
        ("", "", "PENDING"),
        ("Initializing", "", "PENDING"),
        ("Running", "", "PENDING"),
        ("Running", "PENDING", "PENDING"),
        ("Running", "RUNNING", "RUNNING"),
        ("Running", "SUCCEEDED", "RUNNING"),
        ("Complete", "SUCCEEDED", "SUCCEEDED"),
    ],
    "fails": [
        ("Running", "RUNNING", "RUNNING"),
        ("Running", "FAILED", "RUNNING"),
        ("Failed", "FAILED", "FAILED"),
    ],
    "suspended": [
        ("Initializing", "", "PENDING"),
        ("Suspending", "", "QUEUED"),
        ("Suspended", "", "QUEUED"),
        ("Suspended", "RUNNING", "QUEUED"),
    ],
}


@pytest.mark.parametrize("course", RECORDED.values(), ids=RECORDED)
def test_recorded_courses(course):
    for state, job, expected in course:
        view = replace(VIEW, deployment_status=state, job_status=job, reason="AppFailed" if state == "Failed" else "")
        assert observe(view, now=8.0, terminal_since=0.0).status == expected
