"""Conversations in memory, for users' own tests: what each succeeded job said and was told."""

from __future__ import annotations

import dataclasses
import datetime as dt

import orjson

from promptfleet_shared.jobs import Conversation, ConversationTurn, JobSpec, JobState, Outcome

_SYSTEM_ROLES = frozenset({"system", "developer"})


class MemoryConversations:
    """Keeps the conversations of one tenant; not safe to use from many threads by itself."""

    def __init__(self) -> None:
        """Remember nothing."""
        self._kept: dict[str, Conversation] = {}

    def add(self, spec: JobSpec, outcome: Outcome, now: dt.datetime) -> None:
        """Remember the turn of a job that succeeded, if it has a conversation."""
        memory_id = (spec.policy or {}).get("memory_id")
        if memory_id is None or outcome.state is not JobState.SUCCEEDED:
            return
        asked = orjson.loads(spec.request)["messages"]
        new = [message for message in asked if message.get("role") not in _SYSTEM_ROLES]
        answer = {"role": "assistant", "content": outcome.text}
        known = self._kept.get(memory_id)
        turns = known.turns if known else []
        turn = ConversationTurn(
            number=len(turns) + 1, job_id=spec.id, messages=[*new, answer], created_at=now
        )
        self._kept[memory_id] = Conversation(
            memory_id=memory_id,
            turns=[*turns, turn],
            summary=None,
            created_at=known.created_at if known else now,
            updated_at=now,
        )

    def read(self, memory_id: str) -> Conversation | None:
        """What is remembered under this id, as a snapshot; None if nothing is."""
        known = self._kept.get(memory_id)
        return None if known is None else dataclasses.replace(known, turns=list(known.turns))

    def forget(self, memory_id: str) -> bool:
        """Delete a conversation; false if there is none."""
        return self._kept.pop(memory_id, None) is not None
