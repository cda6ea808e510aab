"""What a training run leaves behind: ``{run_dir}/_mlops/result.json``, written last and at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from airflow_mlops import environment, storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.spec import TrainingSpec

#: Who is to blame for a failed attempt: the user's code or input, the machines, or somebody who stopped it.
EXIT_CLASSES = ("app", "infra", "stopped")


@dataclass(frozen=True)
class Usage:
    """What was consumed, summed over the attempts of a run.

    :param wall_seconds: time between start and end of the drivers
    :param cpu_seconds: processor time of the drivers, their own Ray and the workers; a worker that was killed
        counts up to the last sample
    :param gpu_seconds: GPUs reserved times the time they were
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            round(self.wall_seconds + other.wall_seconds, 3),
            round(self.cpu_seconds + other.cpu_seconds, 3),
            round(self.gpu_seconds + other.gpu_seconds, 3),
        )


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of one attempt.

    :param status: ``SUCCEEDED`` or ``FAILED``
    :param attempt: which attempt wrote this
    :param fingerprint: of the spec that was trained, see :attr:`TrainingSpec.fingerprint`
    :param metrics: of the last reported checkpoint; a number that is not finite is None
    :param checkpoint_uri: the last committed checkpoint, None if there is none
    :param model_uri: MLflow model directory, None without an exporter
    :param exit_class: of a failure, one of :data:`EXIT_CLASSES`
    :param error: end of the error's traceback
    :param resumed_from: the checkpoint that this attempt went on from
    :param usage: over all attempts so far
    :param seconds: where this attempt's time went, by phase
    :param params: of a hyper-parameter search, those of the best trial
    """

    status: str
    attempt: int
    fingerprint: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_uri: str | None = None
    model_uri: str | None = None
    exit_class: str | None = None
    error: str | None = None
    resumed_from: str | None = None
    usage: Usage = field(default_factory=Usage)
    seconds: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Any] | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the run is finished and its model may be used."""
        return self.status == "SUCCEEDED"

    def to_json(self) -> dict[str, Any]:
        """Plain types without NaN; the usage's fields lie beside the others."""
        value = asdict(self)
        usage = value.pop("usage")
        return {**value, "metrics": finite(value["metrics"]), **usage}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingResult:
        """The result behind ``to_json()``."""
        usage = Usage(**{entry.name: value.get(entry.name, 0.0) for entry in fields(Usage)})
        own = {entry.name for entry in fields(cls)} - {"usage"}
        return cls(**{key: entry for key, entry in value.items() if key in own}, usage=usage)


#: Of a result, what :func:`outcome` hands on beside the run's name and directory.
_OUTCOME = (
    "status",
    "attempt",
    "metrics",
    "checkpoint_uri",
    "model_uri",
    "resumed_from",
    "wall_seconds",
    "cpu_seconds",
    "gpu_seconds",
)


def outcome(spec: TrainingSpec, result: TrainingResult, *, price_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """What a training task returns: plain types, small enough for an XCom; times are summed over the attempts.

    :param price_per_gpu_hour: adds ``cost``, of the GPUs alone, in the price's currency
    """
    value = result.to_json()
    told = {"run_key": spec.run_key, "run_dir": spec.run_dir, "attempts": result.attempt}
    told |= {name: value[name] for name in _OUTCOME}
    if result.params is not None:
        told["params"] = value["params"]
    if price_per_gpu_hour is not None:
        told["cost"] = cost(result.usage, price_per_gpu_hour)
    return told


def cost(usage: Usage, price_per_gpu_hour: float) -> float:
    """What the GPUs cost, in the price's currency."""
    return round(usage.gpu_seconds / 3600 * price_per_gpu_hour, 4)


def finite(value: Any) -> Any:
    """``value`` in JSON types: numpy numbers as Python's, what is not finite as None, anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = value.item() if hasattr(value, "item") else float(value)
    except (TypeError, ValueError):
        return str(value)
    return None if isinstance(number, float) and not math.isfinite(number) else number


def read_result(spec: TrainingSpec) -> TrainingResult | None:
    """The result in the run's directory, of whichever attempt; None if no attempt has written one.

    :raises InvalidInputError: the file is there but cannot be read as one
    """
    uri = spec.file("result.json")
    try:
        return TrainingResult.from_json(storage.read_json(uri))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InvalidInputError(
            f"{uri} is not a training result ({error}); remove the run directory, or train into another run_key"
        ) from error


def write_result(spec: TrainingSpec, result: TrainingResult) -> None:
    """Put ``result`` into the run's directory, replacing an earlier attempt's."""
    storage.write_json(spec.file("result.json"), result.to_json())


def write_environment(spec: TrainingSpec, cluster: Mapping[str, Any] | None = None) -> None:
    """Put down where the attempt runs, in ``environment.json`` of the run's directory.

    :param cluster: the Ray it has joined, None where it joins none or has not yet
    """
    storage.write_json(spec.file("environment.json"), {**environment.describe(), "cluster": cluster})
