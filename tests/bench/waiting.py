"""A thousand deferred trainings in one event loop against one poll per run, which is what providers do.

The stand-in API server and its RayJobs are in another process: what is measured is who waits. Both sides wait for the
same RayJobs one after the other, each with a fresh server: all run for a minute, then they end within another, one
after the other. On our side an end includes reading the result and the log's end, and deleting the RayJob; the other
side only sees the status.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.waiters import HOLD, INTERVAL

HERE = Path(__file__).resolve().parents[2]
COUNT = 1000


def measure(count: int = COUNT) -> list[dict[str, object]]:
    """Requests, latency, memory and processor time of both sides."""
    return _rows(count, _side("ours", count), _side("polls", count))


def _side(side: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, contextlib.ExitStack() as stack:
        server = stack.enter_context(_process("serve", folder, count))
        _heard(server)
        waiter = stack.enter_context(_process(side, folder, count))
        _heard(waiter)
        waiting = _asked(server, "count")
        ended = _asked(server, "finish")
        told = _heard(waiter)
        requests = _asked(server, "count")
    late = sorted(told["fired"][name] - at for name, at in ended.items())
    assert len(late) == count
    return {
        **told,
        "waiting": waiting,
        "requests": requests,
        "p99": statistics.quantiles(late, n=100)[-1],
        "median": statistics.median(late),
    }


@contextlib.contextmanager
def _process(role: str, folder: str, count: int) -> Iterator[subprocess.Popen[str]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    connection = {"conn_type": "kuberay", "extra": {"kube_config_path": str(Path(folder) / "kubeconfig")}}
    env |= {"AIRFLOW_HOME": str(Path(folder) / "airflow"), "AIRFLOW_CONN_BENCH": json.dumps(connection)}
    env |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "tests")])}
    # Where no cluster's own certificate is named, as of a server without TLS, clients load all public ones.
    env["SSL_CERT_FILE"] = str(Path(folder) / "ca.pem")
    (Path(folder) / "ca.pem").write_text(_one_certificate())
    with open(Path(folder) / f"{role}.log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.waiters", role, folder, str(count)],
            env=env,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield process
        except Exception:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])
            raise
        finally:
            process.kill()
            process.wait()


def _one_certificate() -> str:
    import certifi

    _, begin, rest = Path(certifi.where()).read_text().partition("-----BEGIN CERTIFICATE-----")
    inside, end, _ = rest.partition("-----END CERTIFICATE-----")
    return f"{begin}{inside}{end}\n"


def _heard(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process of the benchmark ended: {process.args!r}")
    return json.loads(line)


def _asked(process: subprocess.Popen[str], what: str) -> Any:
    assert process.stdin is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return _heard(process)


def _rows(count: int, ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, object]]:
    against = f"one poll per run every {INTERVAL:.0f} s with kubernetes_asyncio, one connection pool for all"

    def row(what: str, mine: float, other: float, goal: str = "", met: bool | str = "") -> dict[str, object]:
        return {
            "what": what,
            "ours": round(mine, 3),
            "otherwise": round(other, 3),
            "ratio": float(f"{mine / other:.2g}") if other else "",
            "against": against,
            "goal": goal,
            "met": met,
        }

    def looks(counts: dict[str, int]) -> int:
        return counts["shared"] + counts["single"]

    mine, p99 = ours["requests"]["shared"], ours["p99"]
    return [
        row(f"{count} trainings wait: requests to list and watch", mine, looks(theirs["requests"]), "at most 10")
        | {"met": mine <= 10},
        row("... all requests, ends included", ours["requests"]["all"], theirs["requests"]["all"]),
        row("... until they ended", ours["waiting"]["all"], theirs["waiting"]["all"]),
        row("... final status to fired event, p99, s", p99, theirs["p99"], "under 1 s", p99 < 1),
        row("... the same, median, s", ours["median"], theirs["median"]),
        row("... memory per waiting run, KiB", ours["bytes"] / 1024, theirs["bytes"] / 1024),
        row("... CPU s to begin", ours["cpu"]["begin"], theirs["cpu"]["begin"]),
        row(f"... CPU s of {HOLD:.0f} s of waiting", ours["cpu"]["hold"], theirs["cpu"]["hold"]),
        row("... CPU s of all ends", ours["cpu"]["end"], theirs["cpu"]["end"]),
    ]
