"""What this project relies on in a Kubernetes API server and in KubeRay: the same tests for the stand-in and a cluster.

``make test-k8s`` runs them against the cluster in ``KUBECONFIG``; there every object carries a label and is deleted.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import kube_cluster
from support.kube_cluster import EVENTS, LABEL, PODS, RAYCLUSTERS, RAYJOBS, Cluster

TRACE = json.loads((Path(kube_cluster.__file__).parent / "rayjob_trace.json").read_text())
TABLE = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"}


def message(answer: Any, status: int, reason: str) -> str:
    """The message of a refusal that is as expected."""
    body = answer.json()
    assert (answer.status_code, body["kind"], body["status"]) == (status, "Status", "Failure"), answer.text
    assert (body["code"], body["reason"]) == (status, reason), answer.text
    return body["message"]


def needs_schemas(cluster: Cluster) -> None:
    if not cluster.strict:
        pytest.skip("no CRD schemas here: set KUBE_CRD_DIR to a folder with KubeRay's CRDs")


# Objects


def test_a_created_object_has_identity_and_version(cluster):
    made = cluster.create(cluster.rayjob("made"))
    meta = made["metadata"]
    assert meta["uid"] and int(meta["resourceVersion"]) > 0
    assert (meta["generation"], meta["namespace"]) == (1, cluster.namespace)
    assert "status" not in made
    found = cluster.call("GET", cluster.path(RAYJOBS, meta["name"])).json()
    assert found["metadata"]["uid"] == meta["uid"]
    assert (found["kind"], found["apiVersion"]) == ("RayJob", "ray.io/v1")


def test_a_name_can_be_created_once(cluster):
    body = cluster.rayjob("once")
    first = cluster.create(body)
    text = message(cluster.call("POST", cluster.path(RAYJOBS), body), 409, "AlreadyExists")
    assert text == f'rayjobs.ray.io "{body["metadata"]["name"]}" already exists'
    found = cluster.call("GET", cluster.path(RAYJOBS, body["metadata"]["name"])).json()
    assert found["metadata"]["uid"] == first["metadata"]["uid"]


def test_what_is_absent_and_what_is_not_served_differ(cluster):
    text = message(cluster.call("GET", cluster.path(RAYJOBS, "absent")), 404, "NotFound")
    assert text == 'rayjobs.ray.io "absent" not found'
    unknown = cluster.call("GET", f"/apis/not-installed.example/v1/namespaces/{cluster.namespace}/things")
    assert (unknown.status_code, unknown.text.strip()) == (404, "404 page not found")


def test_a_dry_run_leaves_nothing(cluster):
    body = cluster.rayjob("dry")
    answer = cluster.call("POST", cluster.path(RAYJOBS), body, dryRun="All")
    assert answer.status_code == 201, answer.text
    assert cluster.call("GET", cluster.path(RAYJOBS, body["metadata"]["name"])).status_code == 404


def test_a_misspelt_field_is_refused_only_when_strict(cluster):
    needs_schemas(cluster)
    body = cluster.rayjob("strict", entrypont="oops")
    text = message(cluster.call("POST", cluster.path(RAYJOBS), body, fieldValidation="Strict"), 400, "BadRequest")
    assert 'strict decoding error: unknown field "spec.entrypont"' in text
    lenient = cluster.call("POST", cluster.path(RAYJOBS), body)
    assert lenient.status_code == 201, lenient.text
    assert "entrypont" not in lenient.json()["spec"]


def test_a_wrong_type_is_invalid(cluster):
    needs_schemas(cluster)
    text = message(cluster.call("POST", cluster.path(RAYJOBS), cluster.rayjob("wrong", entrypoint=4)), 422, "Invalid")
    assert "spec.entrypoint" in text and "must be of type string" in text


def test_status_and_spec_have_their_own_endpoints(cluster):
    made = cluster.create({**cluster.rayjob("status"), "status": {"jobStatus": "FAILED"}})
    path = cluster.path(RAYJOBS, made["metadata"]["name"])
    assert "status" not in made
    answer = cluster.patch(f"{path}/status", {"status": {"jobStatus": "RUNNING"}, "spec": {"entrypoint": "changed"}})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["status"]["jobStatus"], answer.json()["spec"]["entrypoint"]) == ("RUNNING", "true")
    assert answer.json()["metadata"]["generation"] == 1
    answer = cluster.patch(path, {"status": {"jobStatus": "FAILED"}, "spec": {"entrypoint": "changed"}})
    assert (answer.json()["status"]["jobStatus"], answer.json()["spec"]["entrypoint"]) == ("RUNNING", "changed")
    assert answer.json()["metadata"]["generation"] == 2


def test_a_stale_version_is_refused(cluster):
    old = cluster.create(cluster.rayjob("stale"))
    path = cluster.path(RAYJOBS, old["metadata"]["name"])
    newer = cluster.patch(path, {"metadata": {"annotations": {"a": "1"}}}).json()
    assert int(newer["metadata"]["resourceVersion"]) > int(old["metadata"]["resourceVersion"])
    text = message(cluster.call("PUT", path, old), 409, "Conflict")
    assert "the object has been modified" in text
    stale = {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"], "annotations": {"a": "2"}}}
    assert "the object has been modified" in message(cluster.patch(path, stale), 409, "Conflict")
    current = {"metadata": {"resourceVersion": newer["metadata"]["resourceVersion"], "annotations": {"a": "3"}}}
    assert cluster.patch(path, current).json()["metadata"]["annotations"] == {"a": "3"}
    assert cluster.call("PUT", path, {**old, "metadata": {**old["metadata"], "resourceVersion": ""}}).status_code == 422


def test_a_write_without_effect_is_no_new_version(cluster):
    made = cluster.create(cluster.rayjob("same"))
    again = cluster.patch(cluster.path(RAYJOBS, made["metadata"]["name"]), {"spec": {"entrypoint": "true"}}).json()
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


def test_patches_of_each_kind(cluster):
    path = cluster.path(RAYJOBS, cluster.create(cluster.rayjob("patches"))["metadata"]["name"])
    merged = cluster.patch(path, {"metadata": {"annotations": {"a/b": "1", "c": "2"}}}).json()
    assert merged["metadata"]["annotations"] == {"a/b": "1", "c": "2"}
    assert "annotations" not in cluster.patch(path, {"metadata": {"annotations": None}}).json()["metadata"]
    steps: list[dict[str, Any]] = [
        {"op": "test", "path": "/spec/entrypoint", "value": "true"},
        {"op": "add", "path": "/metadata/annotations", "value": {"a/b": "3"}},
        {"op": "replace", "path": "/metadata/annotations/a~1b", "value": "4"},
    ]
    assert cluster.patch(path, steps, "json-patch+json").json()["metadata"]["annotations"] == {"a/b": "4"}
    steps[0]["value"] = "false"
    message(cluster.patch(path, steps, "json-patch+json"), 422, "Invalid")
    message(cluster.patch(path, {}, "strategic-merge-patch+json"), 415, "UnsupportedMediaType")


def test_server_side_apply_respects_owners_of_fields(cluster):
    body = cluster.rayjob("applied")
    path = cluster.path(RAYJOBS, body["metadata"]["name"])
    body["metadata"]["annotations"] = {"a": "1", "b": "1"}
    assert cluster.patch(path, body, "apply-patch+yaml", fieldManager="one").status_code == 201
    again = cluster.patch(path, body, "apply-patch+yaml", fieldManager="one")
    assert again.status_code == 200
    assert {entry["manager"] for entry in again.json()["metadata"]["managedFields"]} == {"one"}
    head = {"apiVersion": body["apiVersion"], "kind": "RayJob"}
    other = {**head, "metadata": {"name": body["metadata"]["name"], "annotations": {"a": "2"}}}
    text = message(cluster.patch(path, other, "apply-patch+yaml", fieldManager="two"), 409, "Conflict")
    assert 'conflict with "one"' in text and ".metadata.annotations.a" in text
    forced = cluster.patch(path, other, "apply-patch+yaml", fieldManager="two", force="true")
    assert forced.json()["metadata"]["annotations"] == {"a": "2", "b": "1"}
    # What an owner no longer applies goes, unless somebody else owns it.
    del body["metadata"]["annotations"]
    left = cluster.patch(path, body, "apply-patch+yaml", fieldManager="one").json()
    assert left["metadata"]["annotations"] == {"a": "2"}
    assert left["spec"]["entrypoint"] == "true"
    message(cluster.patch(path, body, "apply-patch+yaml"), 422, "Invalid")


def test_delete_heeds_its_preconditions(cluster):
    made = cluster.create(cluster.rayjob("conditions"))["metadata"]
    path = cluster.path(RAYJOBS, made["name"])
    for wrong in ({"uid": "00000000-0000-0000-0000-000000000000"}, {"resourceVersion": "1"}):
        answer = cluster.call("DELETE", path, {"preconditions": wrong})
        assert "in the precondition" in message(answer, 409, "Conflict")
    right = {"uid": made["uid"], "resourceVersion": made["resourceVersion"]}
    answer = cluster.call("DELETE", path, {"preconditions": right})
    assert (answer.status_code, answer.json()["status"]) == (200, "Success")
    assert answer.json()["details"]["uid"] == made["uid"]
    message(cluster.call("DELETE", path), 404, "NotFound")


def test_a_finalizer_holds_an_object(cluster):
    body = cluster.rayjob("held")
    body["metadata"]["finalizers"] = ["tests.example/hold"]
    path = cluster.path(RAYJOBS, cluster.create(body)["metadata"]["name"])
    deleted = cluster.call("DELETE", path)
    assert deleted.status_code == 200
    held = cluster.call("GET", path).json()["metadata"]
    assert held["deletionTimestamp"] and held["generation"] == 2
    assert cluster.call("DELETE", path).status_code == 200
    new = {"metadata": {"finalizers": ["tests.example/hold", "tests.example/more"]}}
    assert "no new finalizers" in message(cluster.patch(path, new), 422, "Invalid")
    assert cluster.patch(path, {"metadata": {"finalizers": None}}).status_code == 200
    message(cluster.call("GET", path), 404, "NotFound")


@pytest.mark.parametrize("policy", ["Background", "Foreground", "Orphan"])
def test_what_an_object_owned_goes_with_it_unless_orphaned(cluster, policy):
    owner, owned = cluster.create(cluster.rayjob("owner")), cluster.rayjob("owned")
    meta = owner["metadata"]
    reference = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": meta["name"], "uid": meta["uid"]}
    owned["metadata"]["ownerReferences"] = [{**reference, "blockOwnerDeletion": True}]
    path = cluster.path(RAYJOBS, cluster.create(owned)["metadata"]["name"])
    time.sleep(2 if cluster.live else 0)
    owners_path = cluster.path(RAYJOBS, meta["name"])
    assert cluster.call("DELETE", owners_path, {"propagationPolicy": policy}).status_code == 200
    cluster.until(lambda: cluster.call("GET", owners_path).status_code == 404, "the owner is gone", 60)
    if policy == "Orphan":
        assert "ownerReferences" not in cluster.call("GET", path).json()["metadata"]
    else:
        cluster.until(lambda: cluster.call("GET", path).status_code == 404, "the owned object is gone", 60)


def test_without_a_right_requests_are_forbidden(cluster):
    somebody = {"Impersonate-User": "nobody-in-particular"}
    answer = cluster.call("GET", cluster.path(RAYJOBS), headers=somebody)
    text = message(answer, 403, "Forbidden")
    assert 'cannot list resource "rayjobs" in API group "ray.io"' in text
    answer = cluster.call("GET", cluster.path(PODS, "some-pod") + "/log", headers=somebody)
    assert 'cannot get resource "pods/log" in API group ""' in message(answer, 403, "Forbidden")


# Lists


def test_selectors(cluster):
    for name, tier in (("sel-a", "gold"), ("sel-b", "iron"), ("sel-c", "")):
        body = cluster.rayjob(name)
        if tier:
            body["metadata"]["labels"]["tier"] = tier
        cluster.create(body)

    def names(selector: str, **query: Any) -> list[str]:
        query = {"labelSelector": f"{cluster.selector},{selector}".rstrip(","), **query}
        items = cluster.call("GET", cluster.path(RAYJOBS), **query).json()["items"]
        return [item["metadata"]["name"].removesuffix(f"-{cluster.mark}") for item in items]

    assert names("tier=gold") == ["sel-a"]
    assert names("tier!=gold") == ["sel-b", "sel-c"]
    assert names("tier in (gold, iron)") == ["sel-a", "sel-b"]
    assert names("tier notin (gold)") == ["sel-b", "sel-c"]
    assert names("tier") == ["sel-a", "sel-b"]
    assert names("!tier") == ["sel-c"]
    assert names("", fieldSelector=f"metadata.name=sel-b-{cluster.mark}") == ["sel-b"]
    message(cluster.call("GET", cluster.path(RAYJOBS), labelSelector="a=b=c"), 400, "BadRequest")
    message(cluster.call("GET", cluster.path(RAYJOBS), fieldSelector="spec.entrypoint=x"), 400, "BadRequest")


def test_pages_show_one_moment(cluster):
    made = [cluster.create(cluster.rayjob(f"page-{index}"))["metadata"]["name"] for index in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"labelSelector": cluster.selector, "limit": 2}
    versions = set()
    while True:
        body = cluster.call("GET", cluster.path(RAYJOBS), **query).json()
        seen += [item["metadata"]["name"] for item in body["items"]]
        versions.add(body["metadata"]["resourceVersion"])
        if len(seen) == 2:
            cluster.call("DELETE", cluster.path(RAYJOBS, made[4]))
        if not body["metadata"].get("continue"):
            break
        query["continue"] = body["metadata"]["continue"]
    assert seen == made
    assert len(versions) == 1
    assert body["kind"] == "RayJobList"


def test_a_table_has_the_printed_columns_and_the_metadata(cluster):
    name = cluster.create(cluster.rayjob("table"))["metadata"]["name"]
    cluster.patch(f"{cluster.path(RAYJOBS, name)}/status", {"status": {"jobStatus": "RUNNING"}})
    query = {"labelSelector": cluster.selector, "includeObject": "Metadata"}
    body = cluster.call("GET", cluster.path(RAYJOBS), headers=TABLE, **query).json()
    assert (body["kind"], body["apiVersion"]) == ("Table", "meta.k8s.io/v1")
    assert body["metadata"]["resourceVersion"]
    columns = [column["name"].lower() for column in body["columnDefinitions"]]
    assert columns[0] == "name" and {"job status", "deployment status"} <= set(columns)
    (row,) = body["rows"]
    cells = dict(zip(columns, row["cells"], strict=True))
    assert (cells["name"], cells["job status"]) == (name, "RUNNING")
    assert not cells["deployment status"]
    assert row["object"]["kind"] == "PartialObjectMetadata"
    assert row["object"]["metadata"]["labels"][LABEL] == cluster.mark
    assert "spec" not in row["object"]


# Watches


def test_a_watch_tells_all_changes_after_a_version(cluster):
    listed = cluster.call("GET", cluster.path(RAYJOBS), labelSelector=cluster.selector).json()
    since = listed["metadata"]["resourceVersion"]
    name = cluster.create(cluster.rayjob("watched"))["metadata"]["name"]
    path = cluster.path(RAYJOBS, name)
    cluster.patch(path, {"metadata": {"annotations": {"a": "1"}}})
    later = threading.Timer(0.3, lambda: cluster.call("DELETE", path))
    later.start()
    query = {"labelSelector": cluster.selector, "resourceVersion": since, "timeoutSeconds": 3}
    events = list(cluster.watch(cluster.path(RAYJOBS), **query))
    later.join()
    assert [kind for kind, _ in events] == ["ADDED", "MODIFIED", "DELETED"]
    versions = [int(obj["metadata"]["resourceVersion"]) for _, obj in events]
    assert versions == sorted(set(versions)) and versions[0] > int(since)


def test_a_watch_without_a_version_begins_with_what_is_there(cluster):
    name = cluster.create(cluster.rayjob("present"))["metadata"]["name"]
    events = list(cluster.watch(cluster.path(RAYJOBS), labelSelector=cluster.selector, timeoutSeconds=1))
    assert [(kind, obj["metadata"]["name"]) for kind, obj in events] == [("ADDED", name)]


def test_a_watch_with_a_selector_sees_objects_come_and_go(cluster):
    made = cluster.create(cluster.rayjob("moving"))
    path = cluster.path(RAYJOBS, made["metadata"]["name"])
    for colour in ("red", "blue", None, "red"):
        cluster.patch(path, {"metadata": {"labels": {"colour": colour}}})
    query = {"resourceVersion": made["metadata"]["resourceVersion"], "timeoutSeconds": 1}
    events = list(cluster.watch(cluster.path(RAYJOBS), labelSelector=f"{cluster.selector},colour=red", **query))
    assert [kind for kind, _ in events] == ["ADDED", "DELETED", "ADDED"]


def test_a_watch_of_tables(cluster):
    made = cluster.create(cluster.rayjob("rows"))["metadata"]
    cluster.patch(f"{cluster.path(RAYJOBS, made['name'])}/status", {"status": {"jobStatus": "PENDING"}})
    query = {"labelSelector": cluster.selector, "resourceVersion": made["resourceVersion"], "timeoutSeconds": 1}
    ((kind, table),) = cluster.watch(cluster.path(RAYJOBS), headers=TABLE, includeObject="Metadata", **query)
    assert (kind, table["kind"]) == ("MODIFIED", "Table")
    (row,) = table["rows"]
    assert "PENDING" in row["cells"]
    assert row["object"]["metadata"]["name"] == made["name"]
    assert table["metadata"]["resourceVersion"] == row["object"]["metadata"]["resourceVersion"]


def test_bookmarks_advance_the_version(cluster):
    listed = cluster.call("GET", cluster.path(RAYJOBS), labelSelector=cluster.selector).json()["metadata"]
    query = {"allowWatchBookmarks": "true", "timeoutSeconds": 5 if cluster.live else 1}
    query |= {"labelSelector": cluster.selector, "resourceVersion": listed["resourceVersion"]}
    bookmarks = [obj for kind, obj in cluster.watch(cluster.path(RAYJOBS), **query) if kind == "BOOKMARK"]
    assert bookmarks and bookmarks[-1]["kind"] == "RayJob"
    assert int(bookmarks[-1]["metadata"]["resourceVersion"]) >= int(listed["resourceVersion"])


def test_a_version_that_is_forgotten_ends_the_watch(cluster):
    if cluster.api:
        cluster.api.compact()
    ((kind, status),) = cluster.watch(cluster.path(PODS), resourceVersion="1", timeoutSeconds=5)
    assert (kind, status["kind"], status["code"], status["reason"]) == ("ERROR", "Status", 410, "Expired")


# KubeRay


def follow(cluster: Cluster, body: dict[str, Any], last: str) -> list[list[Any]]:
    """The distinct [jobDeploymentStatus, jobStatus, reason] of a RayJob from create to deployment state ``last``."""
    made = cluster.create(body)["metadata"]
    query: dict[str, Any] = {"fieldSelector": f"metadata.name={made['name']}"}
    query["timeoutSeconds"] = int(cluster.patience)
    states: list[list[Any]] = [["", "", ""]]
    for _, obj in cluster.watch(cluster.path(RAYJOBS), resourceVersion=made["resourceVersion"], **query):
        status = obj.get("status") or {}
        state = [status.get(key, "") for key in ("jobDeploymentStatus", "jobStatus", "reason")]
        if state != states[-1]:
            states.append(state)
        if state[0] == last:
            return states
    raise AssertionError(f"{made['name']} did not become {last}: {states}")


def compare(cluster: Cluster, seen: list[list[Any]], recorded: list[list[Any]]) -> None:
    """The stand-in follows the trace; a live cluster may be too fast for a state, but never in another order."""
    expected = [row[1:4] for row in recorded]
    if not cluster.live:
        assert seen == expected
        return
    rest = iter(expected)
    assert all(state in rest for state in seen), f"{seen} are not in the order of {expected}"
    assert seen[-1] == expected[-1]


def owned_pods(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    """Pods of a RayJob: its cluster's and its submitter's."""
    clusters = cluster.call(
        "GET", cluster.path(RAYCLUSTERS), labelSelector=f"ray.io/originated-from-cr-name={name}"
    ).json()["items"]
    found = cluster.pods(f"ray.io/originated-from-cr-name={name}")
    for item in clusters:
        found += cluster.pods(f"ray.io/cluster={item['metadata']['name']}")
    return found


def test_a_rayjob_that_succeeds(kuberay):
    cluster = kuberay
    body = cluster.rayjob("good", managed=True, entrypoint="echo hello")
    seen = follow(cluster, body, "Complete")
    compare(cluster, seen, TRACE["succeeds"]["rayjob"])
    name = body["metadata"]["name"]
    job = cluster.call("GET", cluster.path(RAYJOBS, name)).json()
    status = job["status"]
    assert status["jobId"] and status["startTime"] and status["endTime"]
    assert status["rayClusterName"].startswith(f"{name}-")
    assert status.get("succeeded") == 1 and not status.get("failed")
    labels = [pod["metadata"]["labels"] for pod in cluster.pods(f"ray.io/cluster={status['rayClusterName']}")]
    assert sorted(label["ray.io/node-type"] for label in labels) in (["head", "worker"], [])
    assert {label[LABEL] for label in labels} <= {cluster.mark}

    message(cluster.call("GET", cluster.path(PODS, "absent") + "/log"), 404, "NotFound")
    (submitter,) = cluster.pods(f"job-name={name}")
    log = cluster.path(PODS, submitter["metadata"]["name"]) + "/log"
    text = cluster.call("GET", log).text
    assert "hello" in text
    assert cluster.call("GET", log, tailLines=1).text == text.splitlines(keepends=True)[-1]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1))
    assert cluster.call("GET", log, sinceTime=now).text == ""
    stamped = cluster.call("GET", log, timestamps="true").text.splitlines()[0]
    assert stamped.split(" ", 1)[0].endswith("Z") and stamped.split(" ", 1)[1] == text.splitlines()[0]

    events = cluster.call("GET", cluster.path(EVENTS), fieldSelector=f"involvedObject.name={name}").json()["items"]
    assert "CreatedRayCluster" in {event["reason"] for event in events}
    assert {event["involvedObject"]["name"] for event in events} == {name}

    # The time to live is over: the cluster goes, the RayJob and its submitter stay.
    workers = f"ray.io/cluster={status['rayClusterName']}"
    cluster.until(lambda: not cluster.pods(workers), "the cluster's pods are gone", 120)
    assert cluster.call("GET", cluster.path(RAYJOBS, name)).status_code == 200
    assert cluster.pods(f"job-name={name}")[0]["status"]["phase"] == "Succeeded"


def test_a_rayjob_that_fails(kuberay):
    body = kuberay.rayjob("bad", managed=True, entrypoint="sh -c 'echo last words; exit 1'")
    seen = follow(kuberay, body, "Failed")
    compare(kuberay, seen, TRACE["fails"]["rayjob"])
    status = kuberay.call("GET", kuberay.path(RAYJOBS, body["metadata"]["name"])).json()["status"]
    assert status["failed"] == 1 and not status.get("succeeded")
    assert "failed with exit code 1" in status["message"]
    # The submitter succeeds all the same: it only brought the job to Ray.
    (submitter,) = kuberay.pods(f"job-name={body['metadata']['name']}")
    assert submitter["status"]["phase"] == "Succeeded"


def test_a_rayjob_that_is_suspended(kuberay):
    body = kuberay.rayjob("waits", managed=True, suspend=True)
    seen = follow(kuberay, body, "Suspended")
    compare(kuberay, seen, [row for row in TRACE["suspended"]["rayjob"] if row[1:3] != ["Suspended", "RUNNING"]])
    assert owned_pods(kuberay, body["metadata"]["name"]) == []


def test_a_rayjob_that_is_deleted_while_it_runs(kuberay):
    body = kuberay.rayjob("deleted", managed=True, entrypoint="sleep 300", submissionMode="HTTPMode")
    made = kuberay.create(body)["metadata"]
    path = kuberay.path(RAYJOBS, made["name"])

    def running() -> Any:
        status = kuberay.call("GET", path).json().get("status") or {}
        return status.get("jobStatus") == "RUNNING" and status["rayClusterName"]

    cluster_name = kuberay.until(running, "the job runs")
    assert len(kuberay.pods(f"ray.io/cluster={cluster_name}")) == 2
    assert kuberay.call("DELETE", path, {"preconditions": {"uid": made["uid"]}}).status_code == 200
    kuberay.until(lambda: kuberay.call("GET", path).status_code == 404, "the RayJob is gone", 60)
    kuberay.until(lambda: not kuberay.pods(f"ray.io/cluster={cluster_name}"), "its pods are gone", 120)
