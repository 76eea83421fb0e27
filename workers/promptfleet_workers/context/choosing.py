"""Which of a chat's earlier turns stay: one pure function a policy."""

from __future__ import annotations

from collections.abc import Sequence

QUANTUM = 4
"""Turns are given to a summary in fours, so that the next few jobs of a chat find it made."""


def newest(sizes: Sequence[int], room: int) -> list[int]:
    """The newest turns that fit; the oldest ones go.

    Args:
        sizes: Tokens of each turn, the oldest first.
        room: Tokens that they may have together.

    Returns:
        The places of those that stay, in order.

    Example:
        >>> newest([5, 5, 5], 11)
        [1, 2]
    """
    kept: list[int] = []
    for n in reversed(range(len(sizes))):
        if sizes[n] > room:
            break
        room -= sizes[n]
        kept.append(n)
    return kept[::-1]


def from_both_ends(sizes: Sequence[int], room: int) -> list[int]:
    """The newest and the oldest turns that fit, in turns, the newest first; the middle goes.

    Example:
        >>> from_both_ends([5, 5, 5, 5], 16)
        [0, 2, 3]
    """
    first, last = 0, len(sizes) - 1
    kept: list[int] = []
    at_the_end = True
    while first <= last:
        n = last if at_the_end else first
        if sizes[n] > room:
            break
        room -= sizes[n]
        kept.append(n)
        if at_the_end:
            last -= 1
        else:
            first += 1
        at_the_end = not at_the_end
    return sorted(kept)


def most_relevant(sizes: Sequence[int], room: int, scores: Sequence[float]) -> list[int]:
    """The turns with the highest scores that fit; of equal ones, the newer.

    Example:
        >>> most_relevant([5, 5, 5], 11, [0.9, 0.1, 0.5])
        [0, 2]
    """
    kept = []
    for n in sorted(range(len(sizes)), key=lambda n: (scores[n], n), reverse=True):
        if sizes[n] <= room:
            room -= sizes[n]
            kept.append(n)
    return sorted(kept)


def to_summarise(sizes: Sequence[int], room: int) -> int:
    """How many of the oldest turns go into a summary, so that the others fit beside it."""
    count = len(sizes) - len(newest(sizes, room))
    return min(len(sizes), -(-count // QUANTUM) * QUANTUM)
