"""Distributed training with Ray Train."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException, AirflowTaskTimeout

from airflow_mlops import storage
from airflow_mlops.exceptions import (
    AttemptsExhaustedError,
    ConcurrentChangeError,
    ExternalSystemError,
    InvalidInputError,
    TrainingError,
)
from airflow_mlops.hooks.ray import LOG_TAIL, RayJobsHook
from airflow_mlops.links import RAY_ATTEMPT, RayDashboardLink
from airflow_mlops.operators._ray import JobsRunner, Progress, Runner
from airflow_mlops.shell import permanent_errors_fail
from airflow_mlops.training.decide import ACTIVE, FINAL, Action, Observation, next_action
from airflow_mlops.training.fence import wait_until_free
from airflow_mlops.training.local import LocalRunner
from airflow_mlops.training.result import TrainingResult, read_result
from airflow_mlops.training.runs import begin_attempt, open_run, wipe_run
from airflow_mlops.training.spec import TrainingSpec, run_key_of, submission_id_of, whole

if TYPE_CHECKING:
    from airflow.sdk import Context

MODES = ("local", "jobs")


class RayTrainOperator(BaseOperator):
    """Trains with Ray Train, on this worker or on a Ray cluster, and returns the model's URI.

    The training loop is an ordinary Ray Train function; nothing of this package is needed in it. It should report
    checkpoints and start from ``ray.train.get_checkpoint()``: an attempt lost to a dead machine is started again up to
    ``max_restarts`` times and goes on from the last committed checkpoint, and so does Airflow's retry of a task. A
    run is finished once per run key: a cleared task returns the finished result unless ``fresh``, or trains anew if
    train_fn, trainer, config or exporter have changed.

    Returns (XCom) ``{"status", "run_key", "run_dir", "attempt", "attempts", "metrics", "checkpoint_uri", "model_uri",
    "resumed_from", "wall_seconds", "cpu_seconds", "gpu_seconds"}``; times are summed over the attempts.

    :param train_fn: ``"package.module:function"``, importable where the driver runs (templated)
    :param mode: ``"local"``: a child process with a Ray of its own, which does not outlive the task; ``"jobs"``: a
        job of an existing cluster that shares ``storage_path`` with this worker (templated)
    :param trainer: ``"xgboost"``, ``"lightgbm"``, ``"torch"``, ``"jax"`` or ``"data_parallel"`` (templated)
    :param config: argument of the training loop; JSON (templated)
    :param num_workers: Ray Train workers (templated)
    :param resources_per_worker: Ray resources of each, for example ``{"CPU": 2}`` (templated)
    :param use_gpu: one GPU for each worker
    :param storage_path: folder or URI below which the run directory lies (templated)
    :param run_key: name of the run directory; default: one per Dag, task, run and map index (templated)
    :param exporter: ``"package.module:function"`` taking ``(checkpoint_dir, config, model_dir)`` that writes an MLflow
        model; built in for xgboost and lightgbm, otherwise ``model_uri`` is None (templated)
    :param fresh: train a finished run again (templated)
    :param max_failures: worker failures per attempt that Ray Train repairs by itself
    :param max_restarts: attempts lost to infrastructure that are replaced within this task
    :param checkpoints_to_keep: newest checkpoints kept
    :param num_cpus: CPUs of the local Ray; default: all (local mode)
    :param env_vars: environment of driver and workers (templated)
    :param ray_conn_id: connection of type ``ray`` (jobs mode)
    :param ray_address: dashboard address instead of a connection (jobs mode, templated)
    :param runtime_env: Ray runtime environment of the job (jobs mode, templated)
    :param python: Python interpreter on the cluster (jobs mode, templated)
    :param poll_interval: seconds between two looks at the job
    :param unreachable_timeout: seconds that the dashboard may be away before the task gives up
    :param stop_timeout: seconds that a stopped driver has to end in an orderly way
    :param fence_timeout: seconds that an attempt waits for an earlier driver of the run to be gone
    :param cancel_on_kill: stop the job when the task is killed, cleared or marked by a user
    :param deferrable: wait in the triggerer (jobs mode; local mode always waits in the worker); ``execution_timeout``
        then counts from the first wait on
    :raises TrainingError: the training code failed; the message ends with the end of the driver's log
    """

    template_fields: Sequence[str] = (
        "train_fn",
        "mode",
        "trainer",
        "config",
        "num_workers",
        "resources_per_worker",
        "storage_path",
        "run_key",
        "exporter",
        "fresh",
        "env_vars",
        "ray_address",
        "runtime_env",
        "python",
    )
    template_fields_renderers = {"config": "json", "runtime_env": "json", "env_vars": "json"}
    operator_extra_links = (RayDashboardLink(),)
    ui_color = "#d7ecff"

    def __init__(
        self,
        *,
        train_fn: str,
        mode: str,
        storage_path: str,
        trainer: str = "xgboost",
        config: Mapping[str, Any] | None = None,
        num_workers: int | str = 1,
        resources_per_worker: Mapping[str, float] | None = None,
        use_gpu: bool = False,
        run_key: str | None = None,
        exporter: str | None = None,
        fresh: bool | str = False,
        max_failures: int = 1,
        max_restarts: int = 3,
        checkpoints_to_keep: int | None = 2,
        num_cpus: int | None = None,
        env_vars: Mapping[str, str] | None = None,
        ray_conn_id: str = RayJobsHook.default_conn_name,
        ray_address: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        python: str | None = None,
        poll_interval: float = 10.0,
        unreachable_timeout: float = 300.0,
        stop_timeout: float = 15.0,
        fence_timeout: float = 75.0,
        cancel_on_kill: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"multiple_outputs": True, **kwargs})
        self.train_fn = train_fn
        self.mode = mode
        self.storage_path = storage_path
        self.trainer = trainer
        self.config = config
        self.num_workers = num_workers
        self.resources_per_worker = resources_per_worker
        self.use_gpu = use_gpu
        self.run_key = run_key
        self.exporter = exporter
        self.fresh = fresh
        self.max_failures = max_failures
        self.max_restarts = max_restarts
        self.checkpoints_to_keep = checkpoints_to_keep
        self.num_cpus = num_cpus
        self.env_vars = env_vars
        self.ray_conn_id = ray_conn_id
        self.ray_address = ray_address
        self.runtime_env = runtime_env
        self.python = python
        self.poll_interval = poll_interval
        self.unreachable_timeout = unreachable_timeout
        self.stop_timeout = stop_timeout
        self.fence_timeout = fence_timeout
        self.cancel_on_kill = cancel_on_kill
        self.deferrable = deferrable
        self._runner: Runner | None = None
        self._current: TrainingSpec | None = None
        self._killed = False

    def execute(self, context: Context) -> dict[str, Any]:
        """Train, or return what is trained already."""
        with permanent_errors_fail():
            spec = self._spec(context)
            plan = open_run(spec, _truth("fresh", self.fresh))
            if plan.finished is not None:
                self.log.info("the run in %s is finished: nothing to train", spec.run_dir)
                return self._outcome(spec, plan.finished)
            runner = self._make_runner(context)
            previous = spec.with_attempt(max(plan.previous, 1))
            if isinstance(runner, JobsRunner) and plan.previous and runner.peek(previous).status in ACTIVE:
                if plan.adoptable:
                    self.log.info("attempt %d of an earlier try still runs: following it", previous.attempt)
                    self._announce(context, previous)
                    return self._follow(context, Progress(previous, adopted=True))
                runner.stop(previous)
            if plan.wipe:
                self.log.warning("%s is emptied: %s", spec.run_dir, plan.wipe)
                wait_until_free(spec, self.fence_timeout)
                wipe_run(spec)
            spec = self._start(context, spec.with_attempt(plan.previous + 1))
            return self._follow(context, Progress(spec))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on after the wait in the triggerer, with what the event says alone."""
        with permanent_errors_fail():
            progress = Progress.from_json(event["state"])
            if "error" in event:
                raise InvalidInputError(event["error"])
            self._make_runner(context)
            if event.get("timed_out"):
                self._current = progress.spec
                self._stop_current()
                raise AirflowTaskTimeout(
                    f"training in {progress.spec.run_dir} took longer than {self.execution_timeout}"
                )
            return self._follow(context, progress, Observation(**event["seen"]))

    def on_kill(self) -> None:
        """End what runs: the child process always, a job if ``cancel_on_kill``."""
        self._killed = True
        self._stop_current()

    def _stop_current(self) -> None:
        if self._runner is not None and self._current is not None and (self.mode == "local" or self.cancel_on_kill):
            self.log.info("stopping attempt %d in %s", self._current.attempt, self._current.run_dir)
            self._runner.stop(self._current)

    def _follow(self, context: Context, progress: Progress, seen: Observation | None = None) -> dict[str, Any]:
        runner = self._runner
        assert runner is not None
        while True:
            spec = self._current = progress.spec
            seen = seen or self._wait(runner, progress)
            if self._killed:
                seen = Observation("STOPPED", message="The task was killed.")
            result = read_result(spec)
            adopted = progress.adopted and not self._killed
            action = next_action(seen, result, spec.attempt, progress.restarts, self.max_restarts, adopted)
            if action.kind == "succeed" and result is not None:
                return self._outcome(spec, result)
            if action.kind == "restart":
                self.log.warning("%s Starting attempt %d.", action.reason, spec.attempt + 1)
                runner.stop(spec)
                spec = self._start(context, spec.with_attempt(spec.attempt + 1))
                progress = Progress(spec, progress.restarts + 1, deadline=progress.deadline)
            elif action.kind == "fail":
                raise self._error(action, spec, result)
            seen = None

    def _wait(self, runner: Runner, progress: Progress) -> Observation:
        spec = progress.spec
        if not (self.deferrable and isinstance(runner, JobsRunner)):
            return runner.wait(spec)
        try:
            seen = runner.peek(spec)
        except ExternalSystemError as error:
            self.log.warning("%s", error)
        else:
            if seen.status in FINAL:
                return seen
        # Airflow's own timeout runs only while a worker is held.
        if self.execution_timeout and progress.deadline is None:
            progress = replace(progress, deadline=time.time() + self.execution_timeout.total_seconds())
        from airflow_mlops.triggers.ray import RayJobTrigger

        self.defer(
            trigger=RayJobTrigger(
                submission_id=submission_id_of(spec),
                ray_conn_id=self.ray_conn_id,
                address=self.ray_address or None,
                poll_interval=self.poll_interval,
                unreachable_timeout=self.unreachable_timeout,
                cancel_on_kill=self.cancel_on_kill,
                deadline=progress.deadline,
                state=progress.to_json(),
            ),
            method_name="execute_complete",
        )
        raise AssertionError("defer() does not return")

    def _start(self, context: Context, spec: TrainingSpec) -> TrainingSpec:
        runner = self._runner
        assert runner is not None
        while True:
            if self._killed:
                raise AirflowFailException(f"the task was killed before attempt {spec.attempt} was started")
            self._current = spec
            self._ship(spec)
            uri = begin_attempt(spec)
            self._announce(context, spec)
            self.log.info("attempt %d in %s (%s mode)", spec.attempt, spec.run_dir, self.mode)
            if runner.start(spec, uri):
                if self._killed:  # while it was being started, when there was nothing to stop yet
                    self._stop_current()
                return spec
            result = read_result(spec)
            if result is not None and result.attempt == spec.attempt:
                return spec
            # The cluster remembers a job of this name from before the run directory was removed.
            spec = spec.with_attempt(spec.attempt + 1)

    def _announce(self, context: Context, spec: TrainingSpec) -> None:
        dashboard = self._runner.hook.endpoint.address if isinstance(self._runner, JobsRunner) else None
        value = {
            "dashboard_url": dashboard,
            "submission_id": submission_id_of(spec),
            "attempt": spec.attempt,
            "run_dir": spec.run_dir,
        }
        context["ti"].xcom_push(key=RAY_ATTEMPT, value=value)

    def _make_runner(self, context: Context) -> Runner:
        env_vars = {str(key): str(value) for key, value in (self.env_vars or {}).items()}
        if self.mode == "local":
            self._runner = LocalRunner(self._log_line, env=env_vars, stop_grace=self.stop_timeout)
            return self._runner
        ti = context["ti"]
        runtime_env = {**(self.runtime_env or {})}
        runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **env_vars}
        self._runner = JobsRunner(
            RayJobsHook(self.ray_conn_id, self.ray_address or None),
            python=self.python,
            runtime_env=runtime_env,
            poll_interval=self.poll_interval,
            unreachable_timeout=self.unreachable_timeout,
            stop_timeout=self.stop_timeout,
            metadata={"dag_id": ti.dag_id, "task_id": ti.task_id, "run_id": ti.run_id},
        )
        return self._runner

    @property
    def _log_line(self) -> Callable[[str], None]:
        logger = self.log
        return lambda line: logger.info("%s", line)

    def _spec(self, context: Context) -> TrainingSpec:
        if self.mode not in MODES:
            raise InvalidInputError(f"mode is {self.mode!r}; this version has {' and '.join(map(repr, MODES))}")
        ti = context["ti"]
        path = str(self.storage_path or "")
        if path and storage.is_local(path):
            path = os.path.abspath(storage.local_path(path))
        if self.config is not None and not isinstance(self.config, Mapping):
            raise InvalidInputError(f"config is a {type(self.config).__name__}; expected a dict of JSON values")
        spec = TrainingSpec(
            train_fn=self.train_fn,
            trainer=self.trainer,
            storage_path=path,
            run_key=self.run_key or run_key_of(ti.dag_id, ti.task_id, ti.run_id, getattr(ti, "map_index", -1)),
            config=dict(self.config or {}),
            num_workers=whole("num_workers", self.num_workers, at_least=1),
            resources_per_worker=self.resources_per_worker or None,
            use_gpu=self.use_gpu,
            max_failures=self.max_failures,
            checkpoints_to_keep=self.checkpoints_to_keep,
            exporter=self.exporter or None,
            ray_address=None if self.mode == "local" else "auto",
            num_cpus=self.num_cpus,
            patience=self.fence_timeout,
        )
        spec = self._reference(spec)
        spec.validate()
        whole("max_restarts", self.max_restarts, at_least=0)
        return spec

    def _reference(self, spec: TrainingSpec) -> TrainingSpec:
        """``spec`` naming the training loop; a subclass may ship one of its own."""
        return spec

    def _ship(self, spec: TrainingSpec) -> None:
        """Put what the driver needs beside the spec into the run directory."""

    def _outcome(self, spec: TrainingSpec, result: TrainingResult) -> dict[str, Any]:
        value = result.to_json()
        names = ("status", "attempt", "metrics", "checkpoint_uri", "model_uri", "resumed_from")
        times = ("wall_seconds", "cpu_seconds", "gpu_seconds")
        outcome = {"run_key": spec.run_key, "run_dir": spec.run_dir, "attempts": result.attempt}
        outcome |= {name: value[name] for name in (*names, *times)}
        self.log.info(
            "trained in %.1f s by attempt %d: %s", result.usage.wall_seconds, result.attempt, value["metrics"]
        )
        self.log.info("seconds of the last attempt by phase: %s", value["seconds"])
        return outcome

    def _error(self, action: Action, spec: TrainingSpec, result: TrainingResult | None) -> Exception:
        assert self._runner is not None
        tail = self._runner.tail(spec)
        if isinstance(self._runner, JobsRunner):
            self.log.error("last %d lines of the driver's log:\n%s", LOG_TAIL, tail)
        own = result if result is not None and result.attempt == spec.attempt else None
        cause = f"\n{own.error}" if own is not None and own.error else ""
        message = f"training in {spec.run_dir}: {action.reason}{cause}\nEnd of the driver's log:\n{tail[-4000:]}"
        if action.blame == "stopped":
            return AirflowFailException(message)
        kinds = {
            "app": TrainingError,
            "infra": AttemptsExhaustedError,
            "unreachable": ExternalSystemError,
            "refused": ConcurrentChangeError,
        }
        return kinds[action.blame or "app"](message)


def _truth(name: str, value: Any) -> bool:
    texts = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": False, "": False}
    if isinstance(value, str) and value.strip().lower() in texts:
        return texts[value.strip().lower()]
    if isinstance(value, bool | None):
        return bool(value)
    raise InvalidInputError(f"{name} is {value!r}; expected true or false")
