"""What is submitted to the fleet: a seeded, endless stream of orders for each producer."""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Iterator
from typing import Any

TIERS = ("basic", "standard", "advanced")
TENANTS = ("default", "default", "bounded", "spender")
"""Of the producers: one has bounds on what is in flight, another one a hard budget."""
SPENDER = "spender"
METERED = "metered"
"""The model whose provider enforces a limit, and whose calls have a price."""
TALKS = 3
"""Conversations of a producer."""
LONG_S = 90.0
"""A deadline that a job which can succeed reaches, unless the faults hold it up for so long."""


class Fate(enum.StrEnum):
    """What the provider makes of a prompt when nothing else goes wrong."""

    ANSWERED = "answered"
    SLOW = "slow"
    FLAKY = "flaky"  # the first call goes wrong
    LIMITED = "limited"  # the first calls are refused, free of charge
    REFUSED = "refused"  # every call is refused for good
    BROKEN = "broken"  # no call ever gets a whole answer


_MARKERS: dict[Fate, tuple[str, ...]] = {
    Fate.ANSWERED: ("",),
    Fate.SLOW: ("[[sim:latency-ms=1500]]", "[[sim:latency-ms=3500]]"),
    Fate.FLAKY: tuple(
        f"[[sim:{fault},times=1]]"
        for fault in ("status=500", "hang", "disconnect", "truncate", "stall", "reset", "cut")
    ),
    Fate.LIMITED: ("[[sim:status=429,retry-after-ms=300,times=2]]",),
    Fate.REFUSED: ("[[sim:status=400]]", "[[sim:status=400,code=content_filter]]"),
    Fate.BROKEN: ("[[sim:cut]]", "[[sim:truncate]]", "[[sim:bad-utf8]]"),
}
_FATES = (
    [Fate.ANSWERED] * 78
    + [Fate.SLOW] * 6
    + [Fate.FLAKY] * 7
    + [Fate.LIMITED] * 4
    + [Fate.REFUSED] * 3
    + [Fate.BROKEN] * 2
)
MAX_TOKENS = 24
"""Of a metered answer: what bounds its price."""
FREE_CALLS = {Fate.LIMITED: 2}
"""How many of a prompt's first calls cost nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One prompt, and what is known of it before it is submitted.

    Attributes:
        name: Unique in a run; it is in the job's metadata, so that its rows are found.
        text: The prompt; equal to another's only where both are `twin`.
        token: A part of the text, and so of its answer, that no other text has.
        twin: True for one that the cache, or an equal job's call, may answer.
        calls_back: Which of the receiver's paths hears of its end, if one does.
        key: Its idempotency key.
        model: The one model that may answer it; None for those of its tier.
        service: "batch" for one that goes through the provider's batch API.
        memory_id: Its conversation.
        concurrency_key: What it shares a bound with.
    """

    name: str
    text: str
    token: str
    tier: str
    priority: int
    deadline_s: float
    fate: Fate
    on_unknown: str = "retry"
    twin: bool = False
    calls_back: str | None = None
    key: str | None = None
    tenant: str = TENANTS[0]
    model: str | None = None
    service: str | None = None
    memory_id: str | None = None
    concurrency_key: str | None = None

    def options(self, receiver_url: str | None) -> dict[str, Any]:
        """As `enqueue_prompt` takes them."""
        options: dict[str, Any] = {
            "tier": self.tier,
            "priority": self.priority,
            "deadline": self.deadline_s,
            "on_unknown": self.on_unknown,
            "metadata": {"name": self.name},
            "cache": "use" if self.twin else "off",
        }
        names = ("model", "service", "memory_id", "concurrency_key")
        options |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.model == METERED:
            options["max_tokens"] = MAX_TOKENS
        if self.key is not None:
            options["idempotency_key"] = self.key
        if self.calls_back is not None and receiver_url is not None:
            options["callback_url"] = f"{receiver_url}{self.calls_back}"
        return options


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One call of a producer, and what it does after it.

    Attributes:
        asks: One for `enqueue_prompt`, more for `enqueue_prompts`.
        pause_s: Seconds before the call.
        repeat_in_s: Seconds until the same call is made again; only where each ask has a key.
        cancel_in_s: Seconds until all of it is cancelled.
        read_in_s: Seconds until a client looks at what became of it.
    """

    asks: tuple[Ask, ...]
    pause_s: float
    repeat_in_s: float | None = None
    cancel_in_s: float | None = None
    read_in_s: float | None = None


def orders(
    seed: int,
    producer: int,
    *,
    canary: str,
    prompts_per_s: float,
    long_s: float = LONG_S,
    patient: bool = True,
) -> Iterator[Order]:
    """The orders of one producer: the same for the same seed.

    Args:
        seed: Of the run.
        producer: Which one of the producers.
        canary: Put into each prompt, and so into each answer.
        prompts_per_s: About so many, while nothing holds the producer up.
        long_s: The usual deadline.
        patient: False for no line of a batch that waits for its answer, however long it takes.
    """
    draw = random.Random(f"{seed} orders {producer}")
    number = 0
    while True:
        size = 1 if draw.random() < 0.7 else draw.randint(2, 12)
        twins = size > 1 and draw.random() < 0.2
        keyed = draw.random() < 0.25
        asks: list[Ask] = []
        for _ in range(size):
            number += 1
            name = f"{seed}-{producer}-{number}"
            if twins and asks:
                ask = dataclasses.replace(asks[0], name=name)
            else:
                ask = _ask(draw, name, canary=canary, twin=twins, long_s=long_s)
                ask = _on_its_way(draw, ask, producer)
                if ask.service and not patient:
                    ask = dataclasses.replace(ask, on_unknown="retry")
            asks.append(dataclasses.replace(ask, key=f"key-{name}") if keyed else ask)
        yield Order(
            asks=tuple(asks),
            pause_s=draw.expovariate(1) * size / prompts_per_s,
            repeat_in_s=draw.choice([0.0, 0.5, 4.0]) if keyed else None,
            cancel_in_s=draw.choice([0.0, 0.05, 0.5, 2.0]) if draw.random() < 0.08 else None,
            read_in_s=draw.choice([1.0, 4.0, 8.0]) if draw.random() < 0.3 else None,
        )


def _ask(draw: random.Random, name: str, *, canary: str, twin: bool, long_s: float) -> Ask:
    fate = Fate.ANSWERED if twin else draw.choice(_FATES)
    token = f"token-{name}-end"
    words = " ".join(draw.choice(("alpha", "beta", "gamma", "delta")) for _ in range(4))
    short = draw.random() < 0.08
    return Ask(
        name=name,
        text=f"{token} {canary} {words} {draw.choice(_MARKERS[fate])}".rstrip(),
        token=token,
        tier=draw.choice(TIERS),
        priority=draw.randint(0, 9),
        deadline_s=draw.uniform(0.5, 8.0) if short else long_s,
        fate=fate,
        on_unknown="fail" if draw.random() < 0.1 else "retry",
        twin=twin,
        calls_back=f"/hook/{draw.randint(0, 3)}" if draw.random() < 0.15 else None,
    )


def _on_its_way(draw: random.Random, ask: Ask, producer: int) -> Ask:
    """Some go by a batch API, some to a model with a limit and a price, some are turns."""
    tenant = TENANTS[producer % len(TENANTS)]
    key = draw.choice(("a", "b", "c")) if tenant == "bounded" and draw.random() < 0.2 else None
    ask = dataclasses.replace(ask, tenant=tenant, concurrency_key=key)
    way = draw.random()
    if way < 0.15:
        return dataclasses.replace(ask, service="batch")
    if way < (0.3 if tenant == SPENDER else 0.2):
        return dataclasses.replace(ask, model=METERED)
    if way < 0.95 or ask.fate is not Fate.ANSWERED or ask.twin:
        return ask
    talk = f"talk-{producer}-{draw.randrange(TALKS)}"
    # Else the answer would tell of the turns before.
    return dataclasses.replace(ask, memory_id=talk, text=f"{ask.text} [[sim:text={ask.token}]]")
