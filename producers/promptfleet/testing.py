"""Test code that enqueues prompts without any server: a context manager and a pytest fixture.

    from promptfleet.testing import fake_fleet

    def test_summary():
        with fake_fleet(lambda prompt: f"Summary of {prompt.text[:20]}") as fleet:
            page = app.test_client().post("/summaries", data=article)
        fleet.assert_enqueued(tier="basic", metadata={"article": 7})

Under pytest the fixture `fake_promptfleet` is the same and needs no import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias

import orjson

from promptfleet.backends import install, uninstall
from promptfleet.handles import AsyncPromptJob, PromptJob
from promptfleet.memory import AsyncMemoryBackend, MemoryBackend
from promptfleet.requests import Defaults, utc_now
from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import (
    NO_USAGE,
    CacheOptions,
    JobError,
    JobKind,
    JobSpec,
    JobState,
    OnUnknown,
    Outcome,
    Usage,
)

CANNED = "This is a canned answer."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnqueuedPrompt:
    """A prompt that the code under test enqueued.

    Attributes:
        text: The prompt's text: of a chat, that of its last user message.
        messages: The messages of a chat, the system message included.
        options: The provider's parameters, e.g. `max_tokens`.
        deadline_s: Seconds from its acceptance to its deadline.
        stream: True if its tokens are read as they come.
    """

    id: uuid.UUID
    kind: JobKind
    tier: str
    model: str | None
    text: str
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    metadata: dict[str, Any]
    priority: int
    deadline_s: float
    idempotency_key: str | None
    callback_url: str | None
    cache: CacheOptions | None
    on_unknown: OnUnknown
    tenant: str
    stream: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer with more to it than a text.

    Attributes:
        response: The provider's whole response; by default made from the text.
    """

    text: str | None = CANNED
    response: Any = None
    finish_reason: str = "stop"
    usage: Usage = NO_USAGE
    cost_usd: Decimal | None = None
    model: str = "fake"


Reply: TypeAlias = str | Answer | Exception
Answers: TypeAlias = str | Answer | Callable[[EnqueuedPrompt], Reply] | None


class FakeFleet:
    """A fleet in memory.

    Attributes:
        answers: What answers each prompt as soon as it is accepted: a text, an `Answer`, or a
            function of the prompt that returns one of these, or an exception for a failure. None
            leaves prompts queued until `answer`, `fail` or `expire` is called.
        enqueued: The prompts that were accepted (and committed), in order.
    """

    def __init__(self, answers: Answers = CANNED, *, defaults: Defaults | None = None) -> None:
        self.answers = answers
        self.enqueued: list[EnqueuedPrompt] = []
        self.backend = MemoryBackend(defaults, accepted=self._accept)
        self.async_backend = AsyncMemoryBackend(self.backend)

    def answer(self, job: Job, reply: Reply = CANNED) -> None:
        """End a queued job with an answer, or with an exception as its failure.

        Raises:
            LookupError: There is no such job, or it is final.
        """
        if isinstance(reply, Exception):
            code = reply.code if isinstance(reply, ProviderError) else type(reply).__name__
            self.fail(job, code=code, message=str(reply))
            return
        answer = Answer(text=reply) if isinstance(reply, str) else reply
        outcome = Outcome(
            job_id=_id_of(job),
            fence=0,
            state=JobState.SUCCEEDED,
            text=answer.text,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
            cost_usd=answer.cost_usd,
            model=answer.model,
            provider="fake",
            deployment="fake",
            calls=1,
        )
        self._finish(outcome, answer.response or _response(answer))

    def fail(self, job: Job, *, code: str = "provider_error", message: str = "") -> None:
        """End a queued job with a failure.

        Raises:
            LookupError: There is no such job, or it is final.
        """
        error = JobError(code=code, message=message)
        self._finish(
            Outcome(job_id=_id_of(job), fence=0, state=JobState.FAILED, error=error, calls=1)
        )

    def expire(self, job: Job) -> None:
        """Let the deadline of a queued job pass.

        Raises:
            LookupError: There is no such job, or it is final.
        """
        self._finish(Outcome(job_id=_id_of(job), fence=0, state=JobState.EXPIRED))

    def assert_enqueued(
        self,
        text: str | None = None,
        *,
        tier: str | None = None,
        model: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        times: int | None = None,
    ) -> EnqueuedPrompt:
        """Assert that a prompt was enqueued that is like this, and return the first one.

        Args:
            text: The whole text.
            tier: The tier.
            model: The model that was asked for.
            metadata: Entries that its metadata have, among others.
            messages: All of its messages.
            options: Parameters that it has, among others.
            times: How many such prompts there are, from 1; by default at least one.

        Raises:
            AssertionError: Says what was enqueued instead.
        """
        wanted = {
            "text": text,
            "tier": tier,
            "model": model,
            "messages": None if messages is None else [dict(message) for message in messages],
        }
        exact = {name: value for name, value in wanted.items() if value is not None}
        found = [
            prompt
            for prompt in self.enqueued
            if all(getattr(prompt, name) == value for name, value in exact.items())
            and _holds(prompt.metadata, metadata)
            and _holds(prompt.options, options)
        ]
        if not found or times not in (None, len(found)):
            searched = {**exact, "metadata": metadata, "options": options}
            raise AssertionError(self._complaint(searched, len(found), times))
        return found[0]

    def assert_nothing_enqueued(self) -> None:
        """Assert that no prompt was enqueued.

        Raises:
            AssertionError: Says what was enqueued.
        """
        if self.enqueued:
            raise AssertionError(self._complaint({}, len(self.enqueued), 0))

    def _accept(self, specs: Sequence[JobSpec]) -> None:
        for spec in specs:
            prompt = _enqueued(spec)
            self.enqueued.append(prompt)
            if self.answers is not None:
                self.answer(prompt, self._reply(prompt))

    def _reply(self, prompt: EnqueuedPrompt) -> Reply:
        if not callable(self.answers):
            return self.answers or CANNED
        try:
            return self.answers(prompt)
        except ProviderError as error:  # others are mistakes in the test and shall be seen
            return error

    def _finish(self, outcome: Outcome, response: object = None) -> None:
        if not self.backend.finish(outcome, response=response):
            raise LookupError(f"job {outcome.job_id} is not queued")

    def _complaint(self, searched: Mapping[str, Any], found: int, times: int | None) -> str:
        wanted = ", ".join(f"{name}={v!r}" for name, v in searched.items() if v is not None)
        expected = "one" if times is None else str(times)
        lines = [f"expected {expected} prompt(s) with {wanted or 'anything'}, found {found} among:"]
        lines += [
            f"  {p.text!r} tier={p.tier} metadata={p.metadata} options={p.options}"
            for p in self.enqueued
        ] or ["  (nothing was enqueued)"]
        return "\n".join(lines)


Job: TypeAlias = EnqueuedPrompt | PromptJob | AsyncPromptJob | uuid.UUID | str


@contextlib.contextmanager
def fake_fleet(
    answers: Answers = CANNED,
    *,
    tiers: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    default_tier: str = "standard",
    now: Callable[[], dt.datetime] = utc_now,
) -> Iterator[FakeFleet]:
    """Let every client of this process, and the functions of `promptfleet`, need no server.

    Validation, idempotency keys, cancellation and `session=` behave as with servers.

    Args:
        answers: What answers each prompt; see `FakeFleet`.
        tiers: The tiers that exist; by default any.
        models: The models that exist; by default any.
        default_tier: The tier of prompts that name none.
        now: The time, for deadlines and timestamps.

    Example:
        >>> from promptfleet import enqueue_prompt
        >>> with fake_fleet(lambda prompt: prompt.text.upper()) as fleet:
        ...     print(enqueue_prompt("hello", tier="basic").result().text)
        ...     prompt = fleet.assert_enqueued("hello", tier="basic", times=1)
        HELLO
    """
    defaults = Defaults(
        tier=default_tier,
        tiers=None if tiers is None else tuple(tiers),
        models=None if models is None else tuple(models),
        now=now,
    )
    fleet = FakeFleet(answers, defaults=defaults)
    install(fleet)
    try:
        yield fleet
    finally:
        uninstall(fleet)


def _fixture() -> Iterator[FakeFleet]:
    """A fleet in memory for one test; set its `answers` to choose what it answers."""
    with fake_fleet() as fleet:
        yield fleet


with contextlib.suppress(ImportError):  # other test runners use the context manager
    import pytest

    fake_promptfleet = pytest.fixture(name="fake_promptfleet")(_fixture)


def _id_of(job: Job) -> uuid.UUID:
    if isinstance(job, uuid.UUID):
        return job
    return uuid.UUID(job) if isinstance(job, str) else job.id


def _holds(whole: Mapping[str, Any], part: Mapping[str, Any] | None) -> bool:
    return part is None or all(
        name in whole and whole[name] == value for name, value in part.items()
    )


def _enqueued(spec: JobSpec) -> EnqueuedPrompt:
    body: dict[str, Any] = orjson.loads(spec.request)
    messages: list[dict[str, Any]] = body.pop("messages", [])
    text = body.pop("prompt", None) or body.pop("input", None) or _last_text(messages)
    return EnqueuedPrompt(
        id=spec.id,
        kind=spec.kind,
        tier=spec.tier,
        model=spec.model,
        text=text,
        messages=messages,
        options=body,
        metadata=spec.metadata or {},
        priority=spec.priority,
        deadline_s=spec.deadline_s,
        idempotency_key=spec.idempotency_key,
        callback_url=spec.callback_url,
        cache=spec.cache,
        on_unknown=spec.on_unknown,
        tenant=spec.tenant,
        stream=spec.stream,
    )


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    for message in reversed(messages):
        if message["role"] != "user":
            continue
        content = message.get("content")
        if isinstance(content, str):
            return content
        if isinstance(content, list):
            return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return ""


def _response(answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    return {"object": "chat.completion", "model": answer.model, "choices": [choice]}
