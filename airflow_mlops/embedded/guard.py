"""Runs one command so that nothing of it outlives the process that asked for it.

``python guard.py --grace SECONDS [--signal NAME] -- COMMAND...`` starts the command and waits. When the command
ends, when the guard gets SIGTERM or SIGINT, or when the guard's own parent disappears (even by SIGKILL), the
command gets SIGTERM or the signal named, then what is left of its whole process tree gets SIGKILL after the
grace. On Linux the guard is a subreaper: a grandchild that outlives its parent is handed to the guard, whatever
session it moved to, so the tree is always complete. The exit status is the command's own.

Standard library only, because one guard runs beside every service.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.1


def prctl(option: int, value: int) -> None:
    """Linux's ``prctl``; does nothing elsewhere, where the guard's polling is the only protection."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent(sig: int = signal.SIGKILL) -> None:
    """Ask the kernel to send ``sig`` to this process when the thread that created it ends."""
    prctl(_PR_SET_PDEATHSIG, sig)


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``, nearest first."""
    children: dict[int, list[int]] = {}
    if os.path.isdir("/proc/self"):
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/stat", "rb") as file:
                        # The command name in parentheses may itself hold spaces and parentheses.
                        parent = int(file.read().rpartition(b")")[2].split()[1])
                except (OSError, ValueError, IndexError):
                    continue
                children.setdefault(parent, []).append(int(entry))
    else:
        listing = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
        for line in listing.splitlines():
            child, parent = map(int, line.split())
            children.setdefault(parent, []).append(child)
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _kill_all(deadline: float) -> None:
    """SIGKILL everything below this process until nothing is left or ``deadline`` (monotonic) has passed."""
    while time.monotonic() < deadline:
        below = descendants(os.getpid())
        for pid in below:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def main() -> int:
    """Run the command line described in the module's docstring; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--grace", type=float, default=5.0)
    parser.add_argument("--signal", type=lambda name: signal.Signals[name], default=signal.SIGTERM)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    parent = os.getppid()
    stop = False

    def ask_stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, ask_stop)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sig, signal.SIG_DFL)
        die_with_parent()
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)

    status: int | None = None
    asked: float | None = None
    while status is None:
        try:
            # Any child: orphans handed to the guard have to be reaped too.
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == child:
            status = os.waitstatus_to_exitcode(raw)
            break
        if pid:
            continue
        if asked is None and (stop or os.getppid() != parent):
            asked = time.monotonic()
            os.kill(child, args.signal)
        if asked is not None and time.monotonic() - asked > args.grace:
            break
        time.sleep(_POLL_SECONDS)
    _kill_all(time.monotonic() + 10)
    if status is None:
        return 128 + signal.SIGKILL
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
