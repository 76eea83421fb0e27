"""Prices: ours are genai-prices' own, only found faster."""

from __future__ import annotations

import datetime as dt
import warnings
from decimal import Decimal

import genai_prices
import pytest
from genai_prices import data_snapshot
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared import pricing
from promptfleet_shared.jobs import Usage
from promptfleet_shared.pricing import Pricer

USAGE = Usage(input=1_000, cached=100, output=10)
AT = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)


def listed() -> list[tuple[str, str]]:
    providers = data_snapshot.get_snapshot().providers
    return [(provider.id, model.id) for provider in providers for model in provider.models]


def test_a_known_model() -> None:
    # 900 at $2.50, 100 cached at $1.25, 10 at $10 a million
    assert Pricer().cost("openai", "gpt-4o", USAGE) == Decimal("0.002475")


def test_a_dated_name_of_a_model_is_known_too() -> None:
    pricer = Pricer()

    dated = pricer.cost("openai", "gpt-4o-mini-2024-07-18", USAGE)
    assert dated == pricer.cost("openai", "gpt-4o-mini", USAGE)
    assert dated


@pytest.mark.parametrize(
    ("provider", "model"), [("openai", "smollm2"), ("nobody", "gpt-4o"), ("openai", "")]
)
def test_no_price_is_known_for_an_unknown_model(provider: str, model: str) -> None:
    assert Pricer().cost(provider, model, USAGE) is None


def test_another_models_price() -> None:
    pricer = Pricer()

    assert pricer.cost("openai", "mine", USAGE, "openai/gpt-4o") == Decimal("0.002475")
    assert pricer.cost("openai", "gpt-4o", USAGE, "openai/no-such-model") is None
    assert pricer.cost("openai", "gpt-4o", USAGE, "nonsense") is None
    nested = pricer.cost("openai", "mine", USAGE, "openrouter/openai/gpt-4o")
    assert nested == pricer.cost("openrouter", "openai/gpt-4o", USAGE)
    assert nested


def test_free() -> None:
    assert Pricer().cost("openai", "gpt-4o", USAGE, "free") == 0


def test_a_model_that_is_paid_by_the_hour_has_no_price_for_tokens() -> None:
    assert Pricer().cost("openai", "whisper-1", USAGE) is None


def test_a_long_input_costs_more_a_token() -> None:
    pricer = Pricer()

    short = pricer.cost("google", "gemini-2.5-pro", Usage(input=200_000))
    long = pricer.cost("google", "gemini-2.5-pro", Usage(input=200_001))

    assert short == Decimal("0.25")
    assert long == Decimal("0.5000025")


@given(
    model=st.sampled_from(listed()),
    size=st.integers(0, 2_000_000),
    cached=st.integers(0, 2_000_000),
    output=st.integers(0, 200_000),
)
def test_the_cost_is_what_genai_prices_computes(
    model: tuple[str, str], size: int, cached: int, output: int
) -> None:
    cached = min(cached, size)
    ours = Pricer(clock=AT.timestamp).cost(*model, Usage(input=size, cached=cached, output=output))
    if ours is None:
        return  # paid by the hour, the page or the picture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = genai_prices.calc_price(
            genai_prices.Usage(input_tokens=size, cache_read_tokens=cached, output_tokens=output),
            model[1],
            provider_id=model[0],
            genai_request_timestamp=AT,
        )
    assert ours == theirs.total_price


def test_prices_that_depend_on_the_hour_follow_the_clock() -> None:
    now = dt.datetime(2025, 7, 1, 12, 0, tzinfo=dt.UTC).timestamp()
    pricer = Pricer(clock=lambda: now)
    by_day = pricer.cost("deepseek", "deepseek-chat", USAGE)

    now += 8 * 3600  # 20:00; the discount of that time: 16:30 to 00:30

    by_night = pricer.cost("deepseek", "deepseek-chat", USAGE)
    assert by_day is not None
    assert by_night is not None
    assert by_night < by_day


def test_a_model_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[tuple[str, str]] = []
    find = pricing._model

    def count(provider: str, model: str) -> object:
        looked_for.append((provider, model))
        return find(provider, model)

    monkeypatch.setattr(pricing, "_model", count)
    pricer = Pricer(clock=lambda: 0.0)

    for _ in range(3):
        pricer.cost("openai", "gpt-4o", USAGE)
        pricer.cost("openai", "unknown", USAGE)

    assert looked_for == [("openai", "gpt-4o"), ("openai", "unknown")]


def test_made_up_names_do_not_pile_up() -> None:
    pricer = Pricer()

    for n in range(1_100):
        pricer.cost("nobody", f"model-{n}", USAGE)

    assert len(pricer._kept) <= 1_024
