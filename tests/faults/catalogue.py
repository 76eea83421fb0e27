"""All kinds of faults, and the short sample of them that every test run goes through."""

from __future__ import annotations

from collections.abc import Mapping

from tests.faults import server_faults, wire_faults, worker_faults
from tests.faults.faults import Fault, Strike, one_after_the_other
from tests.faults.proxy import Mode, Reply

KINDS: Mapping[str, type[Fault]] = {
    kind.kind: kind
    for kind in (
        worker_faults.WorkersKilled,
        worker_faults.WorkersPaused,
        worker_faults.SweeperPaused,
        worker_faults.RollingRestart,
        worker_faults.ClockWrong,
        server_faults.PostgresRestarted,
        server_faults.PostgresAway,
        server_faults.SessionsTerminated,
        server_faults.PoolExhausted,
        server_faults.DiskFull,
        server_faults.ValkeyLost,
        server_faults.ValkeyFlushed,
        server_faults.ValkeyAway,
        server_faults.ValkeyClientsKilled,
        server_faults.DoorbellFlood,
        server_faults.ProviderStorm,
        server_faults.BatchTrouble,
        worker_faults.BatchMakerKilled,
        server_faults.ReceiverTrouble,
        wire_faults.PostgresBlackHole,
        wire_faults.ValkeyBlackHole,
        wire_faults.ProviderBlackHole,
        wire_faults.PostgresResets,
        wire_faults.ValkeyResets,
        wire_faults.ProviderResets,
        wire_faults.SlowWires,
        wire_faults.ReplyLost,
    )
}
PAUSES = frozenset({"workers_paused", "sweeper_paused"})
"""In which workers stand still."""
LOSSES = frozenset({"valkey_lost", "valkey_flushed", "valkey_away"})
"""In which Valkey forgets something."""
NEEDS_DISK = "disk_full"
SHORT_S = 26.0


def short_plan() -> list[Strike]:
    """The sample: begin and duration in seconds."""
    everywhere = wire_faults.CLIENTS
    return one_after_the_other(
        [
            (1.0, 5.0, worker_faults.ClockWrong(worker="worker_spare", offset_s=7200.0)),
            (1.5, 0.0, worker_faults.WorkersKilled(workers=("worker_basic", "worker_spare"))),
            (3.0, 0.0, server_faults.ValkeyLost()),
            (4.0, 0.0, server_faults.PostgresRestarted()),
            (5.0, 4.5, worker_faults.WorkersPaused(workers=("worker_advanced",))),
            (6.0, 1.5, wire_faults.ReplyLost(statement="finish", reply=Reply.RESET, times=3)),
            (8.0, 1.5, wire_faults.ReplyLost(statement="insert", reply=Reply.RESET, times=2)),
            (10.0, 0.0, server_faults.DoorbellFlood()),
            (11.0, 2.5, server_faults.DiskFull(new_segment=False)),
            (11.5, 3.0, server_faults.ProviderStorm(what="500")),
            (14.0, 0.0, worker_faults.BatchMakerKilled()),
            (14.5, 2.0, server_faults.PoolExhausted()),
            (15.0, 0.0, server_faults.ValkeyClientsKilled(rounds=3)),
            (17.0, 2.0, wire_faults.PostgresBlackHole(clients=("worker_basic",), mode=Mode.MUTE)),
            (17.5, 1.5, server_faults.ReceiverTrouble(status=500)),
            (19.2, 0.0, server_faults.ValkeyFlushed()),
            (19.5, 1.5, wire_faults.ProviderResets(clients=everywhere, rounds=2, refuse=False)),
            (21.0, 4.5, worker_faults.SweeperPaused(worker="worker_standard")),
        ]
    )
