"""A function in a process of its own that can harm nothing but its own answer; for models that run code when loaded.

What holds where:

- everywhere: no environment but a few harmless variables, no open files of the parent, limits on memory, CPU, file
  size, open files and time; the answer is JSON or plain numbers, never a pickle;
- on Linux (x86-64, ARM 64): ``network`` (no socket can be made), ``processes`` (no program can be started, no process
  be forked, signalled or looked into) by seccomp, and, on 5.13 or newer with Landlock, ``files`` (only Python, its
  packages and the model can be read, only the sandbox's folder be written);
- on other systems none of these three. :class:`Sandbox` then refuses to run, unless ``require`` is less.

A bug of the kernel is out of reach of all of this, and so is a model that answers with wrong numbers.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.provenance._confine import ALL, confine

_JOB, _RESULT, _LOG = "job.json", "result.json", "log.txt"
_MOST_RESULT = 16 << 20
#: What a Python process reads of the machine besides itself; no secret lies there.
_MACHINE = (
    *("/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/filesystems", "/proc/sys/vm"),
    *("/sys/devices/system", "/sys/fs/cgroup", "/dev/urandom", "/dev/random", "/dev/zero"),
)


@dataclass(frozen=True)
class Limits:
    """What the process may use.

    :param memory: address space, bytes
    :param cpu_seconds: of all its threads
    :param wall_seconds: until it is killed
    :param file_bytes: of one file that it writes
    :param open_files: at once
    """

    memory: int = 8 << 30
    cpu_seconds: int = 600
    wall_seconds: float = 300.0
    file_bytes: int = 1 << 30
    open_files: int = 256


class Sandbox:
    """A folder that the process may write to, and the process; as a context manager.

    :param readable: files and folders that it may read besides Python and its packages: the model's
    :param limits: see :class:`Limits`
    :param require: of ``network``, ``processes`` and ``files`` those without which nothing runs
    """

    def __init__(
        self, readable: Sequence[str | Path] = (), limits: Limits | None = None, require: Sequence[str] = ALL
    ) -> None:
        if unknown := set(require) - set(ALL):
            raise InvalidInputError(f"the sandbox cannot require {sorted(unknown)}; expected some of {', '.join(ALL)}")
        self.readable = [os.path.realpath(path) for path in readable]
        self.limits = limits or Limits()
        self.require = tuple(require)
        self.held: tuple[str, ...] = ()
        self.folder = Path()

    def __enter__(self) -> Sandbox:
        self.folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="model-sandbox-")))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, function: str, job: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
        """What ``function`` makes of ``job``, in the folder, confined.

        :param function: ``package.module:function``; it is imported in there
        :param job: JSON; paths in it are relative to the folder, or readable
        :param environment: further variables
        :return: JSON; ``held`` of this object then says what was kept from it
        :raises InvalidInputError: isolation cannot be had here; the function failed, was stopped by a limit, or did
            not answer in JSON
        """
        request = {
            "function": function,
            "job": dict(job),
            "readable": [*self.readable, *_python()],
            "require": self.require,
            "limits": asdict(self.limits),
        }
        (self.folder / _JOB).write_text(json.dumps(request))
        (self.folder / _RESULT).unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "airflow_mlops.provenance.sandbox"]
        with (self.folder / _LOG).open("wb") as log:
            try:
                done = subprocess.run(
                    command,
                    cwd=self.folder,
                    env=self._environment(environment or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=self.limits.wall_seconds,
                    start_new_session=True,
                )
            except subprocess.TimeoutExpired:
                raise InvalidInputError(
                    f"{function} was stopped in the sandbox after {self.limits.wall_seconds:g} s without an answer"
                ) from None
        return self._answer(function, done.returncode)

    def read(self, name: str, most: int = 1 << 30) -> bytes:
        """A file that the function left in the folder.

        :raises InvalidInputError: there is none, it is larger, or no plain file
        """
        try:
            # The function may have left a link to a file of ours, or a pipe that nobody writes to.
            handle = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidInputError(f"the sandbox left no file {name}: {error.strerror}") from error
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > most or found.st_nlink != 1:
                raise InvalidInputError(f"the sandbox left {name} with {found.st_size} bytes; expected at most {most}")
            return file.read(most)

    def _environment(self, further: Mapping[str, str]) -> dict[str, str]:
        """Nothing of this process's own goes along: its variables hold credentials."""
        folder = str(self.folder)
        threads = os.environ.get("OMP_NUM_THREADS", "2")
        return {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": folder,
            "TMPDIR": folder,
            "PYTHONPATH": os.pathsep.join(_packages()),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            **further,
        }

    def _answer(self, function: str, code: int) -> Any:
        try:
            result = json.loads(self.read(_RESULT, _MOST_RESULT))
        except (InvalidInputError, ValueError):
            result = {}
        result = result if isinstance(result, dict) else {}
        if missing := result.get("missing"):
            raise InvalidInputError(
                f"{function} was not run: this machine cannot keep it from {', '.join(map(str, missing))}. Run it on "
                "Linux 5.13 or newer with seccomp and Landlock, store the model in a format that is only data, or "
                "name what to do without in `require`"
            )
        if "value" in result and code == 0:
            self.held = tuple(result.get("held") or ())
            return result["value"]
        said = str(result.get("error") or self._log_end())[-2000:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = " (a limit on CPU, memory or file size?)" if code < 0 else ""
        raise InvalidInputError(f"{function} failed in the sandbox with {how}{hint}: {said}")

    def _log_end(self) -> str:
        try:
            text = self.read(_LOG)[-2000:].decode(errors="replace").strip()
        except InvalidInputError as error:
            return str(error)
        return text or "it said nothing"


def available() -> tuple[str, ...]:
    """What can be kept from a process on this machine, of ``network``, ``processes`` and ``files``."""
    with Sandbox(require=()) as box:
        box.run("builtins:dict", {})
        return box.held


def _packages() -> list[str]:
    """Where Python finds packages: its own, this one's, and what ``PYTHONPATH`` names; not Airflow's folders."""
    ours = str(Path(__file__).resolve().parents[2])
    named = {path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    prefixes = (sys.prefix + os.sep, sys.base_prefix + os.sep)
    paths = [path for path in sys.path if path in named or path.startswith(prefixes)]
    return list(dict.fromkeys([ours, *(path for path in paths if os.path.exists(path))]))


def _python() -> list[str]:
    interpreter = os.path.dirname(os.path.realpath(sys.executable))
    places = [sys.prefix, sys.base_prefix, interpreter, *_packages(), *_MACHINE]
    return list(dict.fromkeys(os.path.realpath(place) if place != "/proc/self" else place for place in places))


def _limit(limits: Mapping[str, Any]) -> None:
    import resource

    cpu = math.ceil(limits["cpu_seconds"])
    for what, most in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (int(most), int(most)))


def main() -> int:
    """What the process does: give up its rights, only then import anything else, call, answer."""
    with open(_JOB) as file:
        request = json.load(file)
    _limit(request["limits"])
    held = confine(request["readable"], [os.getcwd(), "/dev/null"])
    missing = [name for name in request["require"] if name not in held]
    if missing:
        return _leave({"missing": missing}, 3)
    module, _, name = request["function"].partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(request["job"])
        return _leave({"value": value, "held": sorted(held)}, 0)
    except BaseException as error:  # a model may raise whatever it likes
        traceback.print_exc()
        return _leave({"error": f"{type(error).__name__}: {error}"[:2000]}, 1)


def _leave(result: Mapping[str, Any], code: int) -> int:
    with open(_RESULT, "w") as file:
        json.dump(result, file, allow_nan=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
