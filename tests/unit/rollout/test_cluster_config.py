"""A target from small JSON, a predictor from a model version, and what is wrong with either."""

from __future__ import annotations

import json

import pytest
from support.kube_api import KubeApi
from support.kube_serving import MemoryClient
from support.rollout_world import CONFIGS, uri

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.targets.deployers import GivenServices, InferenceServices
from airflow_mlops.rollout.targets.factory import target_of
from airflow_mlops.rollout.targets.gateway import GatewayRoute, weights_of
from airflow_mlops.rollout.targets.kserve_knative import KServeKnative
from airflow_mlops.rollout.targets.kserve_standard import KServeStandard
from airflow_mlops.rollout.targets.kube import difference, merged, name_part
from airflow_mlops.rollout.targets.servable import Servable, predictor, servable_of, storage_uri


@pytest.fixture
def client() -> MemoryClient:
    return MemoryClient(KubeApi())


@pytest.mark.parametrize(
    ("name", "made", "deployer"),
    [
        ("gateway", GatewayRoute, GivenServices),
        ("two services", GatewayRoute, InferenceServices),
        ("standard", KServeStandard, None),
        ("knative", KServeKnative, None),
    ],
)
def test_the_kinds(client, name, made, deployer):
    config = json.loads(json.dumps({**CONFIGS[name], "namespace": "ml", "ready_timeout": 5}))
    target = target_of(config, client)
    assert type(target) is made
    assert (target.name, target.namespace, target.ready_timeout) == ("fraud", "ml", 5.0)
    if deployer:
        assert type(target.deployer) is deployer


def test_a_kind_that_another_module_makes(client):
    assert target_of({"kind": "ray_serve", "name": "fraud"}, None, makers={"ray_serve": dict}) == {
        "kind": "ray_serve",
        "name": "fraud",
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "nginx"}, "kind of the target is 'nginx'; expected one of ray_serve, kserve, gateway"),
        ({"kind": "ray_serve"}, "has to be made by its own client"),
        ({"name": ""}, "name of the gateway target is blank"),
        ({"name": 3}, "name of the gateway target is 3; expected str"),
        ({"name": "Fraud"}, "the name of the HTTPRoute is 'Fraud'"),
        ({"services": "a"}, "services of the gateway target is 'a'; expected an object"),
        ({"hostnames": "a.example.com"}, "hostnames of the gateway target is 'a.example.com'; expected list or tuple"),
        ({"wieght": 5}, "wieght of the gateway target: unknown; expected some of"),
        ({"service": "fraud"}, "expected one with {version} in it"),
        ({"service": "fraud-{model}-{version}"}, "expected one with {version} in it"),
        ({"port": 0, "service": "fraud-{version}"}, "port of the services is 0"),
        ({"port": True}, "port of the gateway target is True; expected int"),
        ({"ready_timeout": "1m"}, "ready_timeout of the gateway target is '1m'"),
        ({"watchdog": {"image": "x"}}, "service_account ''; expected an image"),
        ({"watchdog": {"image": "x", "service_account": "y", "every": 5}}, "every of the watchdog: unknown"),
        ({"watchdog": {"image": "x", "service_account": "y", "deadline": 5}}, "expected at least 60 seconds"),
        ({"kind": "kserve", "mode": "raw"}, "service of the kserve target: unknown"),
    ],
)
def test_what_is_wrong_with_a_configuration(client, change, problem):
    with pytest.raises(InvalidInputError) as raised:
        target_of({**CONFIGS["gateway"], **change}, client)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mode": "raw"}, "mode of the KServe target fraud is 'raw'; expected one of knative, standard"),
        ({"mode": None}, "expected one of knative, standard"),
        ({"gateway": "a/b"}, "gateway of the KServe target fraud: KServe makes its own route"),
        ({"fallback": "ingress"}, "expected 'http_route', in mode 'standard'"),
        ({"fallback": "http_route", "mode": "knative"}, "expected 'http_route', in mode 'standard'"),
        ({"fallback": "http_route"}, "has no gateway; expected gateway='namespace/name'"),
        ({"name": "f" * 60}, "the name of the InferenceService's predictor is"),
    ],
)
def test_what_is_wrong_with_a_kserve_target(client, change, problem):
    with pytest.raises(InvalidInputError) as raised:
        target_of({**CONFIGS["standard"], **change}, client)
    assert problem in str(raised.value)


@pytest.mark.parametrize("config", [None, "gateway", [], {}])
def test_no_configuration(client, config):
    with pytest.raises(InvalidInputError, match="expected one of ray_serve"):
        target_of(config, client)


def test_a_cluster_is_needed():
    with pytest.raises(InvalidInputError, match="needs a Kubernetes connection"):
        target_of(CONFIGS["gateway"], None)


# Where models lie


@pytest.mark.parametrize(
    "place", ["s3://bucket/1", "gs://bucket/1/", "pvc://volume/1", "https://host/model.zip", "oci://registry/model:1"]
)
def test_places_that_a_pod_sees(place):
    assert storage_uri(place) == place.rstrip("/")


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("/mlruns/0/model", "no pod sees a path of this machine"),
        ("file:///mlruns/0/model", "no pod sees a path of this machine"),
        ("mlruns/0", "no pod sees a path of this machine"),
        ("", "no pod sees a path of this machine"),
        ("models:/fraud/3", "only MLflow understands it"),
        ("runs:/abc/model", "only MLflow understands it"),
        ("mlflow-artifacts:/0/abc", "only MLflow understands it"),
        ("abfss://a@b/c", "Azure's https:// address"),
    ],
)
def test_places_that_no_pod_sees(place, how):
    with pytest.raises(InvalidInputError, match="KServe cannot load a model from") as raised:
        storage_uri(place)
    assert how in str(raised.value)


async def test_a_path_of_this_machine_is_refused_before_anything_is_made(client):
    with pytest.raises(InvalidInputError, match="no pod sees a path"):
        await target_of(CONFIGS["knative"], client).deploy("1", "/mlruns/1")
    assert client.api.list("InferenceService") == []


# What models are


@pytest.mark.parametrize(
    ("flavors", "native", "model_format"),
    [
        (["python_function", "sklearn"], False, "mlflow"),
        (["sklearn", "python_function"], True, "sklearn"),
        (["python_function", "catboost"], True, "mlflow"),
        (["xgboost"], False, "xgboost"),
        (["lightgbm"], False, "lightgbm"),
        (["onnx"], False, "onnx"),
        (["transformers"], False, "huggingface"),
    ],
)
def test_the_format_comes_from_the_flavour(flavors, native, model_format):
    found = servable_of({"flavors": {key: {} for key in flavors}}, uri("1"), native=native)
    assert found == Servable(uri("1"), model_format)
    assert found.protocol == "v2"


@pytest.mark.parametrize("flavors", [{}, {"crate": {}}, None])
def test_a_model_without_a_servable_flavour(flavors):
    with pytest.raises(InvalidInputError, match=r"has no servable flavour.*log it with a python_function flavour"):
        servable_of({"flavors": flavors}, uri("1"))


def test_the_predictor():
    template = {
        "minReplicas": 2,
        "serviceAccountName": "models",
        "labels": {"team": "risk", "mlops.airflow.org/version": "9"},
        "model": {"runtime": "kserve-mlserver", "resources": {"limits": {"cpu": "1"}}, "storageUri": "s3://wrong"},
    }
    found = predictor(Servable(uri("3"), format_version="2"), "3", template)
    assert found == {
        "minReplicas": 2,
        "serviceAccountName": "models",
        "labels": {"team": "risk", "mlops.airflow.org/version": "3"},
        "model": {
            "modelFormat": {"name": "mlflow", "version": "2"},
            "protocolVersion": "v2",
            "storageUri": uri("3"),
            "runtime": "kserve-mlserver",
            "resources": {"limits": {"cpu": "1"}},
        },
    }
    assert template["model"]["storageUri"] == "s3://wrong"


def test_a_predictor_that_scales_to_zero_is_refused():
    with pytest.raises(InvalidInputError, match="expected at least 1, or a canary without traffic"):
        predictor(Servable(uri("3")), "3", {"minReplicas": 0})


# Small parts


@pytest.mark.parametrize(
    ("weight", "expected"), [(0, (100, 0)), (5, (95, 5)), (100, (0, 100)), (0.5, (9950, 50)), (99.99, (1, 9999))]
)
def test_weights(weight, expected):
    assert weights_of(weight) == expected


@pytest.mark.parametrize(("version", "part"), [("3", "v3"), ("12", "v12"), ("beta-1", "beta-1")])
def test_versions_in_names(version, part):
    assert name_part(version) == part


@pytest.mark.parametrize("version", ["", "1.0", "a_b", "x" * 30, "1-", "ä"])
def test_versions_that_no_name_can_have(version):
    with pytest.raises(InvalidInputError, match="version"):
        name_part(version)


def test_names_by_version_and_back(client):
    services = GivenServices(client, service="fraud-{version}-svc", names={"7": "legacy"})
    assert services.service("3") == "fraud-v3-svc"
    assert (services.version("fraud-v3-svc"), services.version("legacy"), services.version("docs")) == ("3", "7", None)


def test_a_merge_patch_makes_one_of_the_other():
    old = {"a": 1, "b": {"c": 1, "d": {"e": 1}}, "f": [1]}
    new = {"a": 1, "b": {"d": {"e": 2}}, "f": [2], "g": {"h": 1}}
    change = difference(old, new)
    assert change == {"b": {"c": None, "d": {"e": 2}}, "f": [2], "g": {"h": 1}}
    assert difference(new, new) == {}
    assert merged({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
