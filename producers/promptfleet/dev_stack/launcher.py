"""Run as a script between us and a child: set what only the child itself can set, then exec.

    python -I -S launcher.py PARENT_PID DEATH_SIGNAL IDENTITY COMMAND...

A script instead of subprocess' `preexec_fn`, which may deadlock in a process with threads.
IDENTITY is "same", "userns" (user 65534 of a new user namespace, for a server that refuses to
run as root: outside it the files stay root's) or "UID:GID" (become that user for good).
With IDENTITY "probe" it ends with 0 where "userns" would work.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

CANNOT_BECOME = 125
CANNOT_EXEC = 127

_CLONE_NEWUSER = 0x10000000  # linux/sched.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OVERFLOW_ID = 65534


def _enter_user_namespace() -> None:
    """Do as `unshare --user --map-user=65534 --map-group=65534` does."""
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"no user namespace: {os.strerror(code)}")
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{_OVERFLOW_ID} {uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{_OVERFLOW_ID} {gid} 1", encoding="ascii")


def _become(identity: str) -> None:
    if identity == "same":
        return
    if identity in {"userns", "probe"}:
        _enter_user_namespace()
        return
    uid, gid = (int(part) for part in identity.split(":"))
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def _die_with(parent: int, death_signal: int) -> None:
    """Have the kernel send `death_signal` when the thread that started us ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above: nobody will tell us
        sys.exit(CANNOT_EXEC)


def main() -> None:
    """Become who we are to be, tie our life to the parent's, and turn into the command."""
    parent, death_signal, identity, *command = sys.argv[1:]
    try:
        _become(identity)
    except OSError as error:
        sys.stderr.write(f"launcher: {error}\n")
        sys.exit(CANNOT_BECOME)
    if identity == "probe":
        return
    _die_with(int(parent), int(death_signal))  # last: a change of user clears it
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606  # no shell is what we want
    except OSError as error:
        sys.stderr.write(f"launcher: {command[0]}: {error.strerror}\n")
        sys.exit(CANNOT_EXEC)


if __name__ == "__main__":
    main()
