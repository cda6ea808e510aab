"""A Ray head on 127.0.0.1 that keeps to itself: own ports, own folder, token authentication.

It never runs ``ray stop``, which would end every Ray of the machine, and it sets no ``RAY_ADDRESS``: who should
use this cluster gets its address.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import requests

from airflow_mlops.embedded.processes import Service, free_ports

# The path of a Unix socket has at most 107 bytes; Ray adds up to 70 to its temporary folder.
_LONGEST_TEMP_DIR = 107 - 70
#: Ray takes 127.0.0.1 for the machine's outward address and listens there, unless it is told to stay on one machine.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class RayHead:
    """Ray's head node with dashboard (Jobs and Serve REST).

    :param root: folder of the stack
    :param env: environment of Ray and of every job it runs
    :param token: who connects has to show it
    :param port: of the cluster's own address (GCS); None picks a free one
    :param dashboard_port: of dashboard, Jobs and Serve REST; None picks a free one
    :param num_cpus: logical CPUs: how many one-CPU things Ray runs at once, whatever the machine has
    :param object_store_mb: shared memory for objects, in MiB
    """

    def __init__(
        self,
        root: Path,
        *,
        env: Mapping[str, str],
        token: str,
        port: int | None = None,
        dashboard_port: int | None = None,
        num_cpus: int = 8,
        object_store_mb: int = 200,
    ) -> None:
        self._root = root
        self._env = {**env, **self.client_env(token), "RAY_USAGE_STATS_ENABLED": "0"}
        # Workers start when there is work: eight idle interpreters would cost two cores their first minute.
        self._env |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
        self._env |= {"RAY_DISABLE_IMPORT_WARNING": "1", "RAY_BACKEND_LOG_LEVEL": "warning"}
        self._env.pop("RAY_ADDRESS", None)
        self._token = token
        self._num_cpus = num_cpus
        self._object_store_mb = object_store_mb
        gcs, dashboard, *self._fixed = free_ports(7)
        self.port = port or gcs
        self.dashboard_port = dashboard_port or dashboard
        self.service: Service | None = None
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {token}"

    @staticmethod
    def client_env(token: str) -> dict[str, str]:
        """What a process needs in its environment to talk to this cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **LOOPBACK_ONLY}

    @property
    def dashboard_url(self) -> str:
        """URL of dashboard, Jobs API and Serve REST."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def address(self) -> str:
        """The cluster's address for ``ray.init``."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the head; returns before it is healthy."""
        temp = self._temp_dir()
        agent, grpc, metrics, runtime_env, client = self._fixed
        flags = {
            "--node-ip-address": "127.0.0.1",
            "--port": self.port,
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": self.dashboard_port,
            "--dashboard-agent-listen-port": agent,
            "--dashboard-agent-grpc-port": grpc,
            "--metrics-export-port": metrics,
            "--ray-client-server-port": client,
            "--runtime-env-agent-port": runtime_env,
            # Zero lets each worker pick a free port; the default range is shared with any other Ray here.
            "--min-worker-port": 0,
            "--max-worker-port": 0,
            "--temp-dir": temp,
            "--num-cpus": self._num_cpus,
            "--object-store-memory": self._object_store_mb * 1024 * 1024,
        }
        options = ["--head", "--block", "--include-dashboard=true", "--disable-usage-stats"]
        options += [f"{flag}={value}" for flag, value in flags.items()]
        self.service = Service(
            "ray",
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
            root=self._root,
            env=self._env,
        )
        self.service.start()

    def healthy(self) -> bool:
        """Whether the Jobs API answers."""
        try:
            return self._session.get(f"{self.dashboard_url}/api/jobs/", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def wait_healthy(self, timeout: float = 90.0) -> None:
        """:raises ServiceDiedError: Ray ended, or the Jobs API does not answer in ``timeout`` seconds"""
        if self.service is not None:
            self.service.wait_healthy(self.healthy, timeout=timeout, interval=0.2)

    def check(self) -> None:
        """:raises ServiceDiedError: Ray has ended by itself"""
        if self.service is not None:
            self.service.check()

    def restart(self) -> None:
        """Stop the head and start it again at the same addresses; its jobs and Serve applications are gone."""
        self.stop()
        self.start()
        self.wait_healthy()

    def stop(self) -> None:
        """Stop the head and every worker."""
        if self.service is not None:
            self.service.stop()
            self.service = None

    def _temp_dir(self) -> Path:
        """Ray's folder: ``{root}/ray``, or when that is too long a short one that ``{root}/ray`` links to."""
        inside = self._root / "ray"
        if len(os.fsencode(inside)) <= _LONGEST_TEMP_DIR:
            inside.mkdir(parents=True, exist_ok=True)
            return inside
        if not inside.is_dir():
            inside.unlink(missing_ok=True)
            inside.symlink_to(tempfile.mkdtemp(prefix="mlops-ray-", dir="/tmp"), target_is_directory=True)
        return inside.resolve()


def remove_files(root: Path) -> None:
    """Delete what Ray wrote, the short folder outside ``root`` included."""
    inside = root / "ray"
    if inside.is_symlink():
        target = inside.resolve()
        if target.name.startswith("mlops-ray-"):
            shutil.rmtree(target, ignore_errors=True)
        inside.unlink()
    else:
        shutil.rmtree(inside, ignore_errors=True)
