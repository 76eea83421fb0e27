"""Answers by meaning: what may be compared, what must not, and what it costs."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import orjson
import pytest
import redis.asyncio
from tests.integration.test_pipeline import MakeRig, Rig, good, make_rig
from tests.rows import chat, insert, ledger_rows, result_rows, spec

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import CacheMode, CacheOptions, JobSpec, Usage
from promptfleet_shared.pricing import Pricer
from promptfleet_workers.caching.building import build_caching
from promptfleet_workers.caching.redis_cache import RedisCache
from promptfleet_workers.providers.protocol import Answer, Call, Completion

__all__ = ["make_rig"]  # a fixture

MODELS = """
[models.judge]
deployments = [{ name = "judge", base_url = "http://judge" }]
[models.vectors]
price_as = "openai/text-embedding-3-small"
deployments = [{ name = "vectors", base_url = "http://vectors", prompts_per_request = 4 }]
[cache.semantic]
enabled = true
model = "vectors"
threshold = 0.9
"""
SEA = "why is the sea salty?"
OCEAN = "why is the ocean salty?"
MAIL = "write a mail to my landlord."
VECTORS = {SEA: [1.0, 0.1, 0.0], OCEAN: [1.0, 0.12, 0.01], MAIL: [0.0, 1.0, 0.0]}


async def embed(call: Call) -> list[Answer]:
    """Vectors by hand; all prompts without one look the same."""
    answers: list[Answer] = []
    for request in call.requests:
        vector = VECTORS.get(orjson.loads(request)["input"], [0.0, 0.0, 1.0])
        body = {"object": "list", "data": [{"embedding": vector, "index": 0}]}
        answers.append(
            Completion(
                text=None,
                response=orjson.dumps(body),
                finish_reason=None,
                usage=Usage(input=1_000),
            )
        )
    return answers


@pytest.fixture
def make(make_rig: MakeRig, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rig]:
    defaults = RedisCache.__init__.__kwdefaults__ or {}
    monkeypatch.setattr(RedisCache.__init__, "__kwdefaults__", {**defaults, "timeout_s": 5.0})

    def make(more: str = "") -> Rig:
        rig: Rig = make_rig(
            more=MODELS + more,
            make_caching=lambda rig: build_caching(
                rig.fleet, broker_url, router=rig.router, health=rig.breakers, prices=Pricer()
            ),
        )
        rig.providers["vectors"].behaviour = embed
        return rig

    return make


Make = Callable[..., Rig]


async def run(rig: Rig, *jobs: JobSpec) -> list[Any]:
    """Their results, one job after the other."""
    for job in jobs:
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))
        await rig.endings.drain()
    return [result_rows(rig.rows, job.id)[0] for job in jobs]


def statuses(rows: list[Any]) -> list[str]:
    return [row["cache"] for row in rows]


async def test_a_prompt_that_means_the_same_has_the_same_answer(make: Make) -> None:
    rig = make()

    rows = await run(rig, spec(SEA), spec(OCEAN), spec(OCEAN), spec(MAIL))

    assert statuses(rows) == ["miss", "semantic", "semantic", "miss"]
    assert [row["text"] for row in rows] == ["fine"] * 4
    assert len(rig.provider.calls) == 2
    assert rows[1]["decision"]["cache"]["similarity"] == pytest.approx(0.9998, abs=0.0003)
    assert rows[1]["saved_usd"] == rows[0]["cost_usd"] > 0
    assert rows[1]["cost_usd"] == 0
    assert rows[1]["calls"] == 0
    (paid,) = ledger_rows(rig.rows, rows[1]["job_id"])
    assert (paid["deployment"], paid["calls"], paid["input_tokens"]) == ("vectors", 0, 1_000)
    assert paid["cost_usd"] == Decimal("0.00002")


async def test_workers_share_what_they_know(make: Make) -> None:
    one, other = make(), make()

    await run(one, spec(SEA))

    assert statuses(await run(other, spec(OCEAN))) == ["semantic"]
    await run(one, spec(MAIL))  # the other one's copy is read on from where it was
    assert statuses(await run(other, spec(MAIL + " "), spec(OCEAN))) == ["miss", "semantic"]


async def test_a_batch_is_one_embedding_request_for_many(make: Make) -> None:
    rig = make()
    jobs = [spec(text) for text in (SEA, MAIL, "and now?")]
    insert(rig.rows, *jobs)

    await rig.settled(rig.take(*(job.id for job in jobs)))

    assert [len(call.requests) for call in rig.providers["vectors"].calls] == [3]
    assert len(rig.provider.calls) == 3


# All of these have one and the same vector: only the guard keeps the second of a pair apart.
BLURRED = [
    ("convert 20 miles to km", "convert 30 miles to km"),
    ("what is 2 + 2?", "what is 2 + 3?"),
    ("is it legal to park here?", "is it not legal to park here?"),
    ("can i eat this? tell me 7 reasons", "can't i eat this? tell me 7 reasons"),
    ("darf ich die 8 Pilze essen?", "darf ich die 8 Pilze nicht essen?"),
    ("what is the capital of France?", "what is the capital of Spain?"),
    ("translate `yes` for me", "translate `no` for me"),
    ('what does "foo" mean?', 'what does "bar" mean?'),
    ("meet me on 2026-01-02", "meet me on 2026-02-01"),
]


async def test_what_embeddings_blur_is_never_taken_for_the_same(make: Make) -> None:
    rig = make()

    rows = await run(rig, *(spec(text) for pair in BLURRED for text in pair))

    taken = [pair for n, pair in enumerate(BLURRED) if rows[2 * n + 1]["cache"] != "miss"]
    assert not taken
    control = "kindly " + BLURRED[0][0]
    assert statuses(await run(rig, spec(control))) == ["semantic"]


def _messages(*messages: tuple[str, str], **parameters: object) -> bytes:
    listed = [{"role": role, "content": content} for role, content in messages]
    return orjson.dumps({"messages": listed, **parameters}, option=orjson.OPT_SORT_KEYS)


async def test_all_but_the_words_must_be_equal(make: Make) -> None:
    rig = make()
    brief = _messages(("system", "Be brief."), ("user", SEA))
    others: list[dict[str, Any]] = [
        {"tenant": "another"},
        {"cache": CacheOptions(namespace="another")},
        {"request": chat(OCEAN, temperature=0.5)},
        {"request": chat(OCEAN, max_tokens=5)},
        {"request": _messages(("system", "Be kind."), ("user", OCEAN))},
    ]

    await run(rig, spec(SEA), spec(request=brief))
    rows = await run(rig, *(spec(OCEAN, **fields) for fields in others))

    assert statuses(rows) == ["miss"] * len(others)


async def test_equal_parameters_in_other_forms_are_equal(make: Make) -> None:
    one = _messages(("system", "Be brief."), ("user", SEA), temperature=1, top_p=1)
    other = orjson.dumps(
        {"top_p": 1.0, "temperature": 1.0, "messages": orjson.loads(one)["messages"]}
    ).replace(SEA.encode(), OCEAN.encode())

    rows = await run(make(), spec(request=one), spec(request=other))

    assert statuses(rows) == ["miss", "semantic"]


async def test_what_is_no_single_question_is_not_even_embedded(make: Make) -> None:
    rig = make()
    others: list[dict[str, Any]] = [
        {"request": chat(OCEAN, tools=[{"type": "function"}])},
        {"request": _messages(("user", "Hello"), ("assistant", "Hi"), ("user", OCEAN))},
        {"request": chat(OCEAN), "cache": CacheOptions(mode=CacheMode.OFF)},
        {"request": chat(OCEAN), "cache": CacheOptions(mode=CacheMode.REFRESH)},
        {"request": chat("again"), "cache": CacheOptions(mode=CacheMode.ONLY)},
        {"request": chat("x" * 9_000)},
    ]
    await run(rig, spec(SEA))

    rows = await run(rig, *(spec(**fields) for fields in others))

    assert set(statuses(rows)) == {"miss", "off"}
    assert len(rig.providers["vectors"].calls) == 1


async def test_an_answer_that_is_gone_is_none(make: Make, broker_url: str) -> None:
    rig = make()
    await run(rig, spec(SEA))
    async with redis.asyncio.Redis.from_url(broker_url) as server:
        keys = [key for key in await server.keys("promptfleet:cache:*") if isinstance(key, bytes)]
        await server.delete(*(key for key in keys if b"semantic" not in key))

    assert statuses(await run(rig, spec(OCEAN))) == ["miss"]


async def test_the_oldest_of_too_many_is_forgotten(make: Make) -> None:
    rig = make("max_entries = 1\n")

    rows = await run(rig, spec(SEA), spec(MAIL), spec(OCEAN))

    assert statuses(rows) == ["miss", "miss", "miss"]


@pytest.mark.parametrize("code", ["connect_error", "rate_limit"])
async def test_without_embeddings_the_model_is_asked(make: Make, code: str) -> None:
    rig = make()

    async def fail(call: Call) -> list[Answer]:
        raise ProviderError("no", code=code, status=429 if code == "rate_limit" else None)

    rig.providers["vectors"].behaviour = fail

    assert statuses(await run(rig, spec(SEA), spec(OCEAN))) == ["miss", "miss"]
    assert len(rig.provider.calls) == 2


async def test_late_embeddings_hold_nobody_up_for_long(make: Make) -> None:
    rig = make("timeout_ms = 50\n")

    async def hang(call: Call) -> list[Answer]:
        await asyncio.Event().wait()
        raise AssertionError

    rig.providers["vectors"].behaviour = hang

    assert statuses(await run(rig, spec(SEA))) == ["miss"]


async def test_embeddings_without_sense_are_none(make: Make) -> None:
    rig = make()

    async def odd(call: Call) -> list[Answer]:
        return [good() for _ in call.requests]

    rig.providers["vectors"].behaviour = odd

    assert statuses(await run(rig, spec(SEA), spec(OCEAN))) == ["miss", "miss"]


class TestVerification:
    @pytest.mark.parametrize(
        ("said", "status"), [("YES", "semantic"), ("No.", "miss"), ("Yes and no", "miss")]
    )
    async def test_by_a_model(self, make: Make, said: str, status: str) -> None:
        rig = make('verify = "model:judge"\n')

        async def judge(call: Call) -> list[Answer]:
            return [good(said)]

        rig.providers["judge"].behaviour = judge

        rows = await run(rig, spec(SEA), spec(OCEAN))

        assert statuses(rows) == ["miss", status]
        (call,) = rig.providers["judge"].calls
        assert SEA in call.requests[0]
        assert OCEAN in call.requests[0]
        deployments = {row["deployment"] for row in ledger_rows(rig.rows, rows[1]["job_id"])}
        assert {"vectors", "judge"} <= deployments

    @pytest.mark.parametrize(
        ("name", "status"), [("agree", "semantic"), ("doubt", "miss"), ("crash", "miss")]
    )
    async def test_by_a_function(self, make: Make, name: str, status: str) -> None:
        rig = make(f'verify = "{__name__}:{name}"\n')

        assert statuses(await run(rig, spec(SEA), spec(OCEAN))) == ["miss", status]


def agree(asked: str, known: str, similarity: float) -> bool:
    return (asked, known) == (OCEAN, SEA) and similarity > 0.9


async def doubt(asked: str, known: str, similarity: float) -> bool:
    return False


def crash(asked: str, known: str, similarity: float) -> bool:
    raise ZeroDivisionError


async def test_nothing_of_a_prompt_or_an_answer_is_readable_where_values_are_sealed(
    make: Make, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_CACHE_KEY", base64.b64encode(os.urandom(32)).decode())
    rig = make(f'verify = "{__name__}:agree"\n[cache]\nencryption_key_env = "TEST_CACHE_KEY"\n')

    async def canary(call: Call) -> list[Answer]:
        return [good("the CANARY sings")]

    rig.provider.behaviour = canary
    rows = await run(rig, spec(SEA), spec(SEA), spec(OCEAN))

    assert statuses(rows) == ["miss", "hit", "semantic"]
    assert rows[2]["text"] == "the CANARY sings"
    async with redis.asyncio.Redis.from_url(broker_url) as server:
        keys = await server.keys("*")
        dumps = [await server.dump(key) or b"" for key in keys]
    assert len(keys) == 2
    for dump in dumps:
        assert b"CANARY" not in dump
        assert b"salty" not in dump


async def test_a_fleet_without_it_asks_nobody_for_vectors(make_rig: MakeRig) -> None:
    rig = make_rig(more=MODELS.replace("enabled = true", "enabled = false"))

    await run(rig, spec(SEA))

    assert rig.providers["vectors"].calls == []
