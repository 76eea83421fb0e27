"""The embedded servers and the supervisor, with real servers and real processes."""

from __future__ import annotations

import io
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rich.console import Console

import promptfleet.dev_stack as public
import promptfleet.dev_stack.embedded as embedded_module
import promptfleet.dev_stack.postgres as postgres_module
from promptfleet.dev_stack import (
    Backoff,
    ChildExit,
    ChildSpec,
    ChildState,
    DataDirectoryError,
    DataDirectoryInUseError,
    DevStackError,
    EmbeddedPostgres,
    EmbeddedValkey,
    Hooks,
    PortTakenError,
    ServerStartError,
    Supervisor,
    free_port,
)
from promptfleet.dev_stack.data_directory import closed_to_others, nobody

DEADLINE_S = 20.0
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to change its user")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody reaps does not."""
    answer = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip()[:1] not in {"", "Z"}


@pytest.fixture
def orphans() -> Iterator[list[int]]:
    """Process ids that a failing test could leave running."""
    pids: list[int] = []
    yield pids
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)


def postgres_at(path: Path, *, settings: dict[str, str] | None = None) -> EmbeddedPostgres:
    return EmbeddedPostgres(path, durable=False, settings=settings)


def sql(server: EmbeddedPostgres, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def valkey_set(server: EmbeddedValkey, key: str, value: str) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.set(key, value)


def valkey_get(server: EmbeddedValkey, key: str) -> object:
    with redis.Redis.from_url(server.url) as client:
        return client.get(key)


@pytest.fixture
def held_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_all_is_sorted_and_complete() -> None:
    assert list(public.__all__) == sorted(public.__all__)
    assert all(hasattr(public, name) for name in public.__all__)


# --- Postgres


def test_postgres_is_configured_as_promised(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "pg", settings={"work_mem": "7MB"}) as server:
        rows = sql(
            server,
            "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'listen_addresses',"
            " 'unix_socket_directories', 'server_encoding', 'password_encryption', 'work_mem')",
        )
        assert dict(rows) == {  # type: ignore[arg-type]  # rows of two
            "fsync": "on",
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "server_encoding": "UTF8",
            "password_encryption": "scram-sha-256",
            "work_mem": "7168",
        }
        assert sql(server, "SELECT datcollate FROM pg_database WHERE datname='promptfleet'") == [
            ("C",)
        ]
        assert (tmp_path / "pg").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "pg" / "password").stat().st_mode & 0o777 == 0o600
        wrong = server.url.replace("+psycopg", "").replace(server.password, "wrong")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(wrong)


def test_postgres_keeps_data_and_url_over_restarts(tmp_path: Path) -> None:
    with postgres_at(tmp_path / "pg") as server:
        sql(server, "CREATE TABLE t AS SELECT 1 AS n")
        url, pid = server.url, server.pid
        server.restart()
        assert server.url == url
        assert server.pid != pid
        server.restart("immediate")
        assert sql(server, "SELECT n FROM t") == [(1,)]
    assert not server.running
    with postgres_at(tmp_path / "pg") as again:
        assert sql(again, "SELECT n FROM t") == [(1,)]


def test_postgres_survives_sigkill_and_a_stale_pid_file(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "pg") as server:
        sql(server, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")
        backends = [int(str(pid)) for (pid,) in sql(server, "SELECT pid FROM pg_stat_activity")]
        server.kill()
        assert not any(alive(pid) for pid in backends)
        stale = tmp_path / "pg" / "pgdata" / "postmaster.pid"
        lines = stale.read_text().splitlines()
        # The id was given to another process of ours meanwhile: Postgres alone would refuse.
        stale.write_text("\n".join([str(os.getppid()), *lines[1:]]))
        server.start()
        assert sql(server, "SELECT count(*) FROM t") == [(1000,)]


def test_postgres_that_can_not_start_says_why_and_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="shared_buffers"):
        postgres_at(tmp_path / "pg", settings={"shared_buffers": "nonsense"}).start()
    with postgres_at(tmp_path / "pg") as server:
        assert sql(server, "SELECT 1") == [(1,)]


def test_postgres_after_an_interrupted_initdb(tmp_path: Path) -> None:
    server = postgres_at(tmp_path / "pg")
    half_done = tmp_path / "pg" / "pgdata.new"
    half_done.mkdir(parents=True)
    (tmp_path / "pg" / "promptfleet.lock").touch()
    (half_done / "PG_VERSION").write_text("18\n")
    with server:
        assert sql(server, "SELECT 1") == [(1,)]


@pytest.mark.parametrize("settings", [{"a b": "1"}, {"work_mem": "1MB\nfsync = off"}])
def test_postgres_refuses_a_broken_setting(tmp_path: Path, settings: dict[str, str]) -> None:
    with pytest.raises(DevStackError, match="not a setting"):
        postgres_at(tmp_path / "pg", settings=settings).start()


def test_postgres_log_holds_no_values(tmp_path: Path) -> None:
    with postgres_at(tmp_path / "pg") as server:
        sql(server, "CREATE TABLE t (prompt text CHECK (prompt = ''))")
        with pytest.raises(psycopg.errors.CheckViolation):
            sql(server, "INSERT INTO t VALUES ('my secret prompt')")
        log = server.log_path.read_text()
    assert "violates check constraint" in log
    assert "secret" not in log


@root_only
def test_postgres_as_nobody_where_user_namespaces_are_forbidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if closed_to_others(postgres_module.postgres_bin()) is not None:
        pytest.skip("nobody can't reach the installed binaries; the next test is about that")
    open_way = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        open_way.chmod(0o755)
        account = nobody()
        identity = f"{account.pw_uid}:{account.pw_gid}"
        with monkeypatch.context() as patched:
            patched.setattr(postgres_module, "_identity", lambda: identity)
            with postgres_at(open_way / "pg") as server:
                sql(server, "CREATE TABLE t AS SELECT 1 AS n")
                assert server.pid is not None
                uids = subprocess.check_output(["ps", "-o", "uid=", "-p", str(server.pid)])
                assert int(uids) == account.pw_uid
        with postgres_at(open_way / "pg") as server:  # and back, with what is possible here
            assert sql(server, "SELECT n FROM t") == [(1,)]
    finally:
        shutil.rmtree(open_way)


@root_only
def test_postgres_as_nobody_names_the_closed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = nobody()
    monkeypatch.setattr(postgres_module, "_identity", lambda: f"{account.pw_uid}:{account.pw_gid}")
    tmp_path.chmod(0o700)
    with pytest.raises(DataDirectoryError, match="can't pass"):
        postgres_at(tmp_path / "pg").start()


# --- Valkey


def test_valkey_is_configured_as_promised(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "vk") as server:
        with redis.Redis.from_url(server.url) as client:
            expected = {
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
                "bind": "127.0.0.1",
            }
            assert {name: client.config_get(name)[name] for name in expected} == expected
        for name in ("password", "valkey.conf"):
            assert (tmp_path / "vk" / name).stat().st_mode & 0o777 == 0o600
        with (
            redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()


def test_valkey_keeps_data_over_restart_and_sigkill(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "a directory with spaces") as server:
        valkey_set(server, "k", "1")
        url = server.url
        server.restart()
        assert valkey_get(server, "k") == b"1"
        valkey_set(server, "k", "2")
        server.kill()
        assert not server.running
        server.start()
        assert server.url == url
        assert valkey_get(server, "k") == b"2"


def test_valkey_loses_its_data_when_told_to(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "vk") as server:
        valkey_set(server, "k", "1")
        url = server.url
        server.restart(lose_data=True)
        assert valkey_get(server, "k") is None
        assert server.url == url


# --- both servers

SERVERS: list[Callable[[Path], EmbeddedPostgres | EmbeddedValkey]] = [postgres_at, EmbeddedValkey]
both = pytest.mark.parametrize("make", SERVERS, ids=["postgres", "valkey"])
Make = Callable[[Path], EmbeddedPostgres | EmbeddedValkey]


@both
def test_two_at_once(tmp_path: Path, make: Make) -> None:
    with make(tmp_path / "a") as one, make(tmp_path / "b") as two:
        assert one.port != two.port
        assert one.running
        assert two.running


@both
def test_a_second_start_on_the_same_directory_is_refused(tmp_path: Path, make: Make) -> None:
    with make(tmp_path / "d") as first:
        pid = first.pid
        with pytest.raises(DataDirectoryInUseError, match=f"in use by process {os.getpid()}"):
            make(tmp_path / "d").start()
        with pytest.raises(DataDirectoryInUseError):
            first.start()
        assert first.pid == pid
    with make(tmp_path / "d") as after:
        assert after.running


@both
def test_a_taken_usual_port_is_avoided(
    tmp_path: Path, make: Make, held_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (EmbeddedPostgres, EmbeddedValkey):
        monkeypatch.setattr(kind, "usual_port", held_port)
    with make(tmp_path / "d") as server:
        chosen = server.port
        assert chosen != held_port
    with make(tmp_path / "d") as server:
        assert server.port == chosen


@both
def test_a_port_that_was_taken_while_stopped_is_chosen_anew(tmp_path: Path, make: Make) -> None:
    with make(tmp_path / "d") as server:
        before = server.port
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", before))
        holder.listen()
        with make(tmp_path / "d") as server:
            after = server.port
            assert after != before
    assert make(tmp_path / "d").port == after


@both
def test_a_port_that_is_taken_between_look_and_start_is_given_up(
    tmp_path: Path, make: Make, held_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = [held_port]
    monkeypatch.setattr(
        embedded_module,
        "choose_port",
        lambda *_preferred: choices.pop() if choices else free_port(),
    )
    with make(tmp_path / "d") as server:
        assert server.port != held_port
    assert not choices


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_port_that_was_insisted_on(
    tmp_path: Path, kind: type[EmbeddedPostgres | EmbeddedValkey], held_port: int
) -> None:
    with pytest.raises(PortTakenError, match=str(held_port)):
        kind(tmp_path / "d", port=held_port).start()
    wanted = free_port()
    with kind(tmp_path / "d", port=wanted) as server:
        assert server.port == wanted
        assert f":{wanted}/" in server.url


@both
def test_what_a_killed_parent_left_behind_is_ended(tmp_path: Path, make: Make) -> None:
    left = make(tmp_path / "d")
    left.start()
    process = left._process
    assert process is not None
    left._directory.release()  # the kernel does this when the parent dies
    with make(tmp_path / "d") as server:
        assert process.wait(timeout=DEADLINE_S) is not None
        assert server.running


def test_someone_elses_files_are_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(DataDirectoryError, match="other files"):
        EmbeddedValkey(tmp_path).start()
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@both
def test_an_unknown_stop_mode_stops_nothing(tmp_path: Path, make: Make) -> None:
    with make(tmp_path / "d") as server:
        with pytest.raises(DevStackError, match="no stop mode 'gently'"):
            server.stop("gently")
        assert server.running


def test_a_url_before_the_first_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DevStackError, match="never started"):
        _ = EmbeddedPostgres(tmp_path / "d").url


STACK_IN_A_PROCESS = """
import pathlib, signal, sys, threading
from promptfleet.dev_stack import ChildSpec, EmbeddedPostgres, EmbeddedValkey, Supervisor
base = pathlib.Path(sys.argv[1])
pg, vk = EmbeddedPostgres(base / "pg"), EmbeddedValkey(base / "vk")
supervisor = Supervisor()
def start():
    pg.start(), vk.start()
    supervisor.start(ChildSpec(name="sleeper", argv=["sleep", "600"]))
thread = threading.Thread(target=start)  # that this thread ends must not end the servers
thread.start(), thread.join()
print(pg.pid, vk.pid, supervisor.status()[0].pid, flush=True)
signal.pause()
"""


@linux_only
def test_everything_ends_with_a_killed_parent_and_the_data_survive(
    tmp_path: Path, orphans: list[int]
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", STACK_IN_A_PROCESS, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        orphans.extend(int(pid) for pid in parent.stdout.readline().split())
        assert [alive(pid) for pid in orphans] == [True, True, True]
        postgres = EmbeddedPostgres(tmp_path / "pg")
        sql(postgres, "CREATE TABLE t AS SELECT 1 AS n")  # the URL is known to other processes
        with pytest.raises(DataDirectoryInUseError, match=f"process {parent.pid}"):
            postgres.start()
    finally:
        parent.kill()
        parent.communicate()
    wait_for(lambda: not any(alive(pid) for pid in orphans))
    with postgres:
        assert sql(postgres, "SELECT n FROM t") == [(1,)]


# --- the supervisor


class Lines(io.TextIOBase):
    """What the console wrote, line by line, to wait for."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._arrived = threading.Condition()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        with self._arrived:
            self.seen.extend(line for line in text.split("\n") if line)
            self._arrived.notify_all()
        return len(text)

    def wait_for(self, part: str) -> str:
        def found() -> bool:
            return any(part in line for line in self.seen)

        with self._arrived:
            assert self._arrived.wait_for(found, DEADLINE_S), f"{part!r} not in {self.seen}"
            return next(line for line in self.seen if part in line)


class Stage:
    """A supervisor whose output and events a test can wait for."""

    def __init__(self, backoff: Backoff | None = None, *, colours: bool = False) -> None:
        self.lines = Lines()
        self.starts: queue.Queue[tuple[str, int]] = queue.Queue()
        self.exits: queue.Queue[ChildExit] = queue.Queue()
        self.supervisor = Supervisor(
            console=Console(file=self.lines, force_terminal=colours or None, width=40),  # type: ignore[arg-type]  # a TextIOBase is an IO[str] but for its stubs
            backoff=backoff or Backoff(first_s=0.01),
            hooks=Hooks(
                on_start=lambda name, pid: self.starts.put((name, pid)), on_exit=self.exits.put
            ),
        )

    def next_exit(self) -> ChildExit:
        return self.exits.get(timeout=DEADLINE_S)

    def next_start(self) -> tuple[str, int]:
        return self.starts.get(timeout=DEADLINE_S)


@pytest.fixture
def stages() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(backoff: Backoff | None = None, *, colours: bool = False) -> Stage:
        made.append(Stage(backoff, colours=colours))
        return made[-1]

    yield make
    for stage in made:
        stage.supervisor.kill()
        assert stage.supervisor.wait(DEADLINE_S)


def python(name: str, code: str, *, restart: bool = True) -> ChildSpec:
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    return ChildSpec(name=name, argv=argv, restart=restart)


DRAINS = """
import signal, sys
def drain(*_): print("drained"); sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print("ready")
signal.pause()
"""
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready to resist")
while True: signal.pause()
"""


def test_a_killed_child_is_restarted(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.supervisor.start(ChildSpec(name="worker", argv=["sleep", "600"]))
    name, pid = stage.next_start()
    os.kill(pid, signal.SIGKILL)
    gone = stage.next_exit()
    assert (gone.name, gone.pid, gone.returncode) == ("worker", pid, -signal.SIGKILL)
    assert not gone.expected
    _, successor = stage.next_start()
    assert successor != pid
    (status,) = stage.supervisor.status()
    assert (status.name, status.pid, status.restarts) == (name, successor, 1)
    assert status.state is ChildState.RUNNING
    stage.lines.wait_for("killed by signal 9; restarting in 0.01 s")


def test_back_off_grows_to_its_limit(stages: Callable[..., Stage]) -> None:
    stage = stages(Backoff(first_s=0.01, max_s=0.03))
    stage.supervisor.start(python("crasher", "raise SystemExit(3)"))
    exits = [stage.next_exit() for _ in range(4)]
    assert [gone.restart_in_s for gone in exits] == [0.01, 0.02, 0.03, 0.03]
    assert {gone.returncode for gone in exits} == {3}


def test_back_off_is_forgotten_after_a_healthy_run(stages: Callable[..., Stage]) -> None:
    stage = stages(Backoff(first_s=0.01, max_s=1.0, healthy_after_s=0.0))
    stage.supervisor.start(python("crasher", "raise SystemExit(3)"))
    assert [stage.next_exit().restart_in_s for _ in range(3)] == [0.01, 0.01, 0.01]


def test_the_default_back_off() -> None:
    delays = [Backoff().delay_s(failures) for failures in (1, 2, 3, 4, 5, 6, 10_000)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_one_that_may_end_is_not_restarted(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.supervisor.start(python("once", "print('done')", restart=False))
    gone = stage.next_exit()
    assert gone.expected
    assert gone.restart_in_s is None
    assert stage.supervisor.wait(DEADLINE_S)
    assert "once | done" in stage.lines.seen
    assert stage.supervisor.status()[0].state is ChildState.ENDED


def test_stop_drains_the_groups_in_reverse(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.supervisor.start(python("provider", DRAINS))
    stage.supervisor.start(python("w1", DRAINS), python("w2", DRAINS))
    for name in ("provider", "w1", "w2"):
        stage.lines.wait_for(f"{name:<8} | ready")
    assert stage.supervisor.stop(DEADLINE_S) == ()
    exits = [stage.next_exit() for _ in range(3)]
    assert {gone.name for gone in exits[:2]} == {"w1", "w2"}
    assert exits[2].name == "provider"
    assert all(gone.expected and gone.returncode == 0 for gone in exits)
    assert stage.lines.seen.count("provider | drained") == 1
    assert {status.pid for status in stage.supervisor.status()} == {None}
    assert stage.supervisor.stop() == ()
    with pytest.raises(DevStackError, match="stopping"):
        stage.supervisor.start(python("late", DRAINS))


def test_stop_kills_and_reports_who_does_not_stop(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.supervisor.start(python("good", DRAINS), python("bad", STUBBORN))
    stage.lines.wait_for("good | ready")
    stage.lines.wait_for("bad  | ready to resist")
    assert stage.supervisor.stop(0.5) == ("bad",)
    codes = {gone.name: gone.returncode for gone in (stage.next_exit(), stage.next_exit())}
    assert codes == {"good": 0, "bad": -signal.SIGKILL}


def test_stop_does_not_wait_for_a_back_off(stages: Callable[..., Stage]) -> None:
    stage = stages(Backoff(first_s=600.0, max_s=600.0))
    stage.supervisor.start(python("crasher", "raise SystemExit(1)"))
    assert stage.next_exit().restart_in_s == 600.0
    assert stage.supervisor.status()[0].state is ChildState.BACKING_OFF
    assert stage.supervisor.stop(DEADLINE_S) == ()
    assert stage.supervisor.wait(0)


def test_what_a_child_leaves_behind_is_killed(
    stages: Callable[..., Stage], orphans: list[int]
) -> None:
    stage = stages(Backoff(first_s=600.0, max_s=600.0))
    code = """
        import subprocess
        print("grandchild", subprocess.Popen(["sleep", "600"]).pid)
        raise SystemExit(1)
    """
    stage.supervisor.start(python("parent", code))
    stage.next_exit()
    orphans.append(int(stage.lines.wait_for("grandchild").split()[-1]))
    wait_for(lambda: not alive(orphans[0]))


def test_children_are_out_of_the_terminals_reach(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.supervisor.start(ChildSpec(name="worker", argv=["sleep", "600"]))
    _, pid = stage.next_start()
    assert os.getsid(pid) == pid
    assert os.getpgid(pid) == pid


@linux_only
def test_a_child_outlives_the_thread_that_started_it(stages: Callable[..., Stage]) -> None:
    stage = stages()
    code = """
        import signal
        signal.signal(signal.SIGUSR1, lambda *_: print("still here"))
        print("ready")
        while True: signal.pause()
    """
    thread = threading.Thread(target=stage.supervisor.start, args=(python("child", code),))
    thread.start()
    thread.join()
    stage.lines.wait_for("ready")
    wait_for(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())
    _, pid = stage.next_start()
    os.kill(pid, signal.SIGUSR1)
    stage.lines.wait_for("still here")
    assert stage.exits.empty()


def test_output_is_whole_plain_lines_off_a_terminal(stages: Callable[..., Stage]) -> None:
    stage = stages()
    code = r"print('\x1b[31mred\x1b[0m [bold]not markup[/bold] ' + 'x' * 100)"
    stage.supervisor.start(
        python("a", code, restart=False), ChildSpec(name="longer", argv=["sleep", "600"])
    )
    stage.next_exit()
    assert stage.lines.seen == ["a      | red [bold]not markup[/bold] " + "x" * 100]


def test_output_is_coloured_on_a_terminal(
    stages: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    stage = stages(colours=True)
    stage.supervisor.start(python("a", "print('hello')", restart=False))
    stage.next_exit()
    assert "\x1b[36ma | \x1b[0mhello" in stage.lines.seen


def test_a_console_that_went_away_does_not_block_the_children(
    stages: Callable[..., Stage],
) -> None:
    stage = stages()
    stage.lines.close()

    def broken(_text: str) -> int:
        raise BrokenPipeError

    stage.lines.write = broken  # type: ignore[method-assign]
    megabyte = "import sys; sys.stdout.write(('x' * 99 + chr(10)) * 10_000)"
    stage.supervisor.start(python("chatty", megabyte, restart=False))
    assert stage.next_exit().returncode == 0


def test_wrong_specs_are_refused_before_anything_starts(stages: Callable[..., Stage]) -> None:
    stage = stages()
    good = python("good", DRAINS)
    with pytest.raises(DevStackError, match="no program 'no-such-program'"):
        stage.supervisor.start(good, ChildSpec(name="bad", argv=["no-such-program"]))
    with pytest.raises(DevStackError, match="two children named 'good'"):
        stage.supervisor.start(good, good)
    assert stage.supervisor.status() == ()
