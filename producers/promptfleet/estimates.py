"""What prompts will cost before anybody is asked: tokens counted, answers guessed, prices known."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import orjson

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import JobKind, JobSpec, Usage

if TYPE_CHECKING:
    from promptfleet_shared.store.costs import ObservedOutputs

DEFAULT_OUTPUT = 512
"""Tokens of an answer where neither a bound nor earlier answers tell anything."""
ENOUGH_ANSWERS = 20
"""With fewer earlier answers of a tier, their lengths prove nothing."""
BYTES_A_TOKEN = 4
MIN_REMEMBERED = 256
"""Characters from which it is quicker to remember what a text is than to look again."""
MAX_REMEMBERED = 50_000

T = TypeVar("T")


class _Counter(Protocol):
    def count(self, text: str, model: str | None = None) -> int: ...

    def count_messages(self, messages: Any, model: str | None = None) -> int: ...


class _Pricer(Protocol):
    def cost(
        self,
        provider: str,
        model: str,
        usage: Usage,
        price_as: str | None = None,
        *,
        batch: bool = False,
    ) -> Decimal | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelAt:
    """A model where it is asked first."""

    name: str
    provider: str
    there: str
    price_as: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """How long an answer will be, in tokens.

    Attributes:
        expected: On average.
        high: Only one answer in twenty is longer.
        source: "observed", "max_tokens" or "default": where that comes from.
    """

    expected: int
    high: int
    source: str


class Estimates:
    """Counts and prices for one fleet; without the `workers` extra it has guesses and no prices."""

    def __init__(self, fleet: Fleet, observed: Mapping[str, ObservedOutputs] | None = None) -> None:
        """Load nothing yet that is slow.

        Args:
            fleet: Its tiers and models.
            observed: How long each tier's answers were.
        """
        self._fleet = fleet
        self._observed = observed or {}
        self._counter, self._pricer = _tools()

    @property
    def counts_exactly(self) -> bool:
        """False where tokens are guessed from the length."""
        return self._counter is not None

    @property
    def knows_prices(self) -> bool:
        """False where no price list is installed."""
        return self._pricer is not None

    def model_of(self, spec: JobSpec) -> ModelAt | None:
        """The model that is asked first for this job."""
        return self.model(spec.model) if spec.model is not None else self.model_of_tier(spec.tier)

    def model_of_tier(self, tier: str) -> ModelAt | None:
        """The model that is asked first for this tier."""
        section = self._fleet.tiers.get(tier)
        return self.model(section.models[0]) if section else None

    def model(self, name: str) -> ModelAt | None:
        """The model where it is asked first; None for one that the fleet has not."""
        model = self._fleet.models.get(name)
        if model is None:
            return None
        first = model.deployments[0]
        return ModelAt(
            name=name,
            provider=first.provider,
            there=first.model or name,
            price_as=first.price_as or model.price_as,
        )

    def input_tokens(self, body: Mapping[str, Any], model: ModelAt | None) -> int:
        """Tokens of a request's own part of the provider's body."""
        if self._counter is None:
            return -(-len(orjson.dumps(body)) // BYTES_A_TOKEN)
        there = model.there if model else None
        if "messages" in body:
            tokens = self._counter.count_messages(body["messages"], there)
        else:
            tokens = self._counter.count(str(body.get("prompt", body.get("input", ""))), there)
        for name in ("tools", "response_format"):
            if name in body:
                tokens += self._counter.count(orjson.dumps(body[name]).decode(), there)
        return tokens

    def text_tokens(self, text: str, model: ModelAt | None) -> int:
        """Tokens of a text."""
        if self._counter is None:
            return -(-len(text.encode("utf-8", "replace")) // BYTES_A_TOKEN)
        return self._counter.count(text, model.there if model else None)

    def output(self, kind: JobKind, tier: str, max_tokens: int | None) -> Output:
        """How long an answer of this tier will be."""
        if kind is JobKind.EMBEDDING:
            return Output(expected=0, high=0, source="default")
        bound = max_tokens if max_tokens is not None else 2**31
        seen = self._observed.get(tier)
        if seen is not None and seen.answers >= ENOUGH_ANSWERS:
            expected, high = min(round(seen.mean), bound), min(round(seen.p95), bound)
            return Output(expected=expected, high=high, source="observed")
        if max_tokens is not None:
            return Output(expected=max_tokens, high=max_tokens, source="max_tokens")
        return Output(expected=DEFAULT_OUTPUT, high=DEFAULT_OUTPUT, source="default")

    def cost(self, model: ModelAt | None, usage: Usage, *, batch: bool = False) -> Decimal | None:
        """US dollars of one call; None where no price is known."""
        if self._pricer is None or model is None:
            return None
        return self._pricer.cost(model.provider, model.there, usage, model.price_as, batch=batch)


def _tools() -> tuple[_Counter | None, _Pricer | None]:
    """The counter and the price list, which the bare producer has not."""
    counter: _Counter | None = None
    pricer: _Pricer | None = None
    try:
        from promptfleet_shared.tokens import TokenCounter  # noqa: PLC0415  # optional, and slow

        class Remembering(TokenCounter):
            """Counts a long text once: system messages come again and again."""

            _known = Remembered[int]()

            def count(self, text: str, model: str | None = None) -> int:
                count = super().count
                return self._known.of(text, model or "", lambda: count(text, model))

        counter = Remembering()
    except ImportError:
        pass
    try:
        from promptfleet_shared.pricing import Pricer  # noqa: PLC0415  # optional, and slow

        pricer = Pricer()
    except ImportError:
        pass
    return counter, pricer


class Remembered(Generic[T]):
    """What was found out about long texts, by their digests; forgets all when it knows too many."""

    def __init__(self) -> None:
        """Know nothing."""
        self._known: dict[bytes, T] = {}

    def of(self, text: str, kind: str, find: Callable[[], T]) -> T:
        """What is known of a text of some kind, else what `find` says."""
        if len(text) < MIN_REMEMBERED:
            return find()
        facts = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(facts, digest_size=16).digest()
        if digest not in self._known:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[digest] = find()
        return self._known[digest]


class Dollars:
    """A sum of prices, some of which may not be known."""

    def __init__(self) -> None:
        """Nothing."""
        self.usd = Decimal(0)
        self.unknown = 0
        self.known = 0

    def add(self, price: Decimal | None) -> None:
        """Add the next one."""
        if price is None:
            self.unknown += 1
        else:
            self.known += 1
            self.usd += price

    @property
    def total(self) -> Decimal | None:
        """The sum of what is known; None if nothing is."""
        return self.usd if self.known or not self.unknown else None
