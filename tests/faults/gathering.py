"""Gathers, once a run is over, what the verdict needs: rows, calls, callbacks, and counts."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from tests.faults.orders import SPENDER
from tests.faults.recorder import Recorder
from tests.faults.verdict import Evidence, Heard, JobRow, Limits, Turn
from tests.faults.witness import Witness
from tests.faults.world import MAX_CALLS, RETRY_ATTEMPTS, World

from promptfleet_workers.providers.simulated.answers import prompt_hash

_ROWS = """
SELECT j.id, j.metadata ->> 'name' AS name, j.state, j.fence, j.attempt, j.deferrals, j.crashes,
       j.calls, j.unknown_calls, j.lease_owner IS NOT NULL AS held,
       extract(epoch FROM j.deadline)::float8 AS deadline,
       extract(epoch FROM j.finished_at)::float8 AS finished_at,
       coalesce(r.error ->> 'code', j.last_error ->> 'code') AS error,
       coalesce(r.rows, 0)::int AS results, r.state AS result_state, r.text AS result_text,
       r.error ->> 'code' AS result_error, r.attempts AS result_attempts, r.calls AS result_calls,
       coalesce(l.calls, 0)::int AS paid, coalesce(l.unknown_calls, 0)::int AS paid_unknown,
       coalesce(c.callbacks, '[]') AS callbacks, c.event,
       r.decision -> 'service' ->> 'way' IS NOT DISTINCT FROM 'batch' AS by_batch,
       concat(r.error::text, j.last_error::text, c.errors) AS errors
  FROM jobs j
  LEFT JOIN (SELECT job_id, count(*) OVER (PARTITION BY job_id) AS rows, state, text, error,
                    attempts, calls, decision FROM results) r ON r.job_id = j.id
  LEFT JOIN (SELECT job_id, sum(calls) AS calls, sum(unknown_calls) AS unknown_calls
               FROM ledger GROUP BY job_id) l ON l.job_id = j.id
  LEFT JOIN (SELECT job_id, min(event) AS event, string_agg(last_error, ' ') AS errors,
                    json_agg(json_build_array(id, delivered_at IS NOT NULL,
                                              exhausted_at IS NOT NULL)) AS callbacks
               FROM callbacks GROUP BY job_id) c ON c.job_id = j.id
"""
_SPENT = """
SELECT coalesce(sum(coalesce(cost_usd, at_most_usd, estimated_usd)), 0) FROM ledger
 WHERE tenant = :tenant
"""
_LIMITED = "SELECT count(*) FROM results WHERE decision ? 'limits'"
_TURNS = "SELECT tenant, memory_id, n, job_id FROM conversation_turns ORDER BY 1, 2, 3"
_EVENT = re.compile(r"^(worker_\w+) +\| (\{.*\})$", re.MULTILINE)


def gather(
    world: World,
    recorder: Recorder,
    witness: Witness,
    *,
    pauses: Sequence[tuple[float, float]],
    losses: Sequence[float],
    parked: int,
    healed_at: float,
    canaries: Sequence[str],
) -> Evidence:
    """The evidence; the world is healed, and at rest."""
    stats, metered = world.provider.stats(), world.metered.stats()
    texts = {entry.ask.text for entry in recorder.entries.values()}
    keys = {text: prompt_hash([{"role": "user", "content": text}]) for text in texts}
    calls = stats["calls_by_prompt"] | metered["calls_by_prompt"]
    last_calls = stats["last_call_by_prompt"] | metered["last_call_by_prompt"]
    batches = world.batches()
    for message in recorder.messages:
        witness.search("an error that a producer was told", message.encode())
    bodies = [(body.id, body.body) for heard in world.delivered.values() for body in heard]
    for _, body in bodies:
        witness.search("the body of a callback", body)
    return Evidence(
        limits=Limits(max_calls=MAX_CALLS, retry_attempts=RETRY_ATTEMPTS),
        entries=recorder.entries,
        jobs=[_job(row._mapping, canaries) for row in world.rows(_ROWS)],
        cancels=recorder.cancels,
        tried_cancels=recorder.tried_cancels,
        readings=recorder.readings,
        changed=witness.changed,
        calls={text: calls[key] for text, key in keys.items() if key in calls},
        last_calls={text: last_calls[key] for text, key in keys.items() if key in last_calls},
        pauses=pauses,
        losses=losses,
        parked=parked,
        exceeded=witness.exceeded,
        batches=collections.Counter(name for name, _ in batches),
        lines=collections.Counter(line for _, lines in batches for line in lines),
        turns=[_turn(row) for row in world.rows(_TURNS)],
        spent_usd=world.rows(_SPENT, tenant=SPENDER)[0][0],
        hard_usd=world.hard_usd,
        throttled=metered["rejected"].get("429", 0),
        limited=world.rows(_LIMITED)[0][0],
        metered=sum(metered["calls_by_prompt"].values()),
        healed_at=healed_at,
        clock_offset=time.time() - time.monotonic(),
        heard=[_heard(message_id, body) for message_id, body in bodies],
        leaks=sorted(witness.leaks),
        oddities=recorder.oddities,
    )


def _job(row: Mapping[str, Any], canaries: Sequence[str]) -> JobRow:
    values = dict(row)
    errors = values.pop("errors") or ""
    values["callbacks"] = [(uuid.UUID(id_), *ends) for id_, *ends in values["callbacks"]]
    return JobRow(**values, leaks=any(canary in errors for canary in canaries))


def _turn(row: Any) -> Turn:
    return Turn(talk=(row.tenant, row.memory_id), n=row.n, job_id=row.job_id)


def _heard(message_id: str, body: bytes) -> Heard:
    data = orjson.loads(body)["data"]
    job_id = uuid.UUID(data.get("job_id") or data["id"])
    return Heard(message_id=message_id, job_id=job_id, state=data["state"])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """What the workers' log lines add up to.

    Attributes:
        fenced: Writes that the fence refused; repeats of one whose reply was lost are among them.
        verdicts: Of sweepers, by their names.
        gave_up: How often a watchdog ended its worker.
        bugs: Events that tell of a bug.
    """

    fenced: int
    verdicts: Mapping[str, int]
    gave_up: int
    bugs: Sequence[str]


def read_log(text: str) -> Logged:
    """Add up what workers logged."""
    fenced = gave_up = 0
    verdicts: collections.Counter[str] = collections.Counter()
    bugs = []
    for _, line in _EVENT.findall(text):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        name = event.get("event")
        if name in {"JobsFinished", "JobsReleased"}:
            fenced += int(event["fenced"])
        elif name == "Swept":
            verdicts.update(event["verdicts"])
        elif name == "watchdog_gave_up":
            gave_up += 1
        elif name in {"call_crashed", "callback_broke"} or "never retrieved" in str(name):
            bugs.append(line)
    return Logged(fenced=fenced, verdicts=verdicts, gave_up=gave_up, bugs=bugs)
