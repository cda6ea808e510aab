"""Linux's own means by which a process gives up what it may do, for itself and for good, without privileges.

``seccomp`` filters (seccomp(2)) keep it from the network, from other programs and from other processes; Landlock
(landlock(7), Linux 5.13) from files that were not named. Both work in a container that may not make namespaces.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable, Mapping

NETWORK, PROCESSES, FILES = "network", "processes", "files"
ALL = (NETWORK, PROCESSES, FILES)

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_EPERM, _ENOSYS = 1, 38
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_THREAD, _CLONE_NEWNET, _CLONE_NEWUSER = 0x00010000, 0x40000000, 0x10000000


def _numbers(text: str) -> dict[str, int]:
    words = text.split()
    return dict(zip(words[::2], map(int, words[1::2])))


# asm/unistd.h, by machine: the audit architecture, then the calls that are refused.
_ARCHITECTURES: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "x86_64": (
        0xC000003E,
        _numbers(
            """
            socket 41 connect 42 bind 49 io_uring_setup 425
            fork 57 vfork 58 clone 56 clone3 435 execve 59 execveat 322
            kill 62 tkill 200 tgkill 234 rt_sigqueueinfo 129 rt_tgsigqueueinfo 297 pidfd_send_signal 424
            ptrace 101 process_vm_readv 310 process_vm_writev 311 pidfd_open 434 pidfd_getfd 438
            chmod 90 fchmod 91 fchmodat 268 fchmodat2 452 chown 92 fchown 93 lchown 94 fchownat 260
            setxattr 188 lsetxattr 189 fsetxattr 190 open_by_handle_at 304
            bpf 321 userfaultfd 323 perf_event_open 298 keyctl 250 add_key 248 request_key 249
            mount 165 umount2 166 unshare 272 setns 308 chroot 161 pivot_root 155
            init_module 175 finit_module 313 kexec_load 246 reboot 169
            """
        ),
    ),
    "aarch64": (
        0xC00000B7,
        _numbers(
            """
            socket 198 connect 203 bind 200 io_uring_setup 425
            clone 220 clone3 435 execve 221 execveat 281
            kill 129 tkill 130 tgkill 131 rt_sigqueueinfo 138 rt_tgsigqueueinfo 240 pidfd_send_signal 424
            ptrace 117 process_vm_readv 270 process_vm_writev 271 pidfd_open 434 pidfd_getfd 438
            fchmod 52 fchmodat 53 fchmodat2 452 fchown 55 fchownat 54
            setxattr 5 lsetxattr 6 fsetxattr 7 open_by_handle_at 265
            bpf 280 userfaultfd 282 perf_event_open 241 keyctl 219 add_key 217 request_key 218
            mount 40 umount2 39 unshare 97 setns 268 chroot 51 pivot_root 41
            init_module 105 finit_module 273 kexec_load 104 reboot 142
            """
        ),
    ),
}
_READ_FILE, _READ_DIR, _EXECUTE = 1 << 2, 1 << 3, 1 << 0
# landlock_create_ruleset, landlock_add_rule, landlock_restrict_self have one number on every machine.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
#: Rights that each version of Landlock knows: all of the first, then refer (2), truncate (3), ioctl on devices (5).
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}


def confine(readable: Iterable[str], writable: Iterable[str]) -> set[str]:
    """Give up network, processes and files as far as this machine lets one; returns which of :data:`ALL` are gone.

    Only this thread and those it starts are confined, so call it while there is but one.

    :param readable: files and folders that may still be read
    :param writable: folders that may still be written to as well
    """
    if not sys.platform.startswith("linux"):
        return set()
    libc = ctypes.CDLL(None, use_errno=True)
    held = set()
    # A namespace of its own is a second wall; many containers do not allow it.
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        held.add(NETWORK)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return held
    if _landlock(libc, readable, writable):
        held.add(FILES)
    if _seccomp(libc):
        held |= {NETWORK, PROCESSES}
    return held


def _landlock(libc: ctypes.CDLL, readable: Iterable[str], writable: Iterable[str]) -> bool:
    version = libc.syscall(_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = _RIGHTS[min(version, 5)]
    handled = struct.pack("=Q", rights)
    ruleset = libc.syscall(_CREATE, handled, len(handled), 0)
    if ruleset < 0:
        return False
    try:
        looking = _READ_FILE | _READ_DIR | _EXECUTE
        for paths, allowed in ((readable, looking), (writable, rights & ~_EXECUTE)):
            for path in paths:
                if os.path.exists(path):
                    _allow(libc, ruleset, path, allowed)
        return libc.syscall(_RESTRICT, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, allowed: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # Of a single file only what concerns files can be allowed.
        known = allowed if os.path.isdir(path) else allowed & (_READ_FILE | _EXECUTE | 1 << 1)
        rule = struct.pack("=Qi", known, handle)
        if libc.syscall(_ADD, ruleset, 1, rule, 0) != 0:
            raise OSError(ctypes.get_errno(), f"Landlock does not take {path}")
    finally:
        os.close(handle)


def _seccomp(libc: ctypes.CDLL) -> bool:
    found = _ARCHITECTURES.get(platform.machine())
    if found is None:
        return False
    code = _program(*found)
    buffer = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    program = Program(len(code) // 8, ctypes.addressof(buffer))
    return libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0


def _program(architecture: int, calls: Mapping[str, int]) -> bytes:
    """The filter, in the classic BPF of seccomp(2): another architecture dies, a refused call fails with EPERM."""

    def load(offset: int) -> bytes:
        return struct.pack("=HBBI", 0x20, 0, 0, offset)

    def unless(opcode: int, value: int, skip: int) -> bytes:
        """Go on with the next instruction if it holds, else skip some."""
        return struct.pack("=HBBI", opcode, 0, skip, value)

    def answer(value: int) -> bytes:
        return struct.pack("=HBBI", 0x06, 0, 0, value)

    equal, at_least, has_bits = 0x15, 0x35, 0x45
    refuse, special = answer(_ERRNO | _EPERM), {"clone", "clone3", "tgkill"}
    code = [load(4), struct.pack("=HBBI", equal, 1, 0, architecture), answer(_KILL), load(0)]
    # The numbers of the x32 interface would pass as others.
    code += [unless(at_least, 0x40000000, 1), answer(_KILL)]
    for name, number in calls.items():
        if name not in special:
            code += [unless(equal, number, 1), refuse]
    # The C library asks clone3 first and takes clone where there is none; clone3's flags no filter can read.
    code += [unless(equal, calls["clone3"], 1), answer(_ERRNO | _ENOSYS)]
    code += [unless(equal, calls["clone"], 4), load(16), unless(has_bits, _CLONE_THREAD, 1), answer(_ALLOW), refuse]
    code += [unless(equal, calls["tgkill"], 4), load(16), unless(equal, os.getpid(), 1), answer(_ALLOW), refuse]
    code.append(answer(_ALLOW))
    return b"".join(code)
