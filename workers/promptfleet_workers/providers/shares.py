"""One answer for many prompts, cut into an answer for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from promptfleet_shared.jobs import Usage


def allocate(total: int, weights: Sequence[int]) -> list[int]:
    """Share out `total` in proportion to `weights`, by the largest remainder.

    The shares sum up to `total`, and none is a whole unit away from its exact proportion. Equal
    shares if all weights are 0.

    Example:
        >>> allocate(10, [1, 1, 1])
        [4, 3, 3]
    """
    whole = sum(weights)
    if whole == 0:
        weights, whole = [1] * len(weights), len(weights)
    shares = [total * weight // whole for weight in weights]
    missing = total - sum(shares)
    if missing:
        remainders = [total * weight % whole for weight in weights]
        largest_first = sorted(range(len(weights)), key=lambda n: -remainders[n])
        for n in largest_first[:missing]:
            shares[n] += 1
    return shares


def allocate_usage(total: Usage, estimates: Sequence[Usage]) -> list[Usage]:
    """Each prompt's share of what the provider counted for all of them.

    Where that can't be the count of all of them, as with llama.cpp, whose usage for a list is that
    of one prompt, the estimates stand.
    """
    if not is_plausible(total, estimates):
        return list(estimates)
    inputs = allocate(total.input, [estimate.input for estimate in estimates])
    outputs = allocate(total.output, [estimate.output for estimate in estimates])
    cached = allocate(min(total.cached, total.input), inputs) if total.cached else None
    reasoning = allocate(min(total.reasoning, total.output), outputs) if total.reasoning else None
    return [
        Usage(
            input=inputs[n],
            cached=cached[n] if cached else 0,
            output=outputs[n],
            reasoning=reasoning[n] if reasoning else 0,
        )
        for n in range(len(estimates))
    ]


def is_plausible(total: Usage, estimates: Sequence[Usage]) -> bool:
    """True if `total` is nearer to all estimates' sum than to the largest of them alone.

    Nearer by ratio: our estimates may all be wrong by the same factor, so the border lies at the
    geometric mean of the two.
    """
    if total.input < len(estimates):
        return False
    sizes = [estimate.input + estimate.output for estimate in estimates]
    return total.input + total.output >= math.sqrt(sum(sizes) * max(sizes))
