"""The system calls that make a virtual phone: unshare, mount, prctl, seccomp. Linux only.

Sources: unshare(2), mount(2), user_namespaces(7), pid_namespaces(7), seccomp(2), netdevice(7).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import signal
import socket
import struct
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
PHONE_NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_RELATIME = 1 << 21
_ST_RELATIME = 4096  # statvfs counts this one differently; the other flags have the same values

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_AF_VSOCK = 40
_EAFNOSUPPORT = 97
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
# AUDIT_ARCH and the number of socket(2), by machine.
_SOCKET_CALL = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int, what: str) -> None:
    """Raises OSError that names ``what``."""
    _check(_libc.unshare(flags), what)


def enter_user_namespace(flags: int, uid: int, what: str) -> None:
    """A new user namespace (and those in ``flags``) in which we are ``uid``, mapped to who we are.

    Raises OSError, EPERM where the machine does not allow it.
    """
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | flags, what)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1")
    Path("/proc/self/gid_map").write_text(f"{uid} {outer_gid} 1")


def mount(source: str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    _check(
        _libc.mount(source.encode(), bytes(target), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mounting {kind or source} on {target}",
    )


def bind(source: Path, target: Path) -> None:
    mount(str(source), target, "", MS_BIND)


def make_read_only(target: Path) -> None:
    """This mount point alone, not what else is mounted from the same place.

    The other flags are kept: a user namespace may not take those away that it inherited.
    """
    found = os.statvfs(target).f_flag
    kept = found & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
    if found & _ST_RELATIME:
        kept |= MS_RELATIME
    mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def isolate_mounts() -> None:
    """Nothing that is mounted from now on is seen outside of this mount namespace."""
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)


def loopback_up() -> None:
    """In a new network namespace even lo is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def die_with_parent() -> None:
    """SIGKILL for us when the thread that forked us ends. Lost when the user id changes: call it after."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def forbid_vsock() -> None:
    """socket(AF_VSOCK) fails from now on, for us and all children.

    adbd listens on vsock too, and vsock knows no network namespaces: in a virtual machine that
    would be an open shell towards the hypervisor.
    """
    machine = platform.machine()
    if machine not in _SOCKET_CALL:
        raise OSError(0, f"no seccomp filter for {machine}")
    arch, call = _SOCKET_CALL[machine]
    # seccomp_data: nr at 0, arch at 4, the low half of the first argument at 16.
    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | _EAFNOSUPPORT
    program = b"".join(
        struct.pack("HBBI", *line)
        for line in (
            (load, 0, 0, 4),
            (equal, 0, 5, arch),
            (load, 0, 0, 0),
            (equal, 0, 3, call),
            (load, 0, 0, 16),
            (equal, 0, 1, _AF_VSOCK),
            (give, 0, 0, refuse),
            (give, 0, 0, allow),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _check(
        _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0),
        "prctl(PR_SET_SECCOMP)",
    )
