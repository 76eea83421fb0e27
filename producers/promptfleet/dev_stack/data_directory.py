"""A server's private directory: its lock, its password and the port it last used."""

from __future__ import annotations

import fcntl
import os
import pwd
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from promptfleet.dev_stack.errors import DataDirectoryError, DataDirectoryInUseError

_LOCK = "promptfleet.lock"
_TAIL_BYTES = 16_384


class DataDirectory:
    """A directory (0700) with the files (0600) that surround a server's own data."""

    def __init__(self, path: Path) -> None:
        """Nothing is touched before `acquire`."""
        self.path = path.absolute()
        self._lock: int | None = None

    def acquire(self) -> None:
        """Create the directory if missing and make sure that nobody else uses it.

        The lock is the kernel's: it is free as soon as its owner has ended, however it ended.

        Raises:
            DataDirectoryInUseError: Another server runs on it.
            DataDirectoryError: It belongs to someone else or can't be created.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
            self._check_content()
            self.path.chmod(0o700)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirectoryError(f"{self.path} can't be used: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(lock, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise DataDirectoryInUseError(
                f"{self.path} is in use by process {owner}: stop it or choose another directory",
                path=self.path,
            ) from error
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
        self._lock = lock

    def release(self) -> None:
        """Give the directory back; does nothing if it is not ours."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_owner(self) -> None:
        """A root that used a user's directory would leave files which the user can't open."""
        owner = self.path.stat().st_uid
        allowed = {os.geteuid()}
        if os.geteuid() == 0:
            allowed.add(nobody().pw_uid)
        if owner not in allowed:
            raise DataDirectoryError(
                f"{self.path} belongs to user {_user_name(owner)}: run as that user or choose"
                " another directory",
                path=self.path,
            )

    def _check_content(self) -> None:
        """A slip like `--data-dir ~` must not change the rights of someone's files."""
        if not (self.path / _LOCK).exists() and any(self.path.iterdir()):
            raise DataDirectoryError(
                f"{self.path} has other files in it: choose a new or empty directory",
                path=self.path,
            )

    def read(self, name: str) -> str | None:
        """The content of the small file `name`, None if there is none."""
        with suppress(FileNotFoundError):
            return (self.path / name).read_text(encoding="utf-8").strip()
        return None

    def read_int(self, name: str) -> int | None:
        """The number in the small file `name`, None if there is none."""
        text = self.read(name)
        return int(text) if text is not None and text.isdigit() else None

    def write(self, name: str, text: str) -> Path:
        """Replace the file `name` (0600) as a whole."""
        return write_private(self.path / name, text)

    def secret(self) -> str:
        """The server's password, made at first use; letters and digits only."""
        known = self.read("password")
        if known:
            return known
        made = secrets.token_hex(20)
        self.write("password", made)
        return made

    def open_log(self, name: str, *, max_bytes: int = 20_000_000) -> tuple[int, int]:
        """Open the log for appending and say where it ends; a large one is put aside once."""
        path = self.path / name
        with suppress(FileNotFoundError):
            if path.stat().st_size > max_bytes:
                path.replace(path.with_name(f"{name}.1"))
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return handle, os.fstat(handle).st_size

    def log_tail(self, name: str, *, since: int, lines: int = 20) -> str:
        """The last `lines` lines that the log got after the offset `since`."""
        with (self.path / name).open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(since, end - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])


def write_private(path: Path, text: str) -> Path:
    """Replace `path` by a file with this text that only its owner can read."""
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    return path


def nobody() -> pwd.struct_passwd:
    """The account without rights.

    Raises:
        DataDirectoryError: The machine has none.
    """
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise DataDirectoryError(
            "This machine has no user 'nobody' to run Postgres as; run as a user, not as root"
        ) from None


def hand_over(path: Path, uid: int, gid: int) -> None:
    """Give `path` and all below it to another user."""
    os.chown(path, uid, gid)
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            os.chown(Path(folder) / name, uid, gid, follow_symlinks=False)


def closed_to_others(path: Path) -> Path | None:
    """The first folder above `path` that users other than its owner can't pass."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
