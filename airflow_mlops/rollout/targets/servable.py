"""From a model version to a KServe predictor: its flavours, where it lies, the predictor that serves it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.targets.kube import VERSION_LABEL, Object, merged

#: Where KServe's storage initializer fetches models from.
SCHEMES = ("s3", "gs", "pvc", "https", "http", "hdfs", "webhdfs", "oci", "hf")
#: MLflow flavour to KServe's model format, for those who want the framework's own server.
NATIVE = {
    "sklearn": "sklearn",
    "xgboost": "xgboost",
    "lightgbm": "lightgbm",
    "onnx": "onnx",
    "pytorch": "pytorch",
    "tensorflow": "tensorflow",
    "keras": "tensorflow",
    "transformers": "huggingface",
    "paddle": "paddle",
    "pmml": "pmml",
}
#: Fields of a predictor that KServe takes on the stable one only.
STABLE_ONLY = ("maxReplicas", "scaleTarget", "scaleMetric", "scaleMetricType", "autoScaling", "workerSpec")
#: Fields of a predictor that name a framework; ours is ``model``.
FRAMEWORKS = (
    *("sklearn", "xgboost", "lightgbm", "onnx", "pytorch", "tensorflow", "triton", "huggingface", "paddle", "pmml"),
)
_BUCKET = re.compile(r"^(?P<scheme>[a-z0-9+.-]+)://(?P<rest>.+)$")


@dataclass(frozen=True)
class Servable:
    """A model as KServe loads it.

    :param storage_uri: where it lies
    :param model_format: name of the format, ``mlflow`` for any model with a ``python_function`` flavour
    :param format_version: of the format; blank: whichever the runtime has
    :param protocol: version of the inference protocol, ``v1`` or ``v2``; blank: the runtime's own
    """

    storage_uri: str
    model_format: str = "mlflow"
    format_version: str = ""
    protocol: str = "v2"


#: Says where a model version lies and what it is: (version, uri) to :class:`Servable`.
Resolver = Callable[[str, str], Awaitable[Servable]]


def storage_uri(uri: str) -> str:
    """``uri``, if a pod can fetch a model from there.

    :raises InvalidInputError: it cannot: a path of this machine, a URI that only MLflow understands
    """
    found = _BUCKET.match(uri)
    scheme = found["scheme"] if found else ""
    if scheme in SCHEMES:
        return uri.rstrip("/")
    if scheme in ("wasbs", "abfss"):
        how = "give Azure's https:// address of the same folder"
    elif uri.startswith(("models:", "runs:", "mlflow-artifacts:")):
        how = (
            "only MLflow understands it: give the artifact location of the model version, and let the tracking server "
            "keep artifacts in object storage rather than serve them itself"
        )
    else:
        how = "no pod sees a path of this machine: let MLflow keep its artifacts in object storage or on a volume (pvc)"
    raise InvalidInputError(
        f"KServe cannot load a model from {uri!r}; expected one of {', '.join(f'{each}://' for each in SCHEMES)}; {how}"
    )


def servable_of(mlmodel: Mapping[str, Any], uri: str, *, native: bool = False) -> Servable:
    """How to serve a model by what its ``MLmodel`` file says.

    :param mlmodel: the file's content
    :param uri: where the model's folder lies
    :param native: by its framework's own format where it has one; MLflow's names of files inside the folder are not
        those that every framework's server looks for, so the ``mlflow`` format is the safe choice
    :raises InvalidInputError: it has no servable flavour
    """
    flavors = mlmodel.get("flavors") or {}
    where = storage_uri(uri)
    for flavor in flavors if native else ():
        if flavor in NATIVE:
            return Servable(where, NATIVE[flavor])
    if "python_function" in flavors:
        return Servable(where)
    for flavor in flavors:
        if flavor in NATIVE:
            return Servable(where, NATIVE[flavor])
    raise InvalidInputError(
        f"the model at {uri} has no servable flavour: its MLmodel file lists "
        f"{', '.join(flavors) or 'none'}; log it with a python_function flavour, or one of {', '.join(NATIVE)}"
    )


def fixed_resolver(model_format: str = "mlflow", protocol: str = "v2", format_version: str = "") -> Resolver:
    """All versions are of one format, and their URI is where they lie."""

    async def resolve(version: str, uri: str) -> Servable:
        return Servable(storage_uri(uri), model_format, format_version, protocol)

    return resolve


def predictor(servable: Servable, version: str, template: Mapping[str, Any] | None = None) -> Object:
    """The predictor of an InferenceService that serves a model version.

    :param template: what else it has (replicas, resources, runtime, environment, service account); where both say
        something, the model's format, place and version stand
    """
    model: Object = {"modelFormat": {"name": servable.model_format}, "storageUri": servable.storage_uri}
    if servable.format_version:
        model["modelFormat"]["version"] = servable.format_version
    if servable.protocol:
        model["protocolVersion"] = servable.protocol
    # Without a replica a predictor with no traffic never becomes ready.
    base = merged({"minReplicas": 1}, template or {})
    if base["minReplicas"] < 1:
        raise InvalidInputError(
            f"minReplicas of the predictor is {base['minReplicas']}; expected at least 1, or a canary without traffic "
            "would have no replica and never be ready"
        )
    return merged(base, {"labels": {VERSION_LABEL: version}, "model": model})


def version_of(spec: Mapping[str, Any] | None) -> str | None:
    """The model version that a predictor serves, by its label; else where its model lies, None if nowhere."""
    if not spec:
        return None
    label = (spec.get("labels") or {}).get(VERSION_LABEL)
    return label or (spec.get("model") or {}).get("storageUri")
