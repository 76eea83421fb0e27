"""Who has to be counted, what becomes of who has to wait, and what is learned on the way."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.chats import claimed

from promptfleet_shared.errors import StoreUnavailableError
from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import JobError, Usage
from promptfleet_shared.store.conversations import Recollection
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.errands import Ended
from promptfleet_shared.tokens import TokenCounter
from promptfleet_workers.context.errands import Answers, Errand
from promptfleet_workers.context.estimates import Estimates
from promptfleet_workers.context.fitter import Fitter
from promptfleet_workers.context.remembering import assistant_message
from promptfleet_workers.context.windows import windows_of
from promptfleet_workers.endings import Endings
from promptfleet_workers.providers.protocol import Completion, Provider
from promptfleet_workers.routing import Router
from promptfleet_workers.work import Batch, Work

FLEET = parse_fleet("""
default_tier = "basic"
[tiers.basic]
models = ["narrow", "wide"]
[tiers.large]
models = ["wide"]
[tiers.open]
models = ["own"]
[models.narrow]
context_window = 1000
deployments = [{ base_url = "http://n", model = "gpt-4o-mini" }]
[models.wide]
context_window = 4000
max_output_tokens = 1000
deployments = [{ base_url = "http://w", model = "some-llama" }]
[models.own]
price_as = "free"
deployments = [{ base_url = "http://o", model = "gpt-4o" }]
[context]
policy = "summarize"
summary_tier = "open"
summary_tokens = 100
reserve_output_tokens = 200
""")
COUNTER = TokenCounter()


class RecordingEndings:
    """Remembers what became of works."""

    def __init__(self) -> None:
        self.given_back: list[tuple[Work, float, bool]] = []
        self.asleep: list[Work] = []
        self.failed: list[tuple[Work, JobError]] = []
        self.counted: Any = None

    def give_back(
        self, work: Work, delay_s: float, *, counts: bool, waits_turn: bool = False
    ) -> None:
        work.ended = True
        self.asleep += [work] * waits_turn
        self.given_back.append((work, delay_s, counts))

    def fail(self, work: Work, error: JobError) -> None:
        work.ended = True
        self.failed.append((work, error))

    def given_up(self, work: Work) -> bool:
        return work.ended


@dataclasses.dataclass
class Database:
    """Answers every statement with the same."""

    answer: object = None

    async def insist(self, _: object, *, patience_s: float) -> object:
        assert patience_s > 0
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Sent:
    """Errands that are answered as the test says."""

    def __init__(self) -> None:
        self.errands: list[Errand] = []
        self.answers: dict[str, Ended | None] = {}

    async def send(self, errands: Sequence[Errand]) -> Answers:
        self.errands += errands
        return self.answers


class Rig:
    def __init__(self, fleet: Fleet = FLEET) -> None:
        self.endings = RecordingEndings()
        self.database = Database()
        self.errands = Sent()
        self.estimates = Estimates(COUNTER)
        self.fitter = Fitter(
            database=cast("AsyncDatabase", self.database),
            fleet=fleet,
            endings=cast("Endings", self.endings),
            errands=self.errands,
            estimates=self.estimates,
            random=lambda: 1.0,
        )
        names = [d.name for model in fleet.models.values() for d in model.deployments]
        self.router = Router(fleet, dict.fromkeys(names, cast("Provider", None)))

    def work(self, text: str = "hi", messages: list[Any] | None = None, **fields: Any) -> Work:
        chat = messages or [{"role": "user", "content": text}]
        job = claimed(orjson.dumps({"messages": chat}).decode(), **fields)
        return Work(
            job=job,
            batch=Batch(id=uuid.uuid4(), size=1),
            asked_at=time.monotonic(),
            claimed_at=time.monotonic(),
            route=self.router.route(job),
            request=job.request,
        )

    def is_special(self, work: Work) -> bool:
        plain, special = self.fitter.part(work.job.tier, [work])
        assert plain + special == [work]
        return special == [work]


PICTURE = {"type": "image_url", "image_url": {"url": "http://a"}}


def test_only_what_is_near_a_window_is_counted() -> None:
    rig = Rig()
    assert not rig.is_special(rig.work("short"))
    assert rig.is_special(rig.work("long " * 200))
    assert not rig.is_special(rig.work("long " * 200, tier="large"))
    assert rig.is_special(rig.work("long " * 1000, tier="large"))
    assert not rig.is_special(rig.work("long " * 10_000, tier="open"))
    assert rig.is_special(rig.work("short", policy={"memory_id": "m"}))
    assert not rig.is_special(rig.work("short", policy={"session_id": "s"}))
    assert not rig.is_special(rig.work("long " * 200, model="wide"))
    assert rig.is_special(rig.work("long " * 1000, model="wide"))
    assert rig.is_special(rig.work(messages=[{"role": "user", "content": [PICTURE] * 3}]))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=500), st.integers(0, 3), st.sampled_from(["basic", "large"]))
def test_what_is_not_counted_fits_for_sure(text: str, pictures: int, tier: str) -> None:
    rig = Rig()
    content = [{"type": "text", "text": text}, *[PICTURE] * pictures]
    work = rig.work(messages=[{"role": "user", "content": content}], tier=tier)
    if not rig.is_special(work):
        tokens = COUNTER.count_messages(orjson.loads(work.request)["messages"], "gpt-4o")
        assert tokens <= (800 if tier == "basic" else 3000)


def test_the_windows_of_known_models_are_known() -> None:
    fleet = parse_fleet("""
[models.a]
deployments = [{ base_url = "http://a", model = "gpt-4o" }]
[models.b]
price_as = "anthropic/claude-sonnet-4-5"
deployments = [{ base_url = "http://b", model = "mine" }]
[models.c]
price_as = "free"
deployments = [{ base_url = "http://c", model = "gpt-4o" }]
[models.d]
context_window = 8
deployments = [{ base_url = "http://d", model = "gpt-4o" }]
""")
    tokens = {name: window.tokens for name, window in windows_of(fleet).items()}
    assert tokens == {"a": 128_000, "b": 200_000, "d": 8}


def long_chat(turns: int) -> list[Any]:
    chat = []
    for n in range(turns):
        chat += [
            {"role": "user", "content": f"question {n} {'word ' * 100}"},
            {"role": "assistant", "content": "answer"},
        ]
    return [*chat, {"role": "user", "content": "now"}]


async def test_who_waits_for_an_errand_is_given_back_for_longer_and_longer() -> None:
    rig = Rig()
    waits = []
    for deferrals in (0, 3, 100):
        work = rig.work(messages=long_chat(60), deferrals=deferrals)
        assert await rig.fitter.fit([work]) == []
        (_, wait_s, counts) = rig.endings.given_back[-1]
        assert not counts
        assert work.decision == {"waited": {"on": "a job for its summary"}}
        waits.append(wait_s)
    assert waits == sorted(waits)
    assert waits[-1] == 1.0
    assert {errand.tier for errand in rig.errands.errands} == {"open"}


async def test_who_waits_for_an_earlier_turn_sleeps_until_it_is_called() -> None:
    rig = Rig()
    rig.database.answer = {}  # nobody has its turn
    works = [rig.work(policy={"memory_id": "m"}, deferrals=n) for n in (0, 3, 100)]

    assert await rig.fitter.fit(works) == []

    assert rig.endings.asleep == works
    assert works[0].decision == {"waited": {"on": "an earlier turn"}}
    sleeps = [wait_s for _, wait_s, _ in rig.endings.given_back]
    assert sleeps == sorted(sleeps)
    assert (sleeps[0], sleeps[-1]) == (2.0, 15.0)


async def test_a_tier_that_is_not_there_is_asked_for_nothing() -> None:
    rig = Rig()
    policy = {"context": {"summary_tier": "nowhere"}}
    work = rig.work(messages=long_chat(60), policy=policy)
    assert await rig.fitter.fit([work]) == [work]
    assert rig.errands.errands == []
    assert work.decision is not None
    assert work.decision["context"]["left_out"] > 0


async def test_what_fits_no_model_fails_without_a_call() -> None:
    rig = Rig()
    work = rig.work("long " * 9000)
    assert await rig.fitter.fit([work]) == []
    ((_, error),) = rig.endings.failed
    assert error.code == "context_length_exceeded"


async def test_a_shorter_route_is_one_object_for_all_jobs() -> None:
    """Jobs share a request only if their routes are the same object."""
    rig = Rig()
    works = [rig.work("long " * 1000) for _ in range(2)]
    assert await rig.fitter.fit(works) == works
    assert [candidate.model for candidate in works[0].route] == ["wide"]
    assert works[0].route is works[1].route


async def test_without_a_database_jobs_come_again() -> None:
    rig = Rig()
    rig.database.answer = StoreUnavailableError()
    work = rig.work(policy={"memory_id": "m"})
    assert await rig.fitter.fit([work]) == []
    ((_, wait_s, counts),) = rig.endings.given_back
    assert wait_s > 0
    assert not counts


async def test_what_was_said_stands_between_the_system_and_the_new_turn() -> None:
    rig = Rig()
    own = [{"role": "system", "content": "s"}, {"role": "user", "content": "new"}]
    work = rig.work(messages=own, policy={"memory_id": "m"})
    said = [[1, [{"role": "user", "content": "old"}, {"role": "assistant", "content": "yes"}]]]
    rig.database.answer = {work.job.id: Recollection(None, 0, 1, orjson.dumps(said).decode())}

    assert await rig.fitter.fit([work]) == [work]

    contents = [message["content"] for message in orjson.loads(work.request)["messages"]]
    assert contents == ["s", "old", "yes", "new"]
    assert work.job.input_tokens == -(-len(work.request) // 4)
    assert work.turn is not None
    taken = work.turn.answered(
        Completion(text="no", response=b'{"choices":[{"message":{}}]}', finish_reason="stop")
    )
    assert orjson.loads(taken.messages) == [
        {"role": "user", "content": "new"},
        {"role": "assistant", "content": "no"},
    ]


async def test_only_what_a_provider_counted_is_learned() -> None:
    rig = Rig()
    work = rig.work("long " * 1000)
    await rig.fitter.fit([work])
    (wide,) = work.route
    before = rig.estimates.text("word " * 100, "some-llama")
    rig.endings.counted(work, Usage(input=work.job.input_tokens), wide)  # our own estimate
    assert rig.estimates.text("word " * 100, "some-llama") == before
    rig.endings.counted(work, Usage(input=work.job.input_tokens * 2), wide)
    assert rig.estimates.text("word " * 100, "some-llama") > before * 1.5


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ({"choices": [{"message": {"tool_calls": [{"id": "a"}]}}]}, [{"id": "a"}]),
        (
            {"content": [{"type": "tool_use", "id": "b", "name": "f", "input": {"x": 1}}]},
            [
                {
                    "id": "b",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"x":1}'},
                }
            ],
        ),
        ({"choices": [{"message": {"content": None}}]}, None),
        ([], None),
    ],
)
def test_an_answer_becomes_a_message(response: object, expected: object) -> None:
    completion = Completion(text=None, response=orjson.dumps(response), finish_reason="stop")
    message = assistant_message(completion)
    assert message["role"] == "assistant"
    assert message.get("tool_calls") == expected
