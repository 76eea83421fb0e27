"""Breaks a running fleet at random, heals it, waits, and counts what became of every prompt.

`make nemesis MINUTES=10`, or `python -m tests.faults.nemesis --minutes 10 --seed 7`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy.exc import DBAPIError
from tests.faults.catalogue import KINDS, LOSSES, NEEDS_DISK, PAUSES, SHORT_S, short_plan
from tests.faults.disk import SmallDisk, enter_mount_namespace
from tests.faults.faults import Strike, make_plan
from tests.faults.gathering import gather, read_log
from tests.faults.load import AsyncDoor, Door, Producer, SyncDoor
from tests.faults.orders import LONG_S, TENANTS, orders
from tests.faults.recorder import Recorder
from tests.faults.verdict import AFTER_DEADLINE_S, Evidence, Verdict, Violation, judge, listed
from tests.faults.witness import Witness
from tests.faults.world import IN_BATCH_S, World

PRODUCERS = 4
PROMPTS_PER_S = 8.0
CALLBACKS_WITHIN_S = 150.0
SLOWEST_SUBMISSION_S = 60.0
PLACES_WITHIN_S = 30.0
ENOUGH_USD = Decimal("0.01")
USD_A_SECOND = Decimal("0.00001")
"""Of the spender's budget, so that it is spent before the end."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Done:
    """A strike as it was carried out, in seconds of `time.monotonic`."""

    kind: str
    began: float
    ended: float | None = None


class Nemesis:
    """One run."""

    def __init__(
        self,
        world: World,
        *,
        seed: int,
        seconds: float,
        plan: Sequence[Strike],
        long_s: float,
        patient: bool = True,
    ) -> None:
        """Break nothing yet.

        Args:
            world: Which runs.
            seed: Of the orders.
            seconds: How long to submit, and to break.
            plan: What to break, and when.
            long_s: The usual deadline of a prompt.
            patient: As of `orders`.
        """
        self._world = world
        self._seconds = seconds
        self._plan = plan
        self._over = threading.Event()
        self.started = time.monotonic()
        self.done: list[Done] = []
        self.recorder = Recorder()
        self.canary = f"canary-{random.Random(f'{seed} canary').getrandbits(64):016x}"
        self._canaries = [self.canary, world.secret, world.postgres.password]
        self.witness = Witness(world, self._canaries)
        doors: list[type[SyncDoor | AsyncDoor]] = [SyncDoor] * (PRODUCERS - 1) + [AsyncDoor]
        self._producers = [
            Producer(
                f"producer-{number}",
                _opener(door, world.settings(TENANTS[number])),
                orders(
                    seed,
                    number,
                    canary=self.canary,
                    prompts_per_s=PROMPTS_PER_S,
                    long_s=long_s,
                    patient=patient,
                ),
                self.recorder,
                receiver_url=world.receiver.url,
                over=self._over,
            )
            for number, door in enumerate(doors)
        ]

    def run(self) -> Evidence:
        """Break, heal, wait, and gather."""
        self.started = time.monotonic()
        self.witness.start()
        for producer in self._producers:
            producer.thread.start()
        try:
            self._strike_all()
            time.sleep(max(0.0, self.started + self._seconds - time.monotonic()))
        finally:
            self._over.set()
            self._world.heal()
        healed_at = time.time()
        self._tell("all is healed")
        for producer in self._producers:
            producer.thread.join(SLOWEST_SUBMISSION_S)
            if producer.thread.is_alive():
                self.recorder.odd(f"{producer.thread.name} hangs in a call")
        self._wait_for_ends()
        self._wait_for_callbacks()
        parked = self._wait_for_places()
        self.witness.stop()
        pauses = [(d.began, d.ended or time.monotonic()) for d in self.done if d.kind in PAUSES]
        return gather(
            self._world,
            self.recorder,
            self.witness,
            pauses=pauses,
            losses=[d.began for d in self.done if d.kind in LOSSES],
            parked=parked,
            healed_at=healed_at,
            canaries=self._canaries,
        )

    def _strike_all(self) -> None:
        """Carry out begins and heals in the order of their times."""
        # What heals at the moment at which another begins, heals first.
        moments = [(s.at_s, 1, number) for number, s in enumerate(self._plan)]
        moments += [
            (s.at_s + s.lasts_s, 0 if s.lasts_s else 2, number)
            for number, s in enumerate(self._plan)
        ]
        struck: dict[int, Done] = {}
        for at_s, order, number in sorted(moments):
            time.sleep(max(0.0, self.started + at_s - time.monotonic()))
            fault = self._plan[number].fault
            if order != 1:
                fault.heal(self._world)
                struck[number].ended = time.monotonic()
            else:
                self._tell(f"{fault.kind}: {_parameters(fault)}")
                struck[number] = Done(kind=fault.kind, began=time.monotonic())
                self.done.append(struck[number])
                try:
                    fault.begin(self._world)
                except AssertionError as error:  # what it waited for never came
                    self.recorder.odd(f"{fault.kind}: {error}")

    def _wait_for_ends(self) -> None:
        """Until all jobs are final, or the last one's time is up."""
        left: list[Any] = [(-1, AFTER_DEADLINE_S)]
        while left[0][0] and left[0][1] > 0:
            with contextlib.suppress(DBAPIError):
                left = self._world.rows(
                    "SELECT count(*), coalesce(extract(epoch FROM max(deadline) +"
                    " :after * interval '1 second' - clock_timestamp()), 0)::float8"
                    " FROM jobs WHERE finished_at IS NULL",
                    after=AFTER_DEADLINE_S,
                )
            time.sleep(0.2)
        self._tell(f"{left[0][0]} jobs are not final")

    def _wait_for_callbacks(self) -> None:
        give_up_at = time.monotonic() + CALLBACKS_WITHIN_S
        left = -1
        while left and time.monotonic() < give_up_at:
            ((left,),) = self._world.rows(
                "SELECT count(*) FROM callbacks WHERE delivered_at IS NULL AND exhausted_at IS NULL"
            )
            time.sleep(0.2)
        self._tell(f"{left} callbacks are on their way")

    def _wait_for_places(self) -> int:
        """How many doorbells are parked though no job is left; stale ones take their turns, too."""
        give_up_at = time.monotonic() + PLACES_WITHIN_S
        while (parked := self.witness.parked()) and time.monotonic() < give_up_at:
            time.sleep(0.2)
        self._tell(f"{parked} doorbells are parked")
        return parked

    def _tell(self, what: str) -> None:
        print(f"{time.monotonic() - self.started:7.1f} s  {what}", flush=True)


def counts(nemesis: Nemesis, world: World, evidence: Evidence) -> dict[str, Any]:
    """What a run has been through."""
    jobs, recorder = evidence.jobs, nemesis.recorder
    logged = read_log(world.output)
    exits = collections.Counter(exit_.returncode for exit_ in world.exits)
    seen = sum(evidence.calls.values())
    return {
        "jobs": len(jobs),
        "states": dict(collections.Counter(job.state for job in jobs)),
        "failures": dict(collections.Counter(j.error for j in jobs if j.state == "failed")),
        "submissions": dict(
            collections.Counter(
                reply.value for e in recorder.entries.values() for reply in e.replies
            )
        ),
        "faults": len(nemesis.done),
        "faults by kind": dict(collections.Counter(done.kind for done in nemesis.done)),
        "claims": sum(job.fence - job.crashes for job in jobs),
        "lost leases": sum(job.crashes for job in jobs),
        "fenced writes": logged.fenced,
        "sweepers' verdicts": dict(logged.verdicts),
        "calls the provider saw": seen,
        "calls counted": sum(job.calls for job in jobs),
        "doubled calls counted (unknown outcome)": sum(job.unknown_calls for job in jobs),
        "prompts seen more than once": sum(calls > 1 for calls in evidence.calls.values()),
        "provider's batches": len(evidence.batches),
        "lines of batches": sum(evidence.lines.values()),
        "answers of batches": sum(job.by_batch for job in jobs),
        "waited for a limit": evidence.limited,
        "429s of the metered provider": evidence.throttled,
        "calls of the metered provider": evidence.metered,
        "most parked": nemesis.witness.most_parked,
        "most in flight of a key, of a tenant": nemesis.witness.most_in_flight,
        "bounds exceeded": [
            f"{one.at - nemesis.started:.0f} s: {one.running} of {one.of}"
            for one in evidence.exceeded
        ],
        "spent by the ledger, of the budget": f"{evidence.spent_usd} of {evidence.hard_usd}",
        "turns of conversations": len(evidence.turns),
        "cancellations": len(evidence.cancels),
        "callbacks": sum(len(job.callbacks) for job in jobs),
        "callbacks heard": len(evidence.heard),
        "last ends after all was healed": _last_ends(evidence),
        "callbacks exhausted": sum(done for job in jobs for _, _, done in job.callbacks),
        "results read by clients": len(evidence.readings),
        "slowest submission, s": round(recorder.slowest_s, 1),
        "worker exits": {str(code): count for code, count in sorted(exits.items())},
        "watchdog exits": logged.gave_up,
        "bugs logged": list(logged.bugs)[:5],
        "messages overheard": nemesis.witness.events,
        "keys searched": nemesis.witness.keys,
        "looks at final rows": nemesis.witness.looks,
    }


def _last_ends(evidence: Evidence) -> list[str]:
    """Which jobs were the last, and how many seconds after all was healed."""
    ends = sorted((job.finished_at or 0.0, job.name or "", job.state) for job in evidence.jobs)
    found = []
    for finished_at, name, state in ends[-3:]:
        entry = evidence.entries.get(name)
        ways = () if entry is None else (entry.ask.model, entry.ask.service, entry.ask.memory_id)
        way = " ".join(filter(None, ways))
        after_s = finished_at - (evidence.healed_at or 0.0)
        found.append(f"{after_s:.0f} s: {name} {way} {state}")
    return found


def own_trouble(
    nemesis: Nemesis, numbers: Mapping[str, Any], evidence: Evidence
) -> list[Violation]:
    """What would make a green verdict worth nothing, and what the log tells of."""
    found = [Violation(kind="unexpected", about=bug) for bug in numbers["bugs logged"]]
    if nemesis.recorder.slowest_s > SLOWEST_SUBMISSION_S:
        found.append(Violation(kind="unexpected", about="a submission took too long"))
    succeeded = numbers["states"].get("succeeded", 0)
    checks = {
        "hardly a job succeeded": succeeded > numbers["jobs"] / 2,
        "no message was overheard": numbers["messages overheard"] > 0,
        "no key was searched": numbers["keys searched"] > 0,
        "final rows were hardly looked at": numbers["looks at final rows"] > 2,
        "the provider saw nothing": numbers["calls the provider saw"] > 0,
        "no batch was answered": numbers["answers of batches"] > 0,
        "the metered provider saw nothing": numbers["calls of the metered provider"] > 0,
        "nothing was spent": evidence.spent_usd > 0,
        "no doorbell was parked": numbers["most parked"] > 0,
        "no conversation had a turn": numbers["turns of conversations"] > 0,
    }
    found += [Violation(kind="blind", about=what) for what, well in checks.items() if not well]
    return found


def show(numbers: Mapping[str, Any], verdict: Verdict, violations: Sequence[Violation]) -> None:
    """For people."""
    for name, value in numbers.items():
        text = value
        if isinstance(value, dict):
            text = ", ".join(f"{key} {count}" for key, count in sorted(value.items())) or "none"
        print(f"{name:>40}  {text}")
    for what, count in verdict.excused.items():
        print(f"{'excused':>40}  {count} {what}")
    kinds = collections.Counter(violation.kind for violation in violations)
    for kind in ("lost", "doubled", "unexpected", "uncounted", "callback", "leaked", "blind"):
        print(f"{kind:>40}  {kinds[kind]}")
    for line in listed(violations):
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every promise was kept, 1 if not."""
    flags = _flags(arguments)
    seed = random.SystemRandom().randrange(10**6) if flags.seed is None else flags.seed
    signal.signal(signal.SIGTERM, _interrupt)
    directory = flags.dir or Path(tempfile.mkdtemp(prefix="promptfleet-nemesis-"))
    seconds = SHORT_S if flags.short else flags.minutes * 60
    print(f"seed {seed}; logs are in {directory}", flush=True)
    disk, reason = _small_disk(directory / "disk", mebibytes=256 + int(seconds / 2))
    if disk is None:
        print(f"NOT POSSIBLE ON THIS MACHINE: {NEEDS_DISK} ({reason})", flush=True)
    kinds = {name: kind for name, kind in KINDS.items() if disk is not None or name != NEEDS_DISK}
    plan = short_plan() if flags.short else make_plan(seed, seconds, kinds)
    plan = [strike for strike in plan if strike.fault.kind in kinds]
    try:
        # A short run does not wait until what lost workers had reserved is free again, nor for the
        # batches that they had.
        hard_usd = ENOUGH_USD if flags.short else USD_A_SECOND * int(seconds)
        in_batch_s = 10.0 if flags.short else IN_BATCH_S
        with World(directory, disk=disk, hard_usd=hard_usd, in_batch_s=in_batch_s) as world:
            nemesis = Nemesis(
                world,
                seed=seed,
                seconds=seconds,
                plan=plan,
                long_s=LONG_S,
                patient=not flags.short,
            )
            evidence = nemesis.run()
            numbers = {"seed": seed, **counts(nemesis, world, evidence)}
    finally:
        _keep_log(disk, directory)
        _kill_children()
    verdict = judge(evidence)
    violations = [*verdict.violations, *own_trouble(nemesis, numbers, evidence)]
    show(numbers, verdict, violations)
    if disk is None:
        print(f"NOT POSSIBLE ON THIS MACHINE: {NEEDS_DISK} ({reason})")
    if flags.report is not None:
        report = {**numbers, "violations": [dataclasses.asdict(v) for v in violations]}
        flags.report.write_text(json.dumps(report, default=str), encoding="utf-8")
    print(f"seed {seed}: " + ("every promise was kept" if not violations else "NOT KEPT"))
    if violations:
        rows = "".join(f"{job}\n" for job in evidence.jobs)
        (directory / "jobs.txt").write_text(rows, encoding="utf-8")
        print(f"logs are in {directory}; again: make nemesis MINUTES={flags.minutes:g} SEED={seed}")
        return 1
    if flags.dir is None:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.nemesis", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="repeats a run's faults and submissions")
    parser.add_argument("--short", action="store_true", help="the fixed sample of the tests")
    parser.add_argument("--dir", type=Path, help="where logs and data go, and stay")
    parser.add_argument("--report", type=Path, help="writes the counts there, as JSON")
    return parser.parse_args(arguments)


def _small_disk(path: Path, *, mebibytes: int) -> tuple[SmallDisk | None, str]:
    try:
        enter_mount_namespace()
        return SmallDisk(path, mebibytes=mebibytes), ""
    except OSError as error:
        return None, str(error)


def _keep_log(disk: SmallDisk | None, directory: Path) -> None:
    """Take Postgres' log from the disk that goes with us."""
    if disk is not None:
        with contextlib.suppress(OSError):
            shutil.copy(disk.path / "postgres" / "postgres.log", directory)
        disk.unmount()


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _opener(door: type[SyncDoor | AsyncDoor], settings: Any) -> Any:
    def opened() -> Door:
        return door(settings)

    return opened


def _parameters(fault: object) -> str:
    assert dataclasses.is_dataclass(fault)
    names = [field.name for field in dataclasses.fields(fault) if field.compare]
    return ", ".join(f"{name} {_plain(getattr(fault, name))}" for name in names)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
