"""What it takes to train a version again, and whether that gave the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from airflow_mlops import environment
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.provenance.record import ModelRecord
from airflow_mlops.provenance.trace import trace

#: Without these nobody can tell what was trained on what.
NEEDED = (
    "data.snapshot.md5",
    "data.snapshot.remote",
    "data.training_set.sha256",
    "data.training_set.window",
    "data.training_set.features",
    "data.training_set.label",
    "training.fingerprint",
    "parameters",
    "metrics",
)
#: Numbers of a training that differ from one time to the next.
_CLOCKED = ("time", "seconds", "timestamp", "latency")


def reproduce(model: str, version: str | int, client: Any | None = None) -> dict[str, Any]:
    """The configuration of a Dag run that trains a version again: ``dags/reproduce.py`` takes it as it is.

    :param client: a ``mlflow.MlflowClient``; None: one of the environment's ``MLFLOW_TRACKING_URI``
    :return: ``model``, ``version``, ``snapshot`` (``md5``, ``remote``), ``training_set`` (``window``, ``features``,
        ``label``, ``sha256``, ``feature_service``, ``entity_uri``), ``training`` (``train_fn`` or ``entrypoint``,
        ``trainer``, ``exporter``, ``config``, ``num_workers``, ``resources_per_worker``, ``use_gpu``), ``seeds``,
        ``metrics`` (to compare with), ``code`` and ``environment`` (of then)
    :raises InvalidInputError: the record lacks something; names all of it
    """
    return configuration(trace(model, version, client))


def configuration(record: ModelRecord) -> dict[str, Any]:
    """As :func:`reproduce`, of a record."""
    missing = [path for path in NEEDED if record.get(path) is None]
    if not record.get("training.train_fn") and not record.get("training.entrypoint"):
        missing.append("training.train_fn")
    if masked := sorted(_masked(record.parameters, "parameters")):
        raise InvalidInputError(
            f"{record.model} version {record.version} cannot be trained again from its record: {masked} were taken for "
            "secrets and masked. Let the loop read secrets from its environment."
        )
    if missing:
        raise InvalidInputError(
            f"{record.model} version {record.version} cannot be trained again: its record does not say {missing}. A "
            "record is complete when ModelRecordOperator gets the results of snapshot, training_set and training, and "
            "the run's directory is still there."
        )
    training, data = record.training, record.data
    names = ("train_fn", "entrypoint", "trainer", "exporter", "num_workers", "resources_per_worker", "use_gpu")
    wanted = ("uri", "window", "features", "label", "sha256", "rows")
    return {
        "model": record.model,
        "version": record.version,
        "snapshot": {name: data["snapshot"][name] for name in ("md5", "remote")},
        "training_set": {
            **{name: data["training_set"].get(name) for name in wanted},
            "feature_service": data.get("feature_service"),
            "entity_uri": data.get("entity_uri"),
        },
        "training": {**{name: training.get(name) for name in names}, "config": dict(record.parameters or {})},
        "seeds": dict(record.seeds or {}),
        "metrics": dict(record.metrics or {}),
        "code": {"revision": record.get("code.revision"), "dirty": record.get("code.dirty")},
        "environment": {
            "lock_sha256": record.get("environment.lock.sha256"),
            "image_digest": record.get("environment.image_digest"),
            "python": record.get("environment.python"),
        },
    }


def _masked(value: Any, path: str) -> Iterator[str]:
    """Where Airflow's mask is."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _masked(entry, f"{path}.{name}")
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from _masked(entry, f"{path}[{place}]")
    elif value == "***":
        yield path


def surroundings_changed(record: ModelRecord, now: Mapping[str, Any] | None = None) -> list[str]:
    """What is not as it was when the version was trained, in words: Python, image and libraries.

    :param now: of :func:`airflow_mlops.environment.describe`; None: of this process
    """
    now = environment.describe() if now is None else now
    told = [
        f"{name} was {before} and is {now.get(name)}"
        for name in ("python", "image_digest")
        if (before := record.get(f"environment.{name}")) != now.get(name)
    ]
    then = dict(pin.split("==", 1) for pin in record.get("environment.lock.packages") or ())
    here = dict(pin.split("==", 1) for pin in now["lock"]["packages"])
    told += [
        f"{name} was {then.get(name, 'absent')} and is {here.get(name, 'absent')}"
        for name in sorted(then.keys() | here.keys())
        if then.get(name) != here.get(name)
    ]
    return told


def compare_metrics(
    expected: Mapping[str, Any], found: Mapping[str, Any], tolerance: float = 0.0
) -> dict[str, dict[str, Any]]:
    """The numbers that differ by more than ``tolerance`` of the expected one; none when the training was reproduced.

    Times are left out. A number that is missing, or not finite, differs.

    :return: name to ``expected`` and ``found``
    :raises InvalidInputError: there is no number to compare
    """
    numbers = {
        name: value
        for name, value in expected.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and not any(word in name.lower() for word in _CLOCKED)
    }
    if not numbers:
        raise InvalidInputError("the record holds no metric to compare with; let the training loop report one")
    return {
        name: {"expected": value, "found": found.get(name)}
        for name, value in numbers.items()
        if not _close(value, found.get(name), tolerance)
    }


def _close(one: float, other: Any, tolerance: float) -> bool:
    if not isinstance(other, int | float) or not math.isfinite(one) or not math.isfinite(other):
        return False
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=0.0)
