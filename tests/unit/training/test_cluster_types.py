"""Whatever value a field of a cluster is given, there is a manifest or a word about what is wrong, never a crash."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.cluster import KubeCluster, warnings
from airflow_mlops.training.manifest import Owner, render_rayjob
from airflow_mlops.training.parts import Autoscale, Gang, Gpu, Rdma, Spot
from airflow_mlops.training.spec import TrainingSpec

BASE = {"image": "rayproject/ray:2.60.0"}
PARTS: dict[str, tuple[type, dict[str, Any]]] = {
    "gpu": (Gpu, {}),
    "gang": (Gang, {"scheduler": "kueue", "queue": "q"}),
    "spot": (Spot, {"provider": "gke"}),
    "autoscale": (Autoscale, {"min_workers": 1, "max_workers": 4}),
    "rdma": (Rdma, {"resources": {"rdma/ib": 1}}),
}
VALUES: tuple[Any, ...] = (
    *(5, 2.5, float("nan"), True, "x", "", b"x", None, object()),
    *([], ["a"], [None], ("a",), [{"name": "a", "value": "b"}]),
    *({}, {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": {"b": 1}}, {1: 2}),
    *({"head": [1]}, {"head": None}, {"worker": {"metadata": None, "spec": None}}, {"env_vars": {"A": [1]}}),
    {"worker": {"spec": {"containers": [{"name": "ray-worker", "volumeMounts": ["x"], "resources": [1]}]}}},
    {"head": {"metadata": {"annotations": [1]}, "spec": {"nodeSelector": [1], "affinity": 5}}},
    {"rayClusterSpec": {"workerGroupSpecs": [{"groupName": 5}]}},
    {"rayClusterSpec": {"workerGroupSpecs": [{"groupName": "workers", "template": {"metadata": {"labels": None}}}]}},
    {"rayClusterSpec": {"headGroupSpec": {"rayStartParams": None}}},
    {"deletionStrategy": {"deletionRules": 5}},
)


def outcome(values: dict[str, Any], made: bool, storage_path: str) -> str:
    """The manifest as JSON, or what is said to be wrong."""
    spec = TrainingSpec("a.b:c", "torch", storage_path, "r1")
    try:
        cluster = KubeCluster(**values) if made else KubeCluster.from_mapping(values)
        manifest = render_rayjob(spec, cluster, name="r1-a1", owner=Owner("d", "t", "r"), spec_uri="s3://b/s")
        warnings(spec, cluster)
    except InvalidInputError as error:
        return str(error)
    return json.dumps(manifest)


@pytest.mark.parametrize("made", [False, True], ids=["dict", "object"])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(KubeCluster)])
def test_a_field_of_any_type(name, made):
    for value in VALUES:
        # The second looks into the pods' volumes, too.
        for storage_path in ("s3://b/r", "/data/r"):
            assert outcome({**BASE, name: value}, made, storage_path)


@pytest.mark.parametrize("made", [False, True], ids=["dict", "object"])
@pytest.mark.parametrize("part", PARTS)
def test_a_field_of_a_part_of_any_type(part, made):
    kind, given = PARTS[part]
    for field in dataclasses.fields(kind):
        for value in VALUES:
            values = {**given, field.name: value}
            assert outcome({**BASE, part: kind(**values) if made else values}, made, "s3://b/r")
