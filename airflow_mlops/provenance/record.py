"""One record for one model version: who, when, which code, data, parameters, environment, cost and verdicts.

What is not known stands in the record as null and is listed in :attr:`ModelRecord.unknown`: an answer that was never
asked for must not look like one that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError

#: Of the JSON; a reader refuses a newer one.
SCHEMA = 1

#: What a record answers, and the places of the answers.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "who": ("who.user", "who.dag_id", "who.run_id"),
    "when": ("when.started", "when.registered"),
    "code": ("code.revision", "code.dirty", "code.entry"),
    "data": (
        "data.snapshot.md5",
        "data.snapshot.uri",
        "data.training_set.uri",
        "data.training_set.sha256",
        "data.training_set.rows",
        "data.training_set.window",
        "data.training_set.features",
        "data.views",
        "data.profile.digest",
    ),
    "parameters": ("parameters",),
    "seeds": ("seeds",),
    "environment": ("environment.image_digest", "environment.lock.sha256", "environment.python"),
    "cluster": ("cluster.ray_version", "cluster.nodes", "cluster.num_workers", "cluster.resources"),
    "cost": ("cost.gpu_hours", "cost.cpu_hours", "cost.wall_seconds", "cost.gpu_cost"),
    "model": ("artifacts", "integrity.digest", "metrics"),
    "gate": ("gate.passed",),
    "approvals": ("approvals",),
    "canary": ("canary.verdict",),
}


@dataclass(frozen=True)
class ModelRecord:
    """Where a model version comes from, and what was decided about it.

    :param model: registered model
    :param version: its number
    :param run_key: identity of the training
    :param who: ``user``, ``dag_id``, ``run_id``, ``run_type``, ``bundle``, ``bundle_version``
    :param when: ``started`` (of the Dag run), ``registered``, ISO 8601
    :param code: of :func:`airflow_mlops.provenance.code.code_state`, with ``entry`` and ``entry_sha256``
    :param data: ``snapshot`` (DVC), ``training_set``, ``views`` (Feast), ``feature_service``, ``entity_uri``,
        ``profile`` (``uri``, ``digest``)
    :param training: how the loop was started: ``train_fn``, ``trainer``, ``exporter``, ``fingerprint``, ...
    :param parameters: config of the training loop
    :param seeds: every seed in it, by its path; empty where it has none
    :param environment: of the training process, see :func:`airflow_mlops.environment.describe`
    :param cluster: Ray's version, nodes, resources and name, and the workers of the training
    :param cost: ``wall_seconds``, ``cpu_hours``, ``gpu_hours``, ``gpu_cost`` (in the price's currency), ``attempts``
    :param metrics: of the training
    :param artifacts: ``path``, ``sha256``, ``size`` of the model's files
    :param gate: the gate's verdict
    :param approvals: what people said: ``approved``, ``by``, ``about``; empty when nobody was asked
    :param canary: the rollout's verdict
    :param promotion: which alias moved, and from which version
    :param integrity: ``digest`` of all the model's files as they were registered, ``signature_uri`` and ``signed_by``
        where they are signed
    :param documentation: what no run can tell, see :mod:`airflow_mlops.provenance.card`
    :param audit: ``number`` and ``sha256`` of the audit log's entries on this version
    """

    model: str
    version: str
    run_key: str | None = None
    who: Mapping[str, Any] = field(default_factory=dict)
    when: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] | None = None
    seeds: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] | None = None
    artifacts: Sequence[Mapping[str, Any]] | None = None
    gate: Mapping[str, Any] | None = None
    approvals: Sequence[Mapping[str, Any]] | None = None
    canary: Mapping[str, Any] | None = None
    promotion: Mapping[str, Any] | None = None
    integrity: Mapping[str, Any] = field(default_factory=dict)
    documentation: Mapping[str, Any] = field(default_factory=dict)
    audit: Sequence[Mapping[str, Any]] = ()

    @property
    def unknown(self) -> list[str]:
        """The answers that are not known, as dotted paths."""
        return [path for paths in QUESTIONS.values() for path in paths if self.get(path) is None]

    def get(self, path: str) -> Any:
        """The value at a dotted path; None where there is none."""
        value: Any = self
        for part in path.split("."):
            value = getattr(value, part, None) if value is self else (value or {}).get(part)
            if value is None:
                return None
        return value

    def answers(self) -> dict[str, dict[str, Any]]:
        """For each of :data:`QUESTIONS` the answers by their paths, None for what is not known."""
        return {question: {path: self.get(path) for path in paths} for question, paths in QUESTIONS.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with ``schema`` and ``unknown``."""
        return {"schema": SCHEMA, **plain(asdict(self)), "unknown": self.unknown}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelRecord:
        """The record behind :meth:`to_json`.

        :raises InvalidInputError: it is no record, or of a later version of this package
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("schema"), int):
            raise InvalidInputError(
                "this is no model record (no field schema); expected what ModelRecordOperator writes"
            )
        if value["schema"] > SCHEMA:
            raise InvalidInputError(
                f"the record has schema {value['schema']}, and this version reads up to {SCHEMA}; update airflow-mlops"
            )
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: part for name, part in value.items() if name in known})


def read(uri: str) -> ModelRecord:
    """The record at ``uri``.

    :raises InvalidInputError: nothing is there, or it is no record
    """
    found = find(uri)
    if found is None:
        raise InvalidInputError(f"there is no record at {uri}; run the task that writes it (ModelRecordOperator)")
    return found


def find(uri: str) -> ModelRecord | None:
    """The record at ``uri``, None where there is none.

    :raises InvalidInputError: what is there is no record
    """
    try:
        return ModelRecord.from_json(storage.read_json(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{uri} is no JSON: {error}") from error


def of_training(run_dir: str | None) -> dict[str, Any]:
    """What a training left in its run directory: ``spec`` of the last attempt, ``environment``, ``result``.

    Each is empty where there is none.
    """
    found: dict[str, Any] = {"spec": {}, "environment": {}, "result": {}}
    if not run_dir:
        return found
    folder = storage.join(run_dir, "_mlops")
    found["result"] = _optional(storage.join(folder, "result.json"))
    attempt = found["result"].get("attempt") or _optional(storage.join(folder, "attempt.json")).get("attempt")
    if attempt:
        found["spec"] = _optional(storage.join(folder, f"spec-a{attempt}.json"))
    found["environment"] = _optional(storage.join(folder, "environment.json"))
    return found


def _optional(uri: str) -> dict[str, Any]:
    try:
        return dict(storage.read_json(uri))
    except FileNotFoundError:
        return {}


def seeds_of(config: Any, path: str = "") -> dict[str, Any]:
    """Every entry of a config whose name has ``seed`` or ``random_state`` in it, by its dotted path."""
    return dict(_seeds(config, path))


def _seeds(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            at = f"{path}.{name}" if path else str(name)
            if not isinstance(entry, Mapping) and any(word in str(name).lower() for word in ("seed", "random_state")):
                yield at, entry
            else:
                yield from _seeds(entry, at)
    elif isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            yield from _seeds(entry, f"{path}[{place}]")


def cost_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """Hours and money of a training's result; GPUs that were not used cost nothing, whatever their price."""
    cpu, gpu = training.get("cpu_seconds"), training.get("gpu_seconds")
    money = training.get("cost")
    return {
        "wall_seconds": training.get("wall_seconds"),
        "cpu_hours": None if cpu is None else round(cpu / 3600, 6),
        "gpu_hours": None if gpu is None else round(gpu / 3600, 6),
        "gpu_cost": 0.0 if money is None and gpu == 0 else money,
        "attempts": training.get("attempts"),
    }


def plain(value: Any) -> Any:
    """``value`` in JSON types: numpy's numbers as Python's, tuples as lists, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return value if value - value == 0 else None
    return str(value)
