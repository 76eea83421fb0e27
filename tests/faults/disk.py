"""A small disk that can be filled: a tmpfs in a mount namespace of this process's own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path

_CLONE_NEWNS = 0x00020000  # linux/sched.h
_CLONE_NEWUSER = 0x10000000
_MS_PRIVATE_ALL = 0x4000 | 0x40000  # linux/mount.h: MS_REC and MS_PRIVATE
_MNT_DETACH = 2
MEBIBYTE = 1024 * 1024


class SmallDisk:
    """A mounted tmpfs; it goes with the last process of the namespace, however that ends."""

    def __init__(self, path: Path, *, mebibytes: int) -> None:
        """Mount it; `enter_mount_namespace` comes first.

        Raises:
            OSError: This machine does not let us.
        """
        self.path = path
        self.mebibytes = mebibytes
        path.mkdir(parents=True, exist_ok=True)
        _mount(b"tmpfs", path, b"tmpfs", 0, f"size={mebibytes}m,mode=0755".encode())
        self._ballast = path / "ballast"

    @property
    def free(self) -> int:
        """Bytes that still fit."""
        room = os.statvfs(self.path)
        return room.f_bavail * room.f_frsize

    def fill(self) -> int:
        """Leave no room at all; returns how many bytes that took."""
        written = 0
        with self._ballast.open("ab", buffering=0) as file:
            for size in (MEBIBYTE, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        written += file.write(bytes(size)) or 0
        return written

    def empty(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Give it up, with all that is on it, as soon as nobody uses it any more."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.umount2(os.fsencode(self.path), _MNT_DETACH)


def enter_mount_namespace() -> None:
    """Give this process, and those that it will start, mounts of its own.

    Only at the start of a process: threads that run already stay outside.

    Raises:
        OSError: This machine does not let us.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, f"no tmpfs in a namespace on {sys.platform}")
    if os.geteuid() == 0:
        _unshare(_CLONE_NEWNS)
    else:
        uid, gid = os.geteuid(), os.getegid()
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1", encoding="ascii")
    _mount(b"none", Path("/"), None, _MS_PRIVATE_ALL, None)


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        _raise("unshare")


def _mount(source: bytes, target: Path, kind: bytes | None, flags: int, data: bytes | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data) != 0:
        _raise("mount")


def _raise(what: str) -> None:
    code = ctypes.get_errno()
    raise OSError(code, f"{what}: {os.strerror(code)}")
