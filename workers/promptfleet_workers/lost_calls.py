"""Price calls that gave no answer: by the provider's count, else by what came, else at most."""

from __future__ import annotations

import functools
import re
from decimal import Decimal
from typing import Protocol

from promptfleet_shared.jobs import JobKind, LostCall, Usage
from promptfleet_workers.providers.protocol import Received
from promptfleet_workers.routing import Candidate
from promptfleet_workers.work import Work

UNBOUNDED_OUTPUT = 16_384
"""Tokens that an answer may have at most where the job sets no bound: what many models write."""
BYTES_A_TOKEN = 4
LEAST_BYTES_A_TOKEN = 2
"""Of a prompt that is tokenised badly, such as code or digits: for what a call costs at most."""
_MAX_TOKENS = re.compile(r'[{,]"max_(?:completion_)?tokens":(\d{1,9})[,}]')


class Prices(Protocol):
    """The part of a `Pricer` that is needed here."""

    def cost(
        self, provider: str, model: str, usage: Usage, price_as: str | None = None
    ) -> Decimal | None:
        """US dollars of one call; None where no price is known."""
        ...


def price_lost(
    prices: Prices,
    work: Work,
    candidate: Candidate,
    *,
    counted: Usage | None,
    received: Received | None,
    share: int = 1,
) -> LostCall:
    """What a call that gave no answer cost, or what may be said of it.

    Args:
        prices: What tokens cost.
        work: The job.
        candidate: Who was asked.
        counted: The provider's own count, where it gave one.
        received: What came of a stream.
        share: How many jobs its request was for.
    """
    deployment, model = candidate.deployment, candidate.model_there
    cost = functools.partial(prices.cost, deployment.provider, model, price_as=candidate.price_as)
    lost = LostCall(
        model=model, provider=deployment.provider, deployment=deployment.name, usage=Usage()
    )
    if counted is not None:
        return lost._replace(usage=counted, cost_usd=cost(counted))
    at_most = cost(most_usage(work))
    if received is None or not (received.size or received.input):
        return lost._replace(at_most_usd=at_most)
    usage = _usage_so_far(work, received, share)
    return lost._replace(usage=usage, estimated_usd=cost(usage), at_most_usd=at_most)


def most_usage(work: Work) -> Usage:
    """The tokens that a call for this job takes at most, about."""
    prompt = max(work.job.input_tokens, -(-len(work.request.encode()) // LEAST_BYTES_A_TOKEN))
    return Usage(input=prompt, output=most_output(work, UNBOUNDED_OUTPUT))


def most_output(work: Work, otherwise: int) -> int:
    """The tokens that the answer may have: what the request says, else `otherwise`."""
    bound = output_bound(work)
    return otherwise if bound is None else bound


def output_bound(work: Work) -> int | None:
    """The tokens that the answer may have by its request; None where that sets no bound."""
    if work.job.kind is JobKind.EMBEDDING:
        return 0
    found = _MAX_TOKENS.search(work.request)
    return int(found[1]) if found else None


def _usage_so_far(work: Work, received: Received, share: int) -> Usage:
    output = -(-received.size // (BYTES_A_TOKEN * share))
    if received.input is None or share > 1:
        return Usage(input=work.job.input_tokens, output=output)
    return Usage(input=received.input, cached=received.cached, output=output)
