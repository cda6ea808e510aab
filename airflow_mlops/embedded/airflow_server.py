"""A whole Airflow on 127.0.0.1: one Python process that imports Airflow once and forks its four parts.

:class:`AirflowServer` is the side that starts it; ``python -m airflow_mlops.embedded.airflow_server`` is the
process itself: it creates or migrates the database, declares dead what an earlier server left marked as running,
so that its tasks are taken up at once, and forks API server, Dag processor, triggerer and scheduler. Each part
runs its own command of the ``airflow`` program. When one ends, all end, and the status file says which.

Triggerer and scheduler start when the API server answers: tasks report through it, and those that an earlier
server left queued would fail for want of it. Until then this process imports the libraries of the tasks, once for
all of them: LocalExecutor forks a process for each task from the scheduler's.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import requests

from airflow_mlops.embedded.guard import die_with_parent
from airflow_mlops.embedded.processes import Service, ServiceDiedError, tail

_FIRST = ("api-server", "dag-processor")
_WHEN_API_ANSWERS = ("triggerer", "scheduler")
# The names under which the health endpoint reports, against the names of the commands.
_HEALTH_KEYS = ("metadatabase", "scheduler", "triggerer", "dag_processor")
_STATUS_FILE = "airflow-status.json"
# What the provider's tasks import, seconds each time. Ray is not among them: it starts threads, which a fork loses.
_LIBRARIES_OF_TASKS = (
    "pandas",
    "xgboost",
    "mlflow.xgboost",
    "mlflow.store.tracking.sqlalchemy_store",
    "feast.repo_operations",
    "feast.infra.offline_stores.dask",
    "evidently.presets",
    "matplotlib.figure",
    "dvc.repo",
)


def settings(
    home: Path, *, dags_folder: Path, sql_alchemy_conn: str, port: int, parallelism: int, secrets: Mapping[str, str]
) -> dict[str, str]:
    """Airflow's configuration as environment variables.

    :param home: Airflow's home folder
    :param dags_folder: folder of Dag files
    :param sql_alchemy_conn: URL of the metadata database
    :param port: of the API server and UI, on 127.0.0.1
    :param parallelism: tasks at the same time
    :param secrets: ``jwt``, ``fernet`` and ``api``: the keys that the four parts share
    """
    url = f"http://127.0.0.1:{port}"
    values = {
        "AIRFLOW_HOME": str(home),
        "CORE__DAGS_FOLDER": str(dags_folder),
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": str(parallelism),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__FERNET_KEY": secrets["fernet"],
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": "True",
        "DATABASE__SQL_ALCHEMY_CONN": sql_alchemy_conn,
        "API__HOST": "127.0.0.1",
        "API__PORT": str(port),
        "API__BASE_URL": url,
        "API__SECRET_KEY": secrets["api"],
        "API__WORKERS": "1",
        "API_AUTH__JWT_SECRET": secrets["jwt"],
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
        # The default of 300 s is for clusters; a task whose worker was killed is retried after this.
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
        # With the default of 5 s a worker stays busy up to 5 s after its task has ended.
        "WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        "DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        "LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "TRIGGERER__JOB_HEARTBEAT_SEC": "2",
    }
    return {name if name == "AIRFLOW_HOME" else f"AIRFLOW__{name}": value for name, value in values.items()}


class AirflowServer:
    """Scheduler, Dag processor, triggerer, API server and LocalExecutor.

    :param root: folder of the stack
    :param env: environment of all parts and, through the executor, of every task; holds :func:`settings`
    :param port: of the API server and UI
    """

    def __init__(self, root: Path, *, env: Mapping[str, str], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._logs = root / "logs"
        self._status = root / "run" / _STATUS_FILE
        self._home = root / "airflow"
        self.service = Service(
            "airflow",
            [sys.executable, "-m", "airflow_mlops.embedded.airflow_server", str(self._logs), str(self._status)],
            root=root,
            env=env,
            grace=6.0,
        )
        self._session = requests.Session()

    def start(self) -> None:
        """Start all parts; returns before they are healthy."""
        self._home.mkdir(parents=True, exist_ok=True)
        self._status.unlink(missing_ok=True)
        self.service.start()

    def healthy(self) -> bool:
        """Whether database, scheduler, Dag processor and triggerer all report healthy."""
        try:
            report = self._session.get(f"{self.url}/api/v2/monitor/health", timeout=5).json()
        except (requests.RequestException, ValueError):
            return False
        return all((report.get(key) or {}).get("status") == "healthy" for key in _HEALTH_KEYS)

    def wait_healthy(self, timeout: float = 240.0) -> None:
        """:raises ServiceDiedError: a part ended, or ``timeout`` seconds passed"""
        try:
            self.service.wait_healthy(self.healthy, timeout=timeout, interval=0.2)
        except ServiceDiedError:
            self.check()
            raise

    def check(self) -> None:
        """:raises ServiceDiedError: a part has ended; says which and shows the end of its log"""
        try:
            dead = json.loads(self._status.read_text())["dead"]
        except (OSError, ValueError, KeyError):
            self.service.check()
            return
        log = self._logs / f"airflow-{dead['component']}.log"
        raise ServiceDiedError(
            f"Airflow's {dead['component']} ended by itself with exit status {dead['status']}. "
            f"The end of {log}:\n{tail(log)}"
        )

    def stop(self) -> None:
        """Stop all parts; running tasks are ended."""
        self.service.stop()


def _settle_the_past() -> None:
    """End in the database what still counts as running; only this server uses it and it runs nothing yet.

    Jobs, which would else be waited for until their heartbeat is too old, and backfills whose runs are all over,
    which the scheduler completes only after half a minute and which forbid the next one until then.
    """
    from airflow.jobs.job import Job
    from airflow.models.backfill import Backfill
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from sqlalchemy import exists, func, select, update

    unfinished = exists(select(DagRun.id).where(DagRun.backfill_id == Backfill.id, DagRun.end_date.is_(None)))
    with create_session() as session:
        session.execute(update(Job).where(Job.state == "running").values(state="failed"))
        session.execute(
            update(Backfill)
            .where(Backfill.completed_at.is_(None), ~unfinished)
            .values(completed_at=func.now())
            .execution_options(synchronize_session=False)
        )


def _api_answers(url: str) -> bool:
    """Whether the API that tasks report to is up; the first call makes the server build it."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def _import_for_tasks(stop: Callable[[], bool]) -> None:
    """Import what tasks will need; what is not installed is theirs to miss.

    :param stop: asked between two libraries
    """
    for name in _LIBRARIES_OF_TASKS:
        if stop():
            return
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # Collecting garbage writes to every object, and the children would no longer share them.
    gc.collect()
    gc.freeze()


def _fork(component: str, log: Path) -> int:
    """Run one of ``airflow``'s commands in a forked child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, signal.SIG_DFL)
        die_with_parent(signal.SIGKILL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from airflow import settings as airflow_settings
        from airflow.cli import cli_parser

        airflow_settings.reconfigure_orm()
        # Logs are read from the disk that all parts share, so the two log servers would only take ports.
        options = ["--skip-serve-logs"] if component in ("scheduler", "triggerer") else []
        sys.argv = ["airflow", component, *options]
        args = cli_parser.get_parser().parse_args(sys.argv[1:])
        args.func(args)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def main() -> int:
    """Run the four parts until SIGTERM or until one ends; returns the exit status."""
    logs, status_file = Path(sys.argv[1]), Path(sys.argv[2])
    stop = False

    def ask_stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, ask_stop)

    from airflow import settings as airflow_settings
    from airflow.configuration import conf, write_default_airflow_configuration_if_needed
    from airflow.utils import db

    write_default_airflow_configuration_if_needed()
    db.initdb()
    _settle_the_past()
    # Imported once here, shared by all four after the forks.
    import airflow.cli.commands.dag_processor_command
    import airflow.cli.commands.scheduler_command
    import airflow.cli.commands.triggerer_command
    import airflow.executors.local_executor  # noqa: F401

    airflow_settings.dispose_orm(do_log=False)
    if stop:
        return 0
    parts: dict[int, str] = {}

    def fork(components: tuple[str, ...]) -> None:
        parts.update({_fork(component, logs / f"airflow-{component}.log"): component for component in components})

    fork(_FIRST)
    _import_for_tasks(lambda: stop)
    complete = False
    dead: tuple[str, int] | None = None
    while not stop and dead is None:
        if not complete and _api_answers(conf.get_mandatory_value("core", "execution_api_server_url")):
            fork(_WHEN_API_ANSWERS)
            complete = True
        pid, raw = os.waitpid(-1, os.WNOHANG)
        if pid in parts:
            dead = parts.pop(pid), os.waitstatus_to_exitcode(raw)
        elif not pid:
            time.sleep(0.1)
    if dead is not None:
        status_file.write_text(json.dumps({"dead": {"component": dead[0], "status": dead[1]}}))
    for pid in parts:
        os.kill(pid, signal.SIGTERM)
    # The guard ends what does not end in time.
    for pid in parts:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
