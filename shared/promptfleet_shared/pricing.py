"""What calls cost, by genai-prices' bundled price list; needs the `workers` extra."""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from collections.abc import Callable
from decimal import Decimal

from genai_prices import data_snapshot
from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

from promptfleet_shared.jobs import Usage

FREE = "free"
_MILLION = Decimal(1_000_000)
_THOUSAND = Decimal(1_000)
_ZERO = Decimal(0)
_KEPT_MAX = 1024
_KEPT_S = 60.0  # some prices depend on the time of day

_Rate = Decimal | TieredPrices
_Key = tuple[str, str, str | None, bool]
_BATCH_SHARE = Decimal("0.5")


class Pricer:
    """Prices usage; looks for a model once and keeps what it found for a minute."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Read nothing yet; `clock` gives seconds since 1970."""
        self._clock = clock
        self._kept: dict[_Key, tuple[float, _Rates | None]] = {}

    def cost(
        self,
        provider: str,
        model: str,
        usage: Usage,
        price_as: str | None = None,
        *,
        batch: bool = False,
    ) -> Decimal | None:
        """US dollars of one call; None where no price is known.

        Args:
            provider: The deployment's provider, such as "openai".
            model: The model that answered.
            usage: Its tokens; `input` includes the cached ones.
            price_as: `provider/model` whose price applies instead, or "free".
            batch: True for the price by the provider's own batch API, which is half of the usual
                one (https://platform.openai.com/docs/guides/batch,
                https://docs.claude.com/en/docs/build-with-claude/batch-processing); genai-prices
                has it for those models that it knows it of.

        Example:
            >>> Pricer().cost("openai", "gpt-4o", Usage(input=1_000, cached=100, output=10))
            Decimal('0.00247500')
        """
        key = (provider, model, price_as, batch)
        kept = self._kept.get(key)
        now = self._clock()
        if kept is None or kept[0] <= now:
            kept = self._keep(key, now)
        rates = kept[1]
        return None if rates is None else rates.cost(usage)

    def _keep(self, key: _Key, now: float) -> tuple[float, _Rates | None]:
        if len(self._kept) >= _KEPT_MAX:
            self._kept.clear()  # names of models that providers make up must not fill our memory
        provider, model, price_as, batch = key
        found = _find(provider, model, price_as, now, batch=batch)
        kept = self._kept[key] = (now + _KEPT_S, found)
        return kept


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Rates:
    """US dollars a token, and a call."""

    input: _Rate
    cached: _Rate
    output: _Rate
    reasoning: _Rate
    call: Decimal

    def share(self, share: Decimal) -> _Rates:
        """So much of these."""
        return _Rates(
            input=_part(self.input, share),
            cached=_part(self.cached, share),
            output=_part(self.output, share),
            reasoning=_part(self.reasoning, share),
            call=self.call * share,
        )

    def cost(self, usage: Usage) -> Decimal:
        size = usage.input
        return (
            (size - usage.cached) * _rate(self.input, size)
            + usage.cached * _rate(self.cached, size)
            + (usage.output - usage.reasoning) * _rate(self.output, size)
            + usage.reasoning * _rate(self.reasoning, size)
            + self.call
        )


_NOTHING = _Rates(input=_ZERO, cached=_ZERO, output=_ZERO, reasoning=_ZERO, call=_ZERO)


def _find(
    provider: str, model: str, price_as: str | None, now: float, *, batch: bool
) -> _Rates | None:
    if price_as == FREE:
        return _NOTHING
    if price_as is not None:
        provider, _, model = price_as.partition("/")
    info = _model(provider, model)
    if info is None:
        return None
    when = dt.datetime.fromtimestamp(now, tz=dt.UTC)
    if not batch:
        return _rates(info.get_prices(when))
    if info.price_variants:
        return _rates(info.get_prices(when, {"processing": "batch"}))
    usual = _rates(info.get_prices(when))
    return usual and usual.share(_BATCH_SHARE)


def _model(provider: str, model: str) -> ModelInfo | None:
    snapshot = data_snapshot.get_snapshot()
    try:
        return snapshot.find_provider_model(model, None, provider, None)[1]
    except LookupError:
        return None


def _rates(prices: ModelPrice) -> _Rates | None:
    """The prices of tokens; None for a model that is paid by the hour, the page or the picture."""
    input_rate, output_rate = prices.input_mtok, prices.output_mtok
    if input_rate is None and output_rate is None:
        has_others = any(value is not None for value in vars(prices).values())
        return None if has_others else _NOTHING
    output = _a_token(output_rate)
    reasoning = prices.output_reasoning_mtok
    cached = prices.cache_read_mtok
    call = prices.requests_kcount
    return _Rates(
        input=_a_token(input_rate),
        cached=_a_token(input_rate if cached is None else cached),
        output=output,
        reasoning=output if reasoning is None else _a_token(reasoning),
        call=call / _THOUSAND if isinstance(call, Decimal) else _ZERO,
    )


def _a_token(price: Decimal | TieredPrices | None) -> _Rate:
    """The price of one token, from that of a million."""
    if price is None:
        return _ZERO
    if isinstance(price, Decimal):
        return price / _MILLION
    tiers = [dataclasses.replace(tier, price=tier.price / _MILLION) for tier in price.tiers]
    return TieredPrices(base=price.base / _MILLION, tiers=tiers)


def _part(rate: _Rate, share: Decimal) -> _Rate:
    if isinstance(rate, Decimal):
        return rate * share
    tiers = [dataclasses.replace(tier, price=tier.price * share) for tier in rate.tiers]
    return TieredPrices(base=rate.base * share, tiers=tiers)


def _rate(rate: _Rate, input_tokens: int) -> Decimal:
    """A rate may rise for all of a call's tokens when its input is long."""
    if type(rate) is Decimal:
        return rate
    assert isinstance(rate, TieredPrices)  # noqa: S101 - for the type checkers
    for tier in reversed(rate.tiers):
        if input_tokens > tier.start:
            return tier.price
    return rate.base
