"""Put what a conversation remembers before a job's new turn; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from promptfleet_shared.jobs import ClaimedJob, TurnTaken
from promptfleet_shared.policies.conversations import MemorySection, MemoryStrategy
from promptfleet_shared.store.conversations import NewSummary, Recollection
from promptfleet_workers.context import choosing
from promptfleet_workers.context.chats import read_chat, summary_turn
from promptfleet_workers.context.errands import Answers, Errand, summary_errand
from promptfleet_workers.context.estimates import Estimates
from promptfleet_workers.context.turns import SYSTEM_ROLES, transcript
from promptfleet_workers.providers.protocol import Completion
from promptfleet_workers.providers.responses import read_json, write_json

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewTurn:
    """What a job says in its conversation: its messages without the system's, as JSON."""

    memory_id: str
    messages: bytes

    def answered(self, completion: Completion) -> TurnTaken:
        """The turn with its answer."""
        answer = write_json(assistant_message(completion))
        return TurnTaken(self.memory_id, self.messages[:-1] + b"," + answer + b"]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """A request with what was said before.

    Attributes:
        errand: A summary that is due; nothing waits for it.
        summary: One that was made and is to be kept.
        facts: For the job's `decision`.
    """

    request: str
    turn: NewTurn | None
    errand: Errand | None = None
    summary: NewSummary | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def remember(
    job: ClaimedJob,
    memory_id: str,
    recollection: Recollection,
    *,
    request: str,
    section: MemorySection,
    estimates: Estimates,
    model: str,
    answers: Answers,
) -> Remembered:
    """The request with as much of its conversation as it may have.

    Args:
        job: Whose turn it is.
        memory_id: Of its conversation.
        recollection: What is known of it.
        request: What is to be sent for the job alone.
        section: How much of it is wanted.
        estimates: Counts tokens.
        model: Whose tokens.
        answers: What is known of errands.
    """
    chat = read_chat(request)
    asked = chat if request is job.request else read_chat(job.request)
    if chat is None or asked is None:
        return Remembered(request=request, turn=None)
    said: list[tuple[int, list[Message]]] = [
        (n, m) for n, m in read_json(recollection.said.encode())
    ]
    past = _Past(
        job, memory_id, recollection, section=section, estimates=estimates, model=model, said=said
    )
    if section.strategy is MemoryStrategy.SUMMARY:
        past.summarise(answers)
    before = past.messages()
    new = [message for message in asked.messages if message.get("role") not in SYSTEM_ROLES]
    return Remembered(
        request=chat.with_messages(_put_before(chat.messages, before)) if before else request,
        turn=NewTurn(memory_id=memory_id, messages=write_json(new)) if new else None,
        errand=past.errand,
        summary=past.new_summary,
        facts={"turns": past.kept, "of": recollection.turns, **past.facts},
    )


class _Past:
    """What was said, and how much of it is told."""

    def __init__(
        self,
        job: ClaimedJob,
        memory_id: str,
        recollection: Recollection,
        *,
        section: MemorySection,
        estimates: Estimates,
        model: str,
        said: list[tuple[int, list[Message]]],
    ) -> None:
        self.errand: Errand | None = None
        self.new_summary: NewSummary | None = None
        self.facts: dict[str, Any] = {}
        self.kept = 0
        self._job = job
        self._memory_id = memory_id
        self._known = recollection.summarised
        self._summary = recollection.summary
        self._section = section
        self._estimates = estimates
        self._model = model
        self._said = said
        self._sizes = [self._size(messages) for _, messages in said]

    def summarise(self, answers: Answers) -> None:
        """Let the older half of what is too much be summarised; nobody waits for that."""
        section = self._section
        if sum(self._sizes) <= section.summarization_threshold:
            return
        stays = choosing.newest(self._sizes, section.summarization_threshold // 2)
        count = len(self._said) - len(stays)
        old = [message for _, messages in self._said[:count] for message in messages]
        told = summary_turn(self._summary) if self._summary else []
        errand = summary_errand(
            self._job,
            transcript([*told, *old]),
            tier=self._job.tier,
            model=section.summarization_model or self._job.model,
            tokens=section.summary_tokens,
        )
        answer = answers.get(errand.key)
        if errand.key not in answers:
            self.errand = errand
        elif answer is None or not answer.text:
            self.facts["summary"] = "failed"
        else:
            self._keep(answer.text, count)

    def messages(self) -> list[Message]:
        """What is told of it: the summary, and the newest turns beside it."""
        told = summary_turn(self._summary) if self._summary else []
        room = self._section.max_tokens - self._size(told)
        if room < 0:
            told, room = [], self._section.max_tokens
        kept = choosing.newest(self._sizes, room)
        self.kept = len(kept)
        if told:
            self.facts["summarised"] = self.new_summary.up_to if self.new_summary else self._known
        return [*told, *(message for n in kept for message in self._said[n][1])]

    def _keep(self, summary: str, count: int) -> None:
        self.new_summary = NewSummary(
            job_id=self._job.id,
            tenant=self._job.tenant,
            memory_id=self._memory_id,
            summary=summary,
            known=self._known,
            up_to=self._said[count - 1][0],
        )
        self._summary = summary
        self._said, self._sizes = self._said[count:], self._sizes[count:]

    def _size(self, messages: Sequence[Message]) -> int:
        return sum(self._estimates.message(message, self._model) for message in messages)


def _put_before(own: Sequence[Message], before: Sequence[Message]) -> list[Message]:
    """Behind the system messages that a request begins with."""
    at = next(
        (n for n, message in enumerate(own) if message.get("role") not in SYSTEM_ROLES), len(own)
    )
    return [*own[:at], *before, *own[at:]]


def assistant_message(completion: Completion) -> dict[str, Any]:
    """An answer as a message of the chat that goes on with it."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.text}
    try:
        data = read_json(completion.response)
    except ValueError:
        return message
    if not isinstance(data, dict):
        return message
    choices, content = data.get("choices"), data.get("content")
    calls: list[Any] = []
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        answer = choices[0].get("message")
        given = answer.get("tool_calls") if isinstance(answer, dict) else None
        calls = given if isinstance(given, list) else []
    elif isinstance(content, list):
        calls = [_call(block) for block in content if _is_tool_use(block)]
    if calls:
        message["tool_calls"] = calls
    elif completion.text is None:
        message["content"] = ""
    return message


def _is_tool_use(block: object) -> bool:
    return isinstance(block, dict) and block.get("type") == "tool_use"


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    """Anthropic's use of a tool, as OpenAI's chats have it."""
    arguments = write_json(block.get("input") or {}).decode()
    function = {"name": block.get("name"), "arguments": arguments}
    return {"id": block.get("id"), "type": "function", "function": function}
