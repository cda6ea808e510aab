"""Children never outlive the stack, and nobody else's process is ever touched."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from airflow_mlops.embedded import processes
from airflow_mlops.embedded.processes import Service, ServiceDiedError
from airflow_mlops.exceptions import InvalidInputError

# A service as unpleasant as they come: it ignores SIGTERM and starts a child in a session of its own.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""
# The same, but it ends at once and leaves its child behind.
ABANDONING = STUBBORN.removesuffix("time.sleep(600)\n")


def gone(pid: int, timeout: float = 8.0) -> bool:
    """Whether process ``pid`` ended within ``timeout`` seconds."""

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return processes.wait_until(ended, timeout=timeout)


def pids_in(path: Path) -> list[int]:
    assert processes.wait_until(lambda: path.exists() and len(path.read_text().split()) == 2, timeout=10)
    return [int(pid) for pid in path.read_text().split()]


def service(tmp_path: Path, code: str, *, grace: float = 0.5) -> tuple[Service, Path]:
    pids = tmp_path / "pids"
    command = [sys.executable, "-c", code, str(pids)]
    return Service("thing", command, root=tmp_path, env=dict(os.environ), grace=grace), pids


def test_stop_ends_a_tree_that_ignores_sigterm_and_left_its_session(tmp_path: Path) -> None:
    thing, path = service(tmp_path, STUBBORN)
    thing.start()
    pids = pids_in(path)
    thing.stop()
    assert all(gone(pid, 1) for pid in pids)
    assert not (tmp_path / "run" / "thing.json").exists()


def test_a_grandchild_left_behind_ends_with_the_service(tmp_path: Path) -> None:
    thing, path = service(tmp_path, ABANDONING)
    thing.start()
    pids = pids_in(path)
    assert all(gone(pid) for pid in pids)
    thing.stop()


def test_nothing_survives_when_the_starter_is_killed(tmp_path: Path) -> None:
    starter = textwrap.dedent(
        """
        import os, sys, time
        from pathlib import Path
        from airflow_mlops.embedded.processes import Service
        root = Path(sys.argv[1])
        Service("thing", [sys.executable, "-c", sys.argv[2], str(root / "pids")],
                root=root, env=dict(os.environ), grace=0.5).start()
        time.sleep(600)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", starter, str(tmp_path), STUBBORN])
    pids = pids_in(tmp_path / "pids")
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in pids)


def test_the_stop_signal_is_the_one_asked_for(tmp_path: Path) -> None:
    code = """
import signal, sys, time
def note(signum, frame):
    open(sys.argv[1] + ".got", "w").write(signal.Signals(signum).name)
    raise SystemExit(0)
signal.signal(signal.SIGINT, note); signal.signal(signal.SIGTERM, note)
open(sys.argv[1], "w").write("1 1")
time.sleep(600)
"""
    path = tmp_path / "pids"
    thing = Service(
        "thing",
        [sys.executable, "-c", code, str(path)],
        root=tmp_path,
        env=dict(os.environ),
        stop_signal=signal.SIGINT,
    )
    thing.start()
    pids_in(path)
    thing.stop()
    assert (tmp_path / "pids.got").read_text() == "SIGINT"


def test_a_service_that_ends_shows_the_end_of_its_log(tmp_path: Path) -> None:
    thing, _ = service(tmp_path, "print('the reason it ended'); raise SystemExit(7)")
    thing.start()
    with pytest.raises(ServiceDiedError, match=r"(?s)thing ended by itself with exit status 7.*the reason it ended"):
        thing.wait_healthy(lambda: False, timeout=10)
    thing.stop()


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    thing = Service("thing", ["/no/such/program"], root=tmp_path, env=dict(os.environ))
    thing.start()
    with pytest.raises(ServiceDiedError, match="cannot run /no/such/program"):
        thing.wait_healthy(lambda: False, timeout=10)
    thing.stop()


def test_a_service_that_never_gets_healthy_is_an_error(tmp_path: Path) -> None:
    thing, _ = service(tmp_path, "import time; time.sleep(600)")
    thing.start()
    try:
        with pytest.raises(ServiceDiedError, match="not healthy after 0 s"):
            thing.wait_healthy(lambda: False, timeout=0.2)
    finally:
        thing.stop()


def test_leftovers_are_stopped_only_when_their_start_time_matches(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    thing, path = service(tmp_path, STUBBORN)
    try:
        thing.start()
        pids = pids_in(path)
        # The id was given to somebody else since the record was written.
        record = {"pid": bystander.pid, "created": psutil.Process(bystander.pid).create_time() - 60}
        (tmp_path / "run" / "other.json").write_text(json.dumps(record))
        (tmp_path / "run" / "broken.json").write_text("{")
        assert processes.stop_leftovers(tmp_path) == ["thing"]
        assert all(gone(pid, 1) for pid in pids)
        assert bystander.poll() is None
        assert list((tmp_path / "run").glob("*.json")) == []
    finally:
        bystander.kill()
        bystander.wait()
        thing.stop()


def test_a_taken_port_names_who_has_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInputError, match=rf"port {port}.*process {os.getpid()}.*choose another port"):
            processes.require_free_port(port, "the test")
    assert processes.require_free_port(processes.free_port(), "the test")


def test_a_folder_is_held_by_one_process_and_released_by_its_death(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from airflow_mlops.embedded.processes import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InvalidInputError, match=rf"another demo \(process {holder.pid}\).*--root"):
        with processes.folder_lock(tmp_path):
            pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with processes.folder_lock(tmp_path):
        assert (tmp_path / "run" / "lock").read_text() == str(os.getpid())


def test_tail_gives_the_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("\n".join(str(number) for number in range(10_000)))
    assert processes.tail(path, 3) == "9997\n9998\n9999"
    assert processes.tail(tmp_path / "none") == ""


@pytest.mark.skipif(sys.platform != "linux", reason="proportional set sizes are Linux's")
def test_memory_counts_the_whole_tree(tmp_path: Path) -> None:
    code = "import time; block = bytearray(60_000_000); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert processes.wait_until(lambda: processes.memory_mb([process.pid]) > 57, timeout=10)
        assert processes.memory_mb([process.pid]) < 100
    finally:
        process.kill()
        process.wait()
    assert processes.memory_mb([process.pid]) == 0


def test_free_ports_are_different():
    """Asked for one after the other the same port can come twice, and Ray's parts would fight for it."""
    assert len(set(processes.free_ports(500))) == 500
