"""The parts of providers' batches that need no server."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from decimal import Decimal

import orjson
import pytest

from promptfleet.options import check_option
from promptfleet_shared.errors import ConfigurationError, InvalidRequestError, ProviderError
from promptfleet_shared.fleet import Deployment, parse_fleet
from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_shared.policies.provider_batches import BatchServiceSection, choose
from promptfleet_shared.store.provider_batches import LineKey
from promptfleet_workers.provider_batches.lines import custom_id, key_of
from promptfleet_workers.provider_batches.pricing import BatchPricer
from promptfleet_workers.provider_batches.returning import return_of
from promptfleet_workers.provider_batches.service import BACKOFF_MAX_S, backoff_s
from promptfleet_workers.provider_batches.submitting import may_have_been_made
from promptfleet_workers.providers.anthropic_batches import AnthropicBatches
from promptfleet_workers.providers.batch_building import build_batch_apis
from promptfleet_workers.providers.batch_protocol import Line
from promptfleet_workers.providers.batch_transfers import checked_name, split_lines
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.openai_batches import OpenAIBatches

KEY = LineKey(job_id=uuid.UUID(int=7), fence=12)
REQUEST = '{"max_tokens":5,"messages":[{"content":"Hi","role":"user"}]}'


class TestChoosing:
    @pytest.mark.parametrize(
        ("service", "remaining_s", "is_batch", "why"),
        [
            ("batch", 3601, True, None),
            ("batch", 3600, False, "deadline"),
            ("auto", 43_200, True, None),
            ("auto", 43_199, False, "deadline"),
            ("standard", 86_400, False, None),
        ],
    )
    def test_by_what_was_asked_and_the_time(
        self, service: str, remaining_s: float, is_batch: bool, why: str | None
    ) -> None:
        choice = choose({"service": service}, remaining_s, BatchServiceSection())
        assert (choice.is_batch, choice.why) == (is_batch, why)

    def test_who_asks_for_nothing_goes_the_ordinary_way(self) -> None:
        assert not choose({}, 86_400, BatchServiceSection()).is_batch

    def test_the_option_takes_its_three_words(self) -> None:
        assert check_option("service", "batch") == "batch"
        with pytest.raises(InvalidRequestError, match="service: must be one of standard, batch"):
            check_option("service", "Batch")


class TestCustomIds:
    def test_tell_the_job_and_its_fence(self) -> None:
        assert key_of(custom_id(KEY)) == KEY
        longest = custom_id(LineKey(job_id=uuid.UUID(int=2**128 - 1), fence=2**63 - 1))
        assert len(longest) <= 64

    @pytest.mark.parametrize("text", ["", "request-1", "x" * 32 + "-1", "0" * 32, "0" * 32 + "-x"])
    def test_of_others_tell_nothing(self, text: str) -> None:
        assert key_of(text) is None


class TestLines:
    def test_openai(self) -> None:
        api = OpenAIBatches(Deployment(base_url="http://there/v1"), HttpClientStub())
        line = api.written(Line(custom_id="a", request=REQUEST), JobKind.CHAT, "gpt")
        assert line.endswith(b"\n")
        assert orjson.loads(line) == {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "gpt", **orjson.loads(REQUEST)},
        }

    def test_anthropic(self) -> None:
        api = AnthropicBatches(Deployment(base_url="http://there/v1"), HttpClientStub())
        line = api.written(Line(custom_id="a", request=REQUEST), JobKind.CHAT, "claude")
        assert orjson.loads(line)["params"] == {
            "model": "claude",
            "max_tokens": 5,
            "messages": [{"role": "user", "content": "Hi"}],
        }
        odd = Line(custom_id="a", request='{"logit_bias":{},"messages":[]}')
        with pytest.raises(ProviderError, match="logit_bias"):
            api.written(odd, JobKind.CHAT, "claude")

    async def test_are_split_however_they_are_cut(self) -> None:
        body = b"one\ntwo\n\nthree"
        for size in range(1, len(body) + 1):
            assert [line async for line in split_lines(pieces(body, size))] == [
                b"one",
                b"two",
                b"",
                b"three",
            ]

    async def test_that_never_end_are_refused(self) -> None:
        with pytest.raises(ProviderError, match="longer than 9 bytes"):
            async for _ in split_lines(pieces(b"x" * 100, 4), longest=9):
                pass


def HttpClientStub() -> HttpClient:  # noqa: N802 - stands for one
    """A client that is never asked; a real one needs a loop."""
    return HttpClient.__new__(HttpClient)


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize("name", ["../x", "a/b", "", None, 7, "a?b", "x" * 300])
def test_names_that_would_lead_elsewhere_are_refused(name: object) -> None:
    with pytest.raises(ProviderError):
        checked_name(name)
    assert checked_name("batch_abc-1") == "batch_abc-1"


@pytest.mark.parametrize(
    ("error", "may"),
    [
        (ProviderError(code="timeout", unknown_outcome=True), True),
        (ProviderError(code="http_500", status=500), True),
        (ProviderError(code="http_503", status=503), False),
        (ProviderError(code="http_400", status=400), False),
        (ProviderError(code="rate_limit_exceeded", status=429), False),
        (ProviderError(code="connect_error"), False),
    ],
)
def test_only_what_may_have_been_made_is_looked_for(error: ProviderError, may: bool) -> None:
    assert may_have_been_made(error) is may


def test_what_the_provider_did_not_come_to_costs_nothing() -> None:
    undone = return_of(KEY, ProviderError(code="batch_expired"))
    failed = return_of(KEY, ProviderError(code="http_500", status=500))
    full = return_of(KEY, ProviderError(code="rate_limit_exceeded", status=429))
    assert (undone.calls, undone.counts) == (0, False)
    assert (failed.calls, failed.counts) == (1, True)
    assert (full.calls, full.counts) == (0, False)
    assert failed.policy == {"service": "standard"}


def test_backoff_grows_to_its_bound() -> None:
    assert [backoff_s(n) for n in range(3)] == [5, 10, 20]
    assert backoff_s(10_000) == BACKOFF_MAX_S


def test_lines_cost_half() -> None:
    usage = Usage(input=1000, output=1000)
    pricer = BatchPricer()
    usual = pricer.cost("openai", "gpt-4o-mini", usage, batch=False)
    assert usual is not None
    assert pricer.cost("openai", "gpt-4o-mini", usage) == usual / 2
    assert pricer.saved("openai", "gpt-4o-mini", usage) == usual / 2
    assert pricer.cost("openai", "no-such-model", usage) is None
    assert pricer.cost("x", "y", usage, "free") == Decimal(0)


class TestConfiguration:
    FLEET = """
    [models.m]
    deployments = [{ provider = "PROVIDER", base_url = "http://there", batch_api = true }]
    """

    def test_a_protocol_without_one_is_refused(self) -> None:
        fleet = parse_fleet(self.FLEET.replace("PROVIDER", "gemini"))
        with pytest.raises(ConfigurationError, match=r"deployment 'm': batch_api: .*'gemini'"):
            build_batch_apis(fleet, HttpClientStub())

    def test_deployments_say_that_they_have_one(self) -> None:
        fleet = parse_fleet(self.FLEET.replace("PROVIDER", "anthropic"))
        assert list(build_batch_apis(fleet, HttpClientStub())) == ["m"]
        fleet = parse_fleet(self.FLEET.replace("PROVIDER", "openai").replace("true", "false"))
        assert build_batch_apis(fleet, HttpClientStub()) == {}

    def test_mistakes_name_their_field(self) -> None:
        with pytest.raises(ConfigurationError, match=r"batch_service\.gather_s"):
            parse_fleet("[batch_service]\ngather_s = 0")
