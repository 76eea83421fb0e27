"""Waiting in tests: always for a condition, never for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(
    condition: Callable[[], T], what: str, *, timeout_s: float = 20.0, every_s: float = 0.02
) -> T:
    """The first true value of `condition`; fails the test, saying `what` never came."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never happened within {timeout_s:g} s: {what}"
        pause.wait(every_s)
    return value
