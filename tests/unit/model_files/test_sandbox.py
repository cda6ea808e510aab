"""What runs in the sandbox reaches nothing: each test lets it try."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.provenance import sandbox
from airflow_mlops.provenance.sandbox import Limits, Sandbox

pytestmark = pytest.mark.usefixtures("isolation")

TRIES = """
import json, os, socket, subprocess, threading

def tries(job):
    found = {}
    def attempt(name, call):
        try:
            found[name] = repr(call())[:200]
        except BaseException as error:
            found[name] = type(error).__name__
    attempt("connect", lambda: socket.create_connection(("127.0.0.1", job["port"]), 2))
    attempt("unix socket", lambda: socket.socket(socket.AF_UNIX))
    attempt("program", lambda: subprocess.run(["true"]))
    attempt("fork", os.fork)
    attempt("kill", lambda: os.kill(os.getppid(), 0))
    attempt("parent's variables", lambda: open(f"/proc/{os.getppid()}/environ").read())
    attempt("secret", lambda: open(job["secret"]).read())
    attempt("write", lambda: open(job["secret"] + ".new", "w"))
    attempt("chmod", lambda: os.chmod(job["secret"], 0))
    attempt("passwords", lambda: open("/etc/passwd").read())
    attempt("shell", lambda: os.system(f"touch {job['secret']}.shell"))
    allowed = {}
    def thread():
        out = []
        worker = threading.Thread(target=lambda: out.append(1)); worker.start(); worker.join()
        return out
    calls = {"own file": lambda: open("mine", "w").write("x"), "thread": thread,
             "model": lambda: open(job["model"]).read(), "numpy": lambda: __import__("numpy").ones(2).sum()}
    for name, call in calls.items():
        try:
            allowed[name] = str(call())
        except BaseException as error:
            allowed[name] = repr(error)
    return {"refused": found, "allowed": allowed, "variables": sorted(os.environ)}

def links(job):
    os.symlink(job["secret"], "out.txt")
    os.mkfifo("pipe")

def hard(job):
    kind = job["kind"]
    if kind == "memory":
        return len(bytearray(3 << 30))
    if kind == "cpu":
        while True: pass
    if kind == "sleep":
        import time; time.sleep(60)
    if kind == "file":
        open("big", "wb").write(bytes(2 << 20))
    if kind == "exit":
        os._exit(7)
    if kind == "raise":
        raise SystemExit("gone")
    if kind == "nan":
        return float("nan")
    if kind == "object":
        return object()
    if kind == "forged":
        os.remove("result.json") if os.path.exists("result.json") else None
        os.symlink("/etc/hostname", "result.json"); os._exit(0)
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "tries_of_a_model.py").write_text(TRIES)
    path = os.pathsep.join([str(tmp_path / "lib"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "lib"), *sys.path])
    return "tries_of_a_model"


def test_nothing_but_its_own_can_be_reached(code, tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-worker")
    (tmp_path / "secret").write_text("hidden")
    (tmp_path / "model").write_text("weights")
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox([tmp_path / "model"]) as box:
        job = {"secret": str(tmp_path / "secret"), "model": str(tmp_path / "model"), "port": server.getsockname()[1]}
        found = box.run(f"{code}:tries", job)
    errors = {name: said for name, said in found["refused"].items() if name != "shell"}
    assert set(errors.values()) == {"PermissionError"}, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lib", "model", "secret"]
    assert found["allowed"] == {"own file": "1", "thread": "[1]", "model": "weights", "numpy": "2.0"}
    assert not [name for name in found["variables"] if "AWS" in name or "AIRFLOW" in name]
    assert box.held == ("files", "network", "processes")
    assert not box.folder.exists()


@pytest.mark.parametrize(
    ("kind", "limits", "message"),
    [
        ("memory", Limits(memory=2 << 30), "MemoryError"),
        ("cpu", Limits(cpu_seconds=1), "signal (9|24).*a limit on CPU"),
        ("sleep", Limits(wall_seconds=2), "stopped in the sandbox after 2 s"),
        ("file", Limits(file_bytes=1 << 20), "File too large|signal 25"),
        ("exit", Limits(), "exit code 7"),
        ("raise", Limits(), "SystemExit: gone"),
        ("nan", Limits(), "failed in the sandbox.*not JSON compliant"),
        ("object", Limits(), "failed in the sandbox.*not JSON serializable"),
        ("forged", Limits(), "failed in the sandbox"),
    ],
)
def test_limits_and_failures(code, kind, limits, message):
    with Sandbox(limits=limits) as box, pytest.raises(InvalidInputError, match=f"(?s){message}"):
        box.run(f"{code}:hard", {"kind": kind})


def test_what_it_left_is_read_without_following_links(code, tmp_path):
    (tmp_path / "secret").write_text("hidden")
    with Sandbox() as box:
        box.run(f"{code}:links", {"secret": str(tmp_path / "secret")})
        for name in ("out.txt", "pipe", "absent"):
            with pytest.raises(InvalidInputError, match=f"the sandbox left (no file )?{name}"):
                box.read(name)


def test_a_link_to_a_file_it_may_read_is_no_file_of_its_own(code, tmp_path):
    with Sandbox() as box:
        box.run(f"{code}:links", {"secret": "/usr"})
        os.link(box.folder / "log.txt", box.folder / "twice")
        with pytest.raises(InvalidInputError, match="the sandbox left twice"):
            box.read("twice")


def test_without_isolation_nothing_runs(code, monkeypatch, tmp_path):
    """A machine that cannot confine: the child's own means are taken away before it starts."""
    (tmp_path / "lib" / "sitecustomize.py").write_text(
        "import airflow_mlops.provenance._confine as c\nc._landlock = lambda *_: False\n"
    )
    with (
        Sandbox() as box,
        pytest.raises(InvalidInputError, match=r"cannot keep it from files.*name what to do without"),
    ):
        box.run(f"{code}:hard", {"kind": "none"})
    with Sandbox(require=("network", "processes")) as box:
        assert box.run(f"{code}:hard", {"kind": "none"}) is None
        assert box.held == ("network", "processes")


def test_an_unknown_requirement(code):
    with pytest.raises(InvalidInputError, match=r"cannot require \['everything'\]"):
        Sandbox(require=("everything",))


def test_airflow_s_folders_are_not_among_what_can_be_read():
    home = os.environ["AIRFLOW_HOME"]
    assert not [path for path in sandbox._python() if Path(home) in [Path(path), *Path(path).parents]]
