"""Cut a text that is too long by itself, at one end or in the middle."""

from __future__ import annotations

from collections.abc import Callable

MARK = "\n[…]\n"
"""What stands where something was cut out."""


def cut(text: str, room: int, count: Callable[[str], int], *, keep_both_ends: bool) -> str | None:
    """The text with so much cut out that it fits; None if not even a little of it does.

    Args:
        text: Any text.
        room: Tokens that it may have.
        count: Counts tokens.
        keep_both_ends: True to cut out the middle; else the beginning goes.
    """
    tokens = count(text)
    if tokens <= room:
        return text
    size = min(len(text) - 1, len(text) * room // tokens)
    while size > 0:
        shorter = _shortened(text, size, keep_both_ends=keep_both_ends)
        tokens = count(shorter)
        if tokens <= room:
            return shorter
        # Ends: each round is shorter than the one before.
        size = min(size - 1, size * room // tokens)
    return None


def _shortened(text: str, size: int, *, keep_both_ends: bool) -> str:
    if not keep_both_ends:
        return MARK.lstrip() + text[len(text) - size :]
    tail = size // 2
    return text[: size - tail] + MARK + text[len(text) - tail :]
