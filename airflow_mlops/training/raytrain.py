"""Ray and Ray Train as the driver uses them: start or join a cluster, build a trainer, tell whose fault an error is."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, MlopsError
from airflow_mlops.training.command import CommandLost
from airflow_mlops.training.spec import TrainingSpec, load_callable
from airflow_mlops.training.usage import measured, sized

log = logging.getLogger(__name__)

TRAINER_CLASSES = {
    "xgboost": ("ray.train.xgboost", "XGBoostTrainer"),
    "lightgbm": ("ray.train.lightgbm", "LightGBMTrainer"),
    "torch": ("ray.train.torch", "TorchTrainer"),
    "jax": ("ray.train.v2.jax.jax_trainer", "JaxTrainer"),
    "data_parallel": ("ray.train.v2.api.data_parallel_trainer", "DataParallelTrainer"),
}
#: Ray Train looks for reports this often; its own 2 s would make every ``ray.train.report`` cost up to 2 s.
POLL_INTERVAL = 0.1
WORKER_START_TIMEOUT = 300.0
NO_CHECKPOINT = (
    "the training loop reported no checkpoint, so there is nothing to resume from or to export; call "
    "ray.train.report(metrics, checkpoint=...) in it at least once, at the end"
)


class Clusterless(Exception):
    """Ray could not be started or joined."""


def prepare() -> None:
    """Set what Ray Train reads from the environment of the process that starts a run."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_INTERVAL))
    # A busy machine needs more than Ray's 60 s to start workers.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(WORKER_START_TIMEOUT))


def wrapped_loop(spec: TrainingSpec, worker_dir: str | None, world_file: str | None = None) -> Callable[..., Any]:
    """The spec's training loop, accounting for what its workers use, see :mod:`airflow_mlops.training.usage`."""
    assert spec.train_fn is not None
    train_fn = load_callable(spec.train_fn)
    if worker_dir is not None:
        train_fn = measured(train_fn, worker_dir)
    return train_fn if world_file is None else sized(train_fn, world_file)


def _without_cleaner(trainer: Any) -> Any:
    # That actor frees a cluster of what a dead controller held while its job lives on. Here the job ends with its one
    # controller, which frees the same; a process less, and one that fails every second without a dashboard.
    create = getattr(trainer, "_create_default_callbacks", None)
    if create is not None:
        trainer._create_default_callbacks = lambda: [
            callback for callback in create() if type(callback).__name__ != "PlacementGroupCleanerCallback"
        ]
    return trainer


def prepare_own_ray() -> None:
    """Set what a Ray of the driver's own reads from the environment, before ray is imported."""
    import secrets

    # One machine that is never preempted: one process less.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    # Without a token of its own Ray would write one into the home directory, which may not be writable.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ.pop("RAY_ADDRESS", None)
    # Told that it is on one machine, Ray listens on the loopback address and not on the outward one.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def require_ray_version(wanted: str | None) -> None:
    """Check that the driver has the Ray that the run was started for.

    :raises InvalidInputError: it has another one; a cluster of that version would turn it away in words of its own
    """
    found = importlib.metadata.version("ray")
    if wanted is not None and found != wanted:
        raise InvalidInputError(
            f"the driver's image has Ray {found}, and ray_version is {wanted}; head, workers and driver need the same: "
            "use an image of that version or give ray_version as the image has it"
        )


def start_ray(spec: TrainingSpec) -> None:
    """Start a Ray of the driver's own, or join the cluster.

    :raises Clusterless: that is not possible
    :raises InvalidInputError: the workers do not fit into it
    """
    import ray

    try:
        if spec.ray_address is not None:
            ray.init(address=spec.ray_address)
            return
        ray.init(address="local", num_cpus=spec.num_cpus, include_dashboard=False)
    except Exception as error:
        where = "a local Ray cannot be started" if spec.ray_address is None else f"Ray at {spec.ray_address} is away"
        raise Clusterless(f"{where}: {type(error).__name__}: {error}") from error
    require_capacity(spec, ray.cluster_resources())


def cluster_facts() -> dict[str, Any]:
    """The Ray that was joined: ``name`` (``RAY_CLUSTER_NAME``, as KubeRay sets it), ``ray_version``, number of
    ``nodes``, ``resources`` by name (memory in bytes) and ``accelerators``."""
    import ray

    have = {
        name: amount for name, amount in ray.cluster_resources().items() if ":" not in name or "accelerator" in name
    }
    return {
        "name": os.environ.get("RAY_CLUSTER_NAME"),
        "ray_version": ray.__version__,
        "nodes": sum(bool(node["Alive"]) for node in ray.nodes()),
        "resources": {name: amount for name, amount in sorted(have.items()) if ":" not in name},
        "accelerators": sorted(name.partition(":")[2] for name in have if ":" in name),
    }


def require_capacity(spec: TrainingSpec, have: Mapping[str, float]) -> None:
    """Check that a Ray that does not grow can hold the workers, which would else be waited for in vain.

    :param have: amount of each resource
    :raises InvalidInputError: it cannot; says what is lacking
    """
    needs = {"CPU": 1.0, **(spec.resources_per_worker or {})}
    if spec.use_gpu:
        needs.setdefault("GPU", 1.0)
    workers = spec.min_workers
    for resource, amount in needs.items():
        if amount * workers > have.get(resource, 0.0):
            raise InvalidInputError(
                f"{workers} workers with {amount:g} {resource} each need {amount * workers:g}, and this "
                f"machine has {have.get(resource, 0.0):g}; lower num_workers or resources_per_worker"
            )


def build_trainer(spec: TrainingSpec, train_fn: Any) -> Any:
    """Ray Train's trainer for the spec; ``fit()`` goes on from the run's last committed checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    local = storage.is_local(spec.storage_path)
    path = os.path.abspath(storage.local_path(spec.storage_path)) if local else spec.storage_path
    assert spec.trainer is not None
    trainer = trainer_class(spec.trainer)(
        train_fn,
        train_loop_config=dict(spec.config),
        scaling_config=ScalingConfig(
            num_workers=spec.num_workers,  # type: ignore[arg-type]
            use_gpu=spec.use_gpu,
            resources_per_worker=dict(spec.resources_per_worker) if spec.resources_per_worker else None,
        ),
        run_config=RunConfig(
            name=spec.run_key,
            storage_path=path,
            # Ray would wait for ever for capacity that does not come.
            # Preemptions have a count of their own without a limit, but a node that dies at its deadline is charged to
            # max_failures.
            failure_config=FailureConfig(max_failures=spec.max_failures, controller_failure_limit=3),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=spec.checkpoints_to_keep),
        ),
    )
    return _without_cleaner(trainer)


def trainer_class(trainer: str) -> Any:
    """Ray Train's class for ``trainer``, importing only that framework.

    :raises InvalidInputError: its library is not installed where the driver runs
    """
    module, name = TRAINER_CLASSES[trainer]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InvalidInputError(
            f'trainer "{trainer}" needs a library that is not installed where the driver runs ({error}); install it '
            f"there, for example with pip install 'airflow-mlops[{trainer}]'"
        ) from error


def is_infrastructure(error: BaseException) -> bool:
    """Whether machines are to blame for ``error`` rather than the training code or its input."""
    if isinstance(error, Clusterless | CommandLost | ExternalSystemError | SystemExit):
        return True
    if isinstance(error, MlopsError):
        return False
    import ray.exceptions
    from ray.train import TrainingFailedError

    failures = getattr(error, "worker_failures", None)
    if failures:
        return all(_worker_was_lost(failure) for failure in failures.values())
    if isinstance(error, TrainingFailedError):
        return True
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


def _worker_was_lost(failure: BaseException) -> bool:
    import ray.exceptions

    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, ray.exceptions.RayError) and not isinstance(seen, ray.exceptions.RayTaskError):
            return True
        if type(seen).__name__ in ("WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"):
            return True
        seen = getattr(seen, "health_check_failure", None) or seen.__cause__
    return False
