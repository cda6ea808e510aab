"""The schema check that the Kubernetes tests rest on: what it must refuse, and that real objects pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.crd import CrdSchemas, crd_dir, label_errors

DIRECTORY = crd_dir()
pytestmark = pytest.mark.skipif(DIRECTORY is None, reason="needs the CRDs: set KUBE_CRD_DIR")

POD = {"spec": {"containers": [{"name": "ray", "image": "rayproject/ray:2.60.0"}]}}
JOB = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "a", "namespace": "default", "labels": {"mlops.airflow.org/run": "x"}},
    "spec": {
        "entrypoint": "true",
        "rayClusterSpec": {
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": POD},
            "workerGroupSpecs": [
                {"groupName": "w", "replicas": 1, "minReplicas": 1, "maxReplicas": 1, "template": POD}
            ],
        },
    },
}


@pytest.fixture(scope="module")
def schemas() -> CrdSchemas:
    assert DIRECTORY is not None
    return CrdSchemas(DIRECTORY)


def changed(path: str, value: object) -> dict:
    """JOB with one field set, or removed where the value is ``...``."""
    obj: Any = json.loads(json.dumps(JOB))  # a deep copy would still share the pod
    node = obj
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return obj


def test_a_valid_object_has_no_errors(schemas):
    assert schemas.errors(JOB) == []


WORKER = "spec/rayClusterSpec/workerGroupSpecs/0"
CONTAINER = f"{WORKER}/template/spec/containers/0"


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("spec/entrypoin", "x", 'unknown field "spec.entrypoin"'),
        ("metadata/label", {}, 'unknown field "metadata.label"'),
        ("stat", {}, 'unknown field "stat"'),
        (f"{CONTAINER}/imag", "x", "workerGroupSpecs[0].template.spec.containers[0].imag"),
        (f"{WORKER}/template/metadata/label", {}, "template.metadata.label"),
        ("spec/backoffLimit", "0", "spec.backoffLimit: Invalid value"),
        ("spec/backoffLimit", True, "must be of type integer"),
        ("spec/backoffLimit", 2**31, "must be of type int32"),
        ("spec/entrypoint", None, 'must be of type string: "null"'),
        ("spec/shutdownAfterJobFinishes", "true", "must be of type boolean"),
        ("spec/metadata", {"a": 1}, "spec.metadata.a: Invalid value"),
        ("spec/rayClusterSpec/authOptions/mode", "basic", 'supported values: "disabled", "token"'),
        (f"{CONTAINER}/resources/limits/cpu", "two", "should match"),
        (f"{CONTAINER}/resources/limits/cpu", 1.5, "must be an integer or a string"),
        (f"{CONTAINER}/name", ..., "containers[0].name: Required value"),
        (f"{CONTAINER}/env", [{"name": "A"}, {"name": "A"}], "env[1]: Duplicate value"),
        ("spec/rayClusterSpec/headGroupSpec", ..., "spec.rayClusterSpec.headGroupSpec: Required value"),
        ("status/endTime", "yesterday", "must be of type date-time"),
        ("metadata/name", "A", "metadata.name: Invalid value"),
        ("metadata/name", ..., "metadata.name: Required value"),
        ("metadata/labels", {"x": "a b"}, "metadata.labels.x: Invalid value"),
        ("metadata/labels", {"x": "a" * 64}, "metadata.labels.x: Invalid value"),
        ("metadata/annotations", {"x": 1}, "metadata.annotations.x"),
        ("apiVersion", "ray.io/v2", 'no matches for kind "RayJob"'),
    ],
)
def test_each_mistake_is_one_error(schemas, path, value, error):
    errors = schemas.errors(changed(path, value))
    assert len(errors) == 1 and error in errors[0], errors


def test_unknown_fields_count_only_in_strict_mode_and_are_pruned(schemas):
    wrong = changed(f"{CONTAINER}/imag", "x")
    assert schemas.errors(wrong) and schemas.errors(wrong, strict=False) == []
    assert schemas.prune(wrong) == JOB


def test_quantities_are_numbers_or_strings_and_ports_have_a_default_protocol(schemas):
    assert schemas.errors(changed(f"{CONTAINER}/resources", {"limits": {"cpu": 2, "memory": "4Gi"}})) == []
    ports = [{"containerPort": 1}, {"containerPort": 1, "protocol": "UDP"}]
    assert schemas.errors(changed(f"{CONTAINER}/ports", ports)) == []
    assert "Duplicate" in schemas.errors(changed(f"{CONTAINER}/ports", [ports[0], {**ports[0], "protocol": "TCP"}]))[0]


def test_defaults_are_filled_in(schemas):
    filled = schemas.with_defaults(changed("spec/ttlSecondsAfterFinished", None))
    assert filled["spec"]["ttlSecondsAfterFinished"] == 0
    assert "ttlSecondsAfterFinished" not in JOB["spec"]


def test_recorded_objects_of_a_real_cluster_pass(schemas):
    trace = DIRECTORY.parent / "facts" / "rayjob_trace.jsonl"
    if not trace.exists():
        pytest.skip("no recorded trace beside the CRDs")
    seen = 0
    for line in trace.read_text().splitlines():
        recorded = json.loads(line)
        if recorded["kind"] in ("RayJob", "RayCluster"):
            # The trace has no specs, and a null where there was no status yet.
            parts = {name: part for name, part in recorded["object"].items() if part is not None}
            obj = {"apiVersion": "ray.io/v1", "kind": recorded["kind"], **parts}
            assert [error for error in schemas.errors(obj) if error != "spec: Required value"] == []
            seen += 1
    assert seen > 20


def test_every_kind_names_its_versions(schemas):
    kinds = {definition.kind: definition for definition in schemas.kinds}
    assert {"RayJob", "RayCluster", "Workload", "PodGroup", "HTTPRoute", "InferenceService"} <= set(kinds)
    job = kinds["RayJob"]
    assert (job.group, job.plural, job.versions, job.namespaced) == ("ray.io", "rayjobs", ["v1", "v1alpha1"], True)
    assert job.has_status("v1") and job.columns("v1")[0]["jsonPath"] == ".status.jobStatus"


def test_a_file_may_hold_several_definitions(tmp_path):
    one = """apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: KIND}
spec:
  group: example.org
  names: {kind: KIND, plural: KINDs}
  scope: Cluster
  versions:
  - {name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, properties: {spec: {
      type: object, required: [size], x-kubernetes-preserve-unknown-fields: KEEP,
      properties: {size: {type: number, minimum: 1, default: 2}}}}}}}
"""
    documents = [
        one.replace("KIND", "big").replace("KEEP", "true"),
        one.replace("KIND", "small").replace("KEEP", "false"),
    ]
    (tmp_path / "both.yaml").write_text("---\n" + "---\n".join(documents))
    schemas = CrdSchemas(tmp_path)
    assert [(kind.kind, kind.plural, kind.namespaced) for kind in schemas.kinds] == [
        ("big", "bigs", False),
        ("small", "smalls", False),
    ]
    obj = {"apiVersion": "example.org/v1", "kind": "big", "metadata": {"name": "a"}, "spec": {"any": 1, "size": 0.5}}
    assert schemas.errors(obj) == ["spec.size: Invalid value: 0.5: should be greater than or equal to 1"]
    assert schemas.errors({**obj, "spec": {}}) == []  # required, and has a default
    assert schemas.prune(obj) == obj
    assert schemas.errors({**obj, "kind": "small", "spec": {"any": 1}}) == ['unknown field "spec.any"']
    assert schemas.with_defaults({**obj, "spec": {}})["spec"] == {"size": 2}


def test_labels_of_pod_templates_can_be_checked_too():
    assert label_errors({"mlops.airflow.org/run": "abc", "a": ""}) == []
    assert len(label_errors({"a/b/c": "x", "d": "-x", "e": 1})) == 3
