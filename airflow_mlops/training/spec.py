"""What a training run is told: one small JSON file that travels to wherever the driver runs."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.search import Search

#: ``"tune"`` searches hyper-parameters with one of the others, see :class:`airflow_mlops.training.search.Search`.
TRAINERS = ("xgboost", "lightgbm", "torch", "jax", "data_parallel", "tune")

#: ``train_fn`` starting with this is the URI of a function pickled by value.
PICKLED = "pickle:"

_CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_RUN_KEY = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


@dataclass(frozen=True)
class TrainingSpec:
    """One attempt of one training run: a Ray Train loop, a search over one, or a command.

    :param train_fn: the Ray Train loop, ``"package.module:function"`` or ``"pickle:URI"``; takes ``config`` or nothing;
        None with an ``entrypoint``
    :param trainer: which Ray Train trainer runs it, one of :data:`TRAINERS`; None with an ``entrypoint``
    :param storage_path: folder or URI under which the run's directory lies
    :param run_key: name of the run's directory, the same for all attempts of one logical run
    :param config: passed to ``train_fn``; JSON. Of trainer ``"tune"``: what to search, see
        :class:`airflow_mlops.training.search.Search`
    :param num_workers: Ray Train workers, at least 1; ``(min, max)`` lets their number follow the machines at hand
    :param resources_per_worker: Ray resources of a worker, for example ``{"CPU": 1}``; None: Ray's default
    :param use_gpu: whether each worker gets a GPU
    :param attempt: 1 for the first try of the run, one more for each further one
    :param max_failures: worker failures that Ray Train repairs by itself within the attempt, preemptions included
    :param checkpoints_to_keep: newest checkpoints kept on disk; None keeps all
    :param exporter: ``"package.module:function"`` taking ``(checkpoint_dir, config, model_dir)``, which writes an
        MLflow model directory; None: the built-in one of xgboost and lightgbm, no model for the other trainers
    :param ray_address: None starts a Ray of the driver's own; ``"auto"`` joins the cluster the driver runs in
    :param num_cpus: CPUs of the driver's own Ray; None: all of the machine
    :param patience: seconds to wait for an earlier driver of the run to be gone; more than the time after which a
        silent one on another machine counts as gone
    :param name: what is trained, for messages and for the fingerprint when ``train_fn`` is pickled
    :param entrypoint: a shell command instead of ``train_fn``, see :mod:`airflow_mlops.training.command`
    :param ray_version: Ray that the driver must find, for example ``"2.60.0"``; None: any
    :param preemptible: whether workers run on machines that can be taken away
    :param stop_timeout: seconds between a stop that was asked for and the driver's kill
    """

    train_fn: str | None
    trainer: str | None
    storage_path: str
    run_key: str
    config: Mapping[str, Any] = field(default_factory=dict)
    num_workers: int | tuple[int, int] = 1
    resources_per_worker: Mapping[str, float] | None = None
    use_gpu: bool = False
    attempt: int = 1
    max_failures: int = 1
    checkpoints_to_keep: int | None = 2
    exporter: str | None = None
    ray_address: str | None = None
    num_cpus: int | None = None
    patience: float = 75.0
    name: str | None = None
    entrypoint: str | None = None
    ray_version: str | None = None
    preemptible: bool = False
    stop_timeout: float = 15.0

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, list):  # JSON has no tuples
            object.__setattr__(self, "num_workers", tuple(self.num_workers))

    @property
    def min_workers(self) -> int:
        """Workers without which training does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that are never exceeded."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def gpus_per_worker(self) -> float:
        """GPUs that Ray reserves for each worker."""
        return float((self.resources_per_worker or {}).get("GPU", 1.0 if self.use_gpu else 0.0))

    @property
    def run_dir(self) -> str:
        """The run's directory: Ray Train's checkpoints and snapshot, and this package's files in ``_mlops``."""
        return storage.join(self.storage_path, self.run_key)

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the trained model; checkpoints and results are reused only where it is the same."""
        loop = self.train_fn or ""
        what = self.entrypoint or (self.name if loop.startswith(PICKLED) else loop)
        inputs = [what, self.trainer, dict(self.config), self.exporter]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]

    def file(self, *parts: str) -> str:
        """URI of one of this package's files in the run's directory."""
        return storage.join(self.run_dir, "_mlops", *parts)

    def with_attempt(self, attempt: int) -> TrainingSpec:
        """The same run's spec for another attempt."""
        return replace(self, attempt=attempt)

    def validate(self) -> None:
        """Check everything that can be checked without Ray and without importing the user's code.

        :raises InvalidInputError: names the parameter, what it must be and what to change
        """
        self._validate_what()
        if not self.storage_path:
            raise InvalidInputError(
                "storage_path is missing; give a folder (local mode) or a URI such as s3://bucket/runs that the "
                "driver, its Ray workers and Airflow can all read and write"
            )
        if not _RUN_KEY.match(self.run_key):
            raise InvalidInputError(
                f"run_key is {self.run_key!r}; expected 1 to 128 letters, digits, '.', '_' or '-', starting with a "
                "letter or digit, for it names a directory"
            )
        worker_count(self.num_workers)
        whole("attempt", self.attempt, at_least=1)
        whole("max_failures", self.max_failures, at_least=-1)
        if self.preemptible and self.max_failures == 0 and not self.entrypoint:
            raise InvalidInputError(
                "max_failures is 0 and the workers are preemptible; Ray Train can count a preemption as a failure, so "
                "the first one would end the training: give at least 1"
            )
        for name, count in (("checkpoints_to_keep", self.checkpoints_to_keep), ("num_cpus", self.num_cpus)):
            if count is not None:
                whole(name, count, at_least=1)
        for resource, amount in (self.resources_per_worker or {}).items():
            if not isinstance(amount, int | float) or isinstance(amount, bool) or not 0 <= amount < float("inf"):
                raise InvalidInputError(f"resources_per_worker[{resource!r}] is {amount!r}; expected a number >= 0")
        try:
            json.dumps(dict(self.config), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"config cannot be written as JSON ({error}); pass plain numbers, strings, lists and dicts, and large "
                "or binary things by their URI"
            ) from None

    def _validate_what(self) -> None:
        if self.entrypoint is not None:
            given = {"train_fn": self.train_fn, "trainer": self.trainer, "exporter": self.exporter}
            if both := [name for name, value in given.items() if value]:
                raise InvalidInputError(
                    f"both entrypoint and {' and '.join(both)} are given; a command trains and exports by itself: give "
                    "either entrypoint, or train_fn with its trainer"
                )
            if not isinstance(self.entrypoint, str) or not self.entrypoint.strip():
                raise InvalidInputError(f"entrypoint is {self.entrypoint!r}; expected a shell command")
            return
        if not self.train_fn:
            raise InvalidInputError(
                'nothing to train: give train_fn="package.module:function" with its trainer, or an entrypoint'
            )
        if self.trainer not in TRAINERS:
            raise InvalidInputError(f"trainer is {self.trainer!r}; expected one of {', '.join(TRAINERS)}")
        for name, value in (("train_fn", self.train_fn), ("exporter", self.exporter)):
            if value is None or (name == "train_fn" and value.startswith(PICKLED)):
                continue
            if not isinstance(value, str) or not _CALLABLE.match(value):
                raise InvalidInputError(
                    f'{name} is {value!r}; expected "package.module:function" naming a function at the top of a module'
                )
        if self.trainer == "tune":
            Search.of(self.config)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingSpec:
        """The spec behind ``to_json()``, validated.

        :raises InvalidInputError: a field is unknown, missing or wrong
        """
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise InvalidInputError(
                f"the training spec has unknown fields {', '.join(unknown)}; it was written by another version of "
                "airflow-mlops: install the same version in Airflow and where training runs"
            )
        try:
            spec = cls(**value)
        except TypeError as error:
            raise InvalidInputError(f"the training spec is incomplete: {error}") from None
        spec.validate()
        return spec


def whole(name: str, value: Any, at_least: int) -> int:
    """``value`` as an integer; a templated parameter arrives as a string.

    :raises InvalidInputError: it is not an integer, or less than ``at_least``
    """
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or number < at_least:
        raise InvalidInputError(f"{name} is {value!r}; expected a whole number of at least {at_least}")
    return number


def worker_count(value: Any) -> int | tuple[int, int]:
    """``value`` as ``num_workers``: a whole number, or ``(min, max)``; a templated one arrives as a string.

    :raises InvalidInputError: it is neither, less than 1, or its minimum is above its maximum
    """
    if isinstance(value, str) and re.search(r"[,\[(]", value):
        value = [part.strip() for part in value.strip().strip("[]()").split(",")]
    if not isinstance(value, list | tuple):
        return whole("num_workers", value, at_least=1)
    if len(value) != 2:
        raise InvalidInputError(f"num_workers is {value!r}; expected a whole number or (min, max)")
    low, high = (whole("num_workers", entry, at_least=1) for entry in value)
    if low > high:
        raise InvalidInputError(f"num_workers is ({low}, {high}); expected (min, max) with min <= max")
    return low, high


def load_callable(reference: str, what: str = "train_fn") -> Callable[..., Any]:
    """The function behind ``"package.module:function"`` or ``"pickle:URI"``.

    :raises InvalidInputError: the module cannot be imported, or has no such function
    """
    if reference.startswith(PICKLED):
        import cloudpickle

        try:
            return cloudpickle.loads(storage.read_bytes(reference.removeprefix(PICKLED)))
        except Exception as error:
            raise InvalidInputError(
                f"the pickled {what} cannot be loaded: {type(error).__name__}: {error}. Airflow and the Ray cluster "
                "need the same Python minor version, and the modules it uses must be installed on the cluster."
            ) from error
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InvalidInputError(
            f"{what} {reference!r}: module {module_name!r} cannot be imported where the driver runs "
            f"({type(error).__name__}: {error}); install it there, or add its folder to PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidInputError(f"{what} {reference!r}: module {module_name!r} has no function {name!r}")
    return function


def run_key_of(dag_id: str, task_id: str, run_id: str, map_index: int = -1) -> str:
    """The run key of a task: the same for every try of one task instance, another for every other one."""
    digest = hashlib.sha256(json.dumps([dag_id, task_id, run_id, map_index]).encode()).hexdigest()[:12]
    return f"{slug(task_id, 40)}-{digest}"


def submission_id_of(spec: TrainingSpec) -> str:
    """Name of the attempt wherever it runs: ``<slug>-<hash>-a<n>``, at most 47 characters, DNS-1035."""
    digest = hashlib.sha256(spec.run_dir.encode()).hexdigest()[:12]
    return f"{slug(spec.run_key, 28)}-{digest}-a{spec.attempt}"


def slug(text: str, length: int) -> str:
    """``text`` in lower-case letters, digits and dashes, starting with a letter."""
    cleaned = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not cleaned[:1].isalpha():
        cleaned = f"r-{cleaned}"
    return cleaned[:length].strip("-")
