"""Distributed training with Ray: in this worker, on a Ray cluster, or on one made for the run in Kubernetes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
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
    LimitExceededError,
    MlopsError,
    TrainingError,
)
from airflow_mlops.hooks.ray import RayJobsHook
from airflow_mlops.links import RAY_ATTEMPT, GrafanaLink, MlflowRunLink, RayDashboardLink
from airflow_mlops.operators._ray import JobsRunner, LocalAttempts, Progress, Runner
from airflow_mlops.shell import permanent_errors_fail
from airflow_mlops.training.decide import ACTIVE, FINAL, Action, Observation, next_action
from airflow_mlops.training.fence import wait_until_free
from airflow_mlops.training.limits import Breach, Limits, Times, after_breach, breach, consumed, times_of, updated
from airflow_mlops.training.result import TrainingResult, outcome, read_result
from airflow_mlops.training.runs import begin_attempt, open_run, wipe_run
from airflow_mlops.training.spec import TrainingSpec, run_key_of, submission_id_of, whole, worker_count

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

    from airflow_mlops.training.cluster import KubeCluster

MODES = ("local", "jobs", "kuberay")
LOGS = ("off", "tail", "live")


class RayTrainOperator(BaseOperator):
    """Trains with Ray and returns the model's URI; what is lost on the way is started again where it was.

    The training loop is an ordinary Ray Train function; nothing of this package is needed in it. It should report
    checkpoints and start from ``ray.train.get_checkpoint()``: an attempt lost to a dead machine is started again up to
    ``max_restarts`` times and goes on from the last committed checkpoint, and so does Airflow's retry of a task. A
    run is finished once per run key: a cleared task returns the finished result unless ``fresh``, or trains anew if
    train_fn, trainer, config or exporter have changed.

    An attempt has a name that follows from the run directory and its number. A retry, a cleared task or a restarted
    triggerer finds it under that name and goes on with it, and attempt n + 1 is started only when nothing of attempt n
    is left: there are never two of one run.

    Returns (XCom) ``{"status", "run_key", "run_dir", "attempt", "attempts", "metrics", "checkpoint_uri", "model_uri",
    "resumed_from", "wall_seconds", "cpu_seconds", "gpu_seconds"}``, with a price in the budget also ``"cost"``; times
    are summed over the attempts.

    :param train_fn: ``"package.module:function"``, importable where the driver runs; a package that is installed here,
        too, is looked into before anything is started elsewhere (templated)
    :param mode: ``"local"``: a child process with a Ray of its own, which does not outlive the task; ``"jobs"``: a
        job of an existing cluster that shares ``storage_path`` with this worker; ``"kuberay"``: a Ray cluster made for
        the attempt by KubeRay 1.6 or newer, and removed after it (templated)
    :param trainer: ``"xgboost"``, ``"lightgbm"``, ``"torch"``, ``"jax"``, ``"data_parallel"``, or ``"tune"``: a search
        for hyper-parameters with one of the others, see :class:`airflow_mlops.training.search.Search` (templated)
    :param entrypoint: a shell command that trains, instead of ``train_fn`` and ``trainer``; see
        :mod:`airflow_mlops.training.command` (templated)
    :param config: argument of the training loop; JSON (templated)
    :param num_workers: Ray Train workers; ``(min, max)`` lets their number follow the machines at hand (templated)
    :param resources_per_worker: Ray resources of each, for example ``{"CPU": 2}`` (templated)
    :param use_gpu: one GPU for each worker; in kuberay mode ``cluster["gpu"]`` says which
    :param storage_path: folder or URI below which the run directory lies (templated)
    :param run_key: name of the run directory; default: one per Dag, task, run and map index (templated)
    :param exporter: ``"package.module:function"`` taking ``(checkpoint_dir, config, model_dir)`` that writes an MLflow
        model; built in for xgboost and lightgbm, otherwise ``model_uri`` is None (templated)
    :param fresh: train a finished run again, once for all tries until the task is cleared (templated)
    :param max_failures: worker failures per attempt that Ray Train repairs by itself, preemptions included
    :param max_restarts: attempts lost to infrastructure that are replaced within this task
    :param checkpoints_to_keep: newest checkpoints kept
    :param num_cpus: CPUs of the local Ray; default: all (local mode)
    :param env_vars: environment of driver and workers; secrets belong elsewhere (templated)
    :param ray_conn_id: connection of type ``ray`` (jobs mode)
    :param ray_address: dashboard address instead of a connection (jobs mode, templated)
    :param runtime_env: Ray runtime environment of the job (jobs mode, templated)
    :param python: Python interpreter on the cluster (jobs mode, templated)
    :param entrypoint_resources: what the driver itself reserves: ``entrypoint_num_cpus`` and the like (jobs mode)
    :param cluster: :class:`airflow_mlops.training.cluster.KubeCluster`, or a dict with its fields: image, GPUs, gang
        scheduling, spot machines, autoscaling, pods (kuberay mode, templated)
    :param k8s_conn_id: connection of type ``kuberay`` or ``kubernetes`` (kuberay mode)
    :param in_cluster: use the service account of the pod Airflow runs in (kuberay mode)
    :param cluster_context: context of the kubeconfig (kuberay mode)
    :param config_file: path of a kubeconfig (kuberay mode)
    :param keep_on_failure: leave a failed attempt's pods until their TTL is over (kuberay mode)
    :param startup_timeout: seconds from an attempt's begin, or its admission by a queue, until it runs; the error names
        what kept it (image, quota, node, gang)
    :param queue_timeout: seconds that an attempt may wait in Kueue's queue; None: as long as it takes
    :param attempt_timeout: seconds of one attempt, None: no limit
    :param total_timeout: seconds of all attempts of this task, time in queues included
    :param stall_timeout: seconds without a committed checkpoint after which an attempt is replaced; give more, or None,
        where the loop commits more seldom
    :param budget: ``{"max_gpu_hours", "max_cost", "price_per_gpu_hour"}`` over all attempts of the run; the stop leaves
        what was committed, and a task with a higher budget goes on from there (templated)
    :param logs: of the driver's log ``"off"``, ``"tail"`` (its end) or ``"live"``; local mode shows it all
    :param poll_interval: seconds between two looks
    :param unreachable_timeout: seconds that the dashboard or the API server may be away before the task gives up
    :param stop_timeout: seconds that a stopped driver has to commit a checkpoint and end
    :param fence_timeout: seconds that an attempt waits for an earlier driver of the run to be gone; the pods of an
        earlier attempt in Kubernetes have at least 180 s
    :param cancel_on_kill: stop the attempt when the task is killed, cleared or marked by a user
    :param deferrable: wait in the triggerer (local mode always waits in the worker), where a success also ends the task
        if nothing else depends on a worker; ``execution_timeout`` then counts from the first wait on
    :raises TrainingError: the training code failed; the message ends with the end of the driver's log
    :raises LimitExceededError: a time limit or the budget is used up
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
        "entrypoint",
        "cluster",
        "budget",
    )
    template_fields_renderers = {
        "config": "json",
        "runtime_env": "json",
        "env_vars": "json",
        "cluster": "json",
        "budget": "json",
        "entrypoint": "bash",
    }
    operator_extra_links = (RayDashboardLink(), MlflowRunLink(), GrafanaLink())
    ui_color = "#d7ecff"

    def __init__(
        self,
        *,
        mode: str,
        storage_path: str,
        train_fn: str | None = None,
        trainer: str | None = None,
        entrypoint: str | None = None,
        config: Mapping[str, Any] | None = None,
        num_workers: int | str | Sequence[int] = 1,
        resources_per_worker: Mapping[str, float] | None = None,
        use_gpu: bool = False,
        run_key: str | None = None,
        exporter: str | None = None,
        fresh: bool | str = False,
        max_failures: int = 3,
        max_restarts: int = 3,
        checkpoints_to_keep: int | None = 2,
        num_cpus: int | None = None,
        env_vars: Mapping[str, str] | None = None,
        ray_conn_id: str = RayJobsHook.default_conn_name,
        ray_address: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        python: str | None = None,
        entrypoint_resources: Mapping[str, Any] | None = None,
        cluster: KubeCluster | Mapping[str, Any] | None = None,
        k8s_conn_id: str = "kubernetes_default",
        in_cluster: bool | None = None,
        cluster_context: str | None = None,
        config_file: str | None = None,
        keep_on_failure: bool = False,
        startup_timeout: float | timedelta | None = 1200.0,
        queue_timeout: float | timedelta | None = None,
        attempt_timeout: float | timedelta | None = None,
        total_timeout: float | timedelta | None = 86400.0,
        stall_timeout: float | timedelta | None = 3600.0,
        budget: Mapping[str, float] | None = None,
        logs: str = "tail",
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
        self.entrypoint = entrypoint
        self.entrypoint_resources = entrypoint_resources
        self.cluster = cluster
        self.k8s_conn_id = k8s_conn_id
        self.in_cluster = in_cluster
        self.cluster_context = cluster_context
        self.config_file = config_file
        self.keep_on_failure = keep_on_failure
        self.startup_timeout = startup_timeout
        self.queue_timeout = queue_timeout
        self.attempt_timeout = attempt_timeout
        self.total_timeout = total_timeout
        self.stall_timeout = stall_timeout
        self.budget = budget
        self.logs = logs
        self.poll_interval = poll_interval
        self.unreachable_timeout = unreachable_timeout
        self.stop_timeout = stop_timeout
        self.fence_timeout = fence_timeout
        self.cancel_on_kill = cancel_on_kill
        self.deferrable = deferrable
        self._runner: Runner | None = None
        self._current: TrainingSpec | None = None
        self._killed = False
        self._trained: dict[str, Any] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Train, or return what is trained already."""
        with permanent_errors_fail():
            limits = self._limits()
            spec = self._spec(context)
            opened_by = _tries(context["ti"])
            plan = open_run(spec, _truth("fresh", self.fresh), opened_by)
            runner = self._make_runner(context, limits)
            if plan.finished is not None:
                self.log.info("the run in %s is finished: nothing to train", spec.run_dir)
                # The try that trained it may have been lost before it gave back what it held.
                for attempt in range(plan.finished.attempt, plan.previous + 1):
                    runner.close(spec.with_attempt(attempt), failed=False)
                return self._outcome(spec, plan.finished)
            spec = runner.fitted(spec)
            limits.validate(_gpus(spec))
            previous = spec.with_attempt(max(plan.previous, 1))
            if runner.remote and plan.previous and runner.peek(previous).status in ACTIVE:
                if plan.adoptable and runner.adopt(previous):
                    self.log.info("attempt %d of an earlier try still runs: following it", previous.attempt)
                    self._announce(context, previous)
                    times = times_of(previous, _gpus(previous), time.time())
                    return self._follow(context, Progress(previous, times, adopted=True))
                runner.stop(previous)
            if plan.wipe:
                self.log.warning("%s is emptied: %s", spec.run_dir, plan.wipe)
                wait_until_free(spec, self.fence_timeout)
                wipe_run(spec, opened_by)
            spec = spec.with_attempt(plan.previous + 1)
            progress = Progress(spec, times_of(spec, _gpus(spec), time.time()))
            return self._follow(context, self._start(context, progress))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on after the wait in the triggerer, with what the event says alone."""
        with permanent_errors_fail():
            progress = Progress.from_json(event["state"])
            if event.get("times"):
                progress = replace(progress, times=Times.from_json(event["times"]))
            self._make_runner(context, self._limits())
            if "error" in event:
                self._abandon(progress.spec)
                raise InvalidInputError(event["error"])
            if event.get("paused"):
                return self._follow(context, self._start(context, progress))
            seen = Observation(**event["seen"]) if "seen" in event else None
            if event.get("timed_out"):
                self._current = progress.spec
                self._stop_current()
                raise AirflowTaskTimeout(
                    f"training in {progress.spec.run_dir} took longer than {self.execution_timeout}"
                )
            if "breach" in event:
                if seen is None or seen.status not in FINAL or seen.status == "UNREACHABLE":
                    self._must_run.stop(progress.spec)
                return self._follow(context, progress, Breach(**event["breach"]))
            return self._follow(context, progress, seen)

    def on_kill(self) -> None:
        """End what runs: the child process always, a remote attempt if ``cancel_on_kill``."""
        self._killed = True
        self._stop_current()

    def _stop_current(self) -> None:
        if self._runner is not None and self._current is not None and (self.mode == "local" or self.cancel_on_kill):
            self.log.info("stopping attempt %d in %s", self._current.attempt, self._current.run_dir)
            self._runner.cancel(self._current)

    def _abandon(self, spec: TrainingSpec) -> None:
        """End an attempt that cannot be followed any further."""
        try:
            self._must_run.cancel(spec)
        except MlopsError as error:
            self.log.warning("attempt %d in %s may still run: %s", spec.attempt, spec.run_dir, error)

    def _follow(self, context: Context, progress: Progress, end: Observation | Breach | None = None) -> dict[str, Any]:
        while True:
            spec = self._current = progress.spec
            if end is None:
                end, progress = self._wait(progress)
            if self._killed:
                end = Observation("STOPPED", message="The task was killed.")
            result = read_result(spec)
            action = self._decide(end, progress, result)
            if action.kind == "succeed" and result is not None:
                self._must_run.close(spec, failed=False)
                return self._outcome(spec, result)
            if action.kind == "fail":
                error = self._error(action, progress, result, getattr(end, "log", ""))
                # Who cannot be reached may be well: the next try finds out.
                if action.blame != "unreachable":
                    self._must_run.close(spec, failed=True)
                raise error
            if action.kind == "restart":
                progress = self._restart(context, progress, action)
            end = None

    def _decide(self, end: Observation | Breach, progress: Progress, result: TrainingResult | None) -> Action:
        attempt, restarts = progress.spec.attempt, progress.restarts
        if isinstance(end, Breach):
            return after_breach(end, result, attempt, restarts, self.max_restarts)
        adopted = progress.adopted and not self._killed
        return next_action(end, result, attempt, restarts, self.max_restarts, adopted)

    def _restart(self, context: Context, progress: Progress, action: Action) -> Progress:
        spec, runner = progress.spec, self._must_run
        self.log.warning("%s Starting attempt %d.", action.reason, spec.attempt + 1)
        runner.stop(spec)
        now = time.time()
        following = replace(
            progress,
            spec=spec.with_attempt(spec.attempt + 1),
            restarts=progress.restarts + 1,
            adopted=False,
            times=updated(spec, progress.times).next_attempt(now),
        )
        if action.delay:
            self._pause(action.delay, following)
        return self._start(context, following)

    def _pause(self, seconds: float, progress: Progress) -> None:
        """Wait before the next attempt, in the triggerer if tasks wait there."""
        self.log.info("waiting %.0f s for capacity", seconds)
        if self.deferrable:
            from airflow_mlops.triggers.ray import PauseTrigger

            trigger = PauseTrigger(until=time.time() + seconds, state=progress.to_json())
            self.defer(trigger=trigger, method_name="execute_complete")
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._killed:
            time.sleep(1.0)

    def _wait(self, progress: Progress) -> tuple[Observation | Breach, Progress]:
        runner, spec = self._must_run, progress.spec
        if not (self.deferrable and runner.remote):
            from airflow_mlops.triggers._training import LimitWatch

            watch = LimitWatch(spec, self._limits(), progress.times)
            try:
                end = runner.wait_within(spec, watch)
            except InvalidInputError:
                self._abandon(spec)
                raise
            return end, replace(progress, times=watch.times)
        try:
            seen = runner.peek(spec)
        except ExternalSystemError as error:
            self.log.warning("%s", error)
        else:
            if seen.status in FINAL:
                runner.show_tail(spec)
                return seen, progress
        # Airflow's own timeout runs only while a worker is held.
        if self.execution_timeout and progress.deadline is None:
            progress = replace(progress, deadline=time.time() + self.execution_timeout.total_seconds())
        from airflow_mlops.triggers._training import ends_in_triggerer

        self.defer(
            trigger=runner.trigger(progress, finish=ends_in_triggerer(self)),
            method_name="execute_complete",
        )
        raise AssertionError("defer() does not return")

    def _start(self, context: Context, progress: Progress) -> Progress:
        runner, spec = self._must_run, progress.spec
        while True:
            if self._killed:
                raise AirflowFailException(f"the task was killed before attempt {spec.attempt} was started")
            self._current = spec
            times = replace(progress.times, attempt_began=time.time())
            progress = replace(progress, spec=spec, times=times)
            if broken := breach(self._limits(), times, time.time()):
                raise _ERRORS[broken.kind](f"attempt {spec.attempt} in {spec.run_dir} is not started: {broken.message}")
            self._ship(spec)
            uri = begin_attempt(spec, began=times.attempt_began, run_began=times.run_began)
            self._announce(context, spec)
            self.log.info("attempt %d in %s (%s mode)", spec.attempt, spec.run_dir, self.mode)
            if runner.start(spec, uri, progress.times):
                if self._killed:  # while it was being started, when there was nothing to stop yet
                    self._stop_current()
                return progress
            result = read_result(spec)
            if result is not None and result.attempt == spec.attempt:
                return progress
            # The system remembers an attempt of this name from before the run directory was removed.
            spec = spec.with_attempt(spec.attempt + 1)

    def _announce(self, context: Context, spec: TrainingSpec) -> None:
        named = {"submission_id": submission_id_of(spec), "attempt": spec.attempt, "run_dir": spec.run_dir}
        value = {"namespace": "", **self._must_run.link(spec), **named}
        for key, option in (("dashboard_url", "ray_dashboard_url"), ("grafana_url", "grafana_url")):
            if not value.get(key):
                value[key] = self._address(option, value)
        context["ti"].xcom_push(key=RAY_ATTEMPT, value=value)

    def _address(self, option: str, named: Mapping[str, Any]) -> str | None:
        """The address that ``[mlops]`` gives for an attempt, None without one."""
        pattern = conf.get("mlops", option, fallback="")
        try:
            return pattern.format_map(named) or None
        except (KeyError, ValueError, IndexError) as error:
            self.log.warning("[mlops] %s is %r: %s; it may name %s", option, pattern, error, ", ".join(named))
            return None

    @property
    def _must_run(self) -> Runner:
        assert self._runner is not None
        return self._runner

    def _make_runner(self, context: Context, limits: Limits) -> Runner:
        env_vars = {str(key): str(value) for key, value in (self.env_vars or {}).items()}
        ti = context["ti"]
        shared: dict[str, Any] = {
            "limits": limits,
            "poll_interval": self.poll_interval,
            "unreachable_timeout": self.unreachable_timeout,
            "cancel_on_kill": self.cancel_on_kill,
            "logs": self.logs,
            "on_line": self._log_line,
            "multiple_outputs": bool(self.multiple_outputs),
        }
        if self.mode == "local":
            self._runner = LocalAttempts(self._log_line, env=env_vars, stop_grace=self.stop_timeout)
        elif self.mode == "jobs":
            runtime_env = {**(self.runtime_env or {})}
            runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **env_vars}
            self._runner = JobsRunner(
                RayJobsHook(self.ray_conn_id, self.ray_address or None),
                python=self.python,
                runtime_env=runtime_env,
                stop_timeout=self.stop_timeout,
                metadata={"dag_id": ti.dag_id, "task_id": ti.task_id, "run_id": ti.run_id},
                resources=self.entrypoint_resources,
                **shared,
            )
        else:
            from airflow_mlops.operators._kuberay import KubeRayRunner
            from airflow_mlops.training.manifest import Owner

            cluster = self._cluster(env_vars)
            self._runner = KubeRayRunner(
                connection={
                    "conn_id": self.k8s_conn_id,
                    "namespace": cluster.namespace,
                    "in_cluster": self.in_cluster,
                    "cluster_context": self.cluster_context,
                    "config_file": self.config_file,
                },
                cluster=cluster,
                owner=Owner(ti.dag_id, ti.task_id, ti.run_id, getattr(ti, "map_index", -1), ti.try_number),
                keep_on_failure=self.keep_on_failure,
                fence_timeout=self.fence_timeout,
                **shared,
            )
        return self._runner

    def _cluster(self, env_vars: Mapping[str, str]) -> KubeCluster:
        from airflow_mlops.training.cluster import KubeCluster

        if isinstance(self.cluster, KubeCluster):
            cluster = self.cluster
        elif isinstance(self.cluster, Mapping):
            cluster = KubeCluster.from_mapping(self.cluster)
        else:
            raise InvalidInputError(
                f'cluster is {self.cluster!r}; mode "kuberay" needs the cluster to make, for example '
                '{"image": "registry/train:1.0", "gpu": {"kind": "full"}}'
            )
        cluster.validate()
        cluster = replace(cluster, env={**cluster.env, **env_vars})
        cluster.validate()
        return cluster

    @property
    def _log_line(self) -> Callable[[str], None]:
        logger = self.log
        return lambda line: logger.info("%s", line)

    def _limits(self) -> Limits:
        limits = Limits.from_mapping(
            {
                "startup_timeout": self.startup_timeout,
                "queue_timeout": self.queue_timeout,
                "attempt_timeout": self.attempt_timeout,
                "total_timeout": self.total_timeout,
                "stall_timeout": self.stall_timeout,
                "budget": self.budget or None,
            }
        )
        limits.validate()
        return limits

    def _spec(self, context: Context) -> TrainingSpec:
        for name, value, known in (("mode", self.mode, MODES), ("logs", self.logs, LOGS)):
            if value not in known:
                raise InvalidInputError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        ti = context["ti"]
        path = str(self.storage_path or "")
        if path and storage.is_local(path):
            path = os.path.abspath(storage.local_path(path))
        if self.config is not None and not isinstance(self.config, Mapping):
            raise InvalidInputError(f"config is a {type(self.config).__name__}; expected a dict of JSON values")
        spec = TrainingSpec(
            train_fn=self.train_fn or None,
            trainer=self.trainer or (None if self.entrypoint else "xgboost"),
            entrypoint=self.entrypoint or None,
            storage_path=path,
            run_key=self.run_key or run_key_of(ti.dag_id, ti.task_id, ti.run_id, getattr(ti, "map_index", -1)),
            config=dict(self.config or {}),
            num_workers=worker_count(self.num_workers),
            resources_per_worker=self.resources_per_worker or None,
            use_gpu=self.use_gpu,
            max_failures=self.max_failures,
            checkpoints_to_keep=self.checkpoints_to_keep,
            exporter=self.exporter or None,
            ray_address=None if self.mode == "local" else "auto",
            num_cpus=self.num_cpus,
            patience=self.fence_timeout,
            stop_timeout=self.stop_timeout,
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
        budget = self._limits().budget
        value = outcome(spec, result, price_per_gpu_hour=None if budget is None else budget.price_per_gpu_hour)
        self.log.info(
            "trained in %.1f s by attempt %d: %s", result.usage.wall_seconds, result.attempt, value["metrics"]
        )
        self.log.info("seconds of the last attempt by phase: %s", result.to_json()["seconds"])
        self._trained = value
        return value

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage:
        """What the training read, wrote and consumed; asked by the OpenLineage provider where it is installed."""
        from airflow_mlops.operators._lineage import lineage_of

        return lineage_of(self.config, self._trained)

    def _error(self, action: Action, progress: Progress, result: TrainingResult | None, log: str) -> Exception:
        spec, budget = progress.spec, self._limits().budget
        tail = log or self._must_run.tail(spec)
        price = None if budget is None else budget.price_per_gpu_hour
        used = consumed(spec, progress.times, result, time.time(), price)
        own = result if result is not None and result.attempt == spec.attempt else None
        cause = f"\n{own.error}" if own is not None and own.error else ""
        said = f"training in {spec.run_dir}: {action.reason} {used}".rstrip()
        message = f"{said}{cause}\nEnd of the driver's log:\n{tail[-4000:]}"
        if action.blame == "stopped":
            return AirflowFailException(message)
        return _ERRORS[action.blame or "app"](message)


def _tries(ti: Any) -> str | None:
    """Names a task instance and its tries up to the next time it is cleared, which is when ``max_tries`` changes."""
    last = getattr(ti, "max_tries", None)
    return None if last is None else f"{ti.dag_id}/{ti.task_id}/{ti.run_id}/{getattr(ti, 'map_index', -1)}/{last}"


#: By whom or what a failure is blamed on; see :class:`airflow_mlops.training.decide.Action`.
_ERRORS: Mapping[str, type[Exception]] = {
    "app": TrainingError,
    "infra": AttemptsExhaustedError,
    "capacity": AttemptsExhaustedError,
    "unreachable": ExternalSystemError,
    "refused": ConcurrentChangeError,
    "invalid": InvalidInputError,
    "deadline": LimitExceededError,
    "attempt": LimitExceededError,
    "total": LimitExceededError,
    "budget": LimitExceededError,
    # A later try of the task may find room, or a training that does not hang.
    "startup": ExternalSystemError,
    "queue": ExternalSystemError,
    "stall": ExternalSystemError,
}


def _gpus(spec: TrainingSpec) -> float:
    return spec.gpus_per_worker * spec.max_workers


def _truth(name: str, value: Any) -> bool:
    texts = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": False, "": False}
    if isinstance(value, str) and value.strip().lower() in texts:
        return texts[value.strip().lower()]
    if isinstance(value, bool | None):
        return bool(value)
    raise InvalidInputError(f"{name} is {value!r}; expected true or false")
