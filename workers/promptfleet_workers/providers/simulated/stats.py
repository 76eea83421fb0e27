"""What the provider counts, so that tests can see what reached it."""

from __future__ import annotations

import time
from collections import Counter


class Stats:
    """Counters since the start or the last reset; `in_flight` outlives a reset."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.clear()

    def clear(self) -> None:
        """Start to count anew."""
        self.requests: Counter[str] = Counter()
        self.rejected: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.prompts = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.batches = 0
        self.batch_lines = 0
        self.client_disconnects = 0
        self.stream_disconnects = 0
        self.max_in_flight = self.in_flight
        self.calls: dict[bytes, int] = {}
        self.last_calls: dict[bytes, float] = {}
        self.failures: dict[bytes, int] = {}

    def call_of(self, digest: bytes) -> int:
        """Count a call of the prompt; which one it is, from 1."""
        number = self.calls.get(digest, 0) + 1
        self.calls[digest] = number
        self.last_calls[digest] = time.monotonic()  # the same for all processes of a machine
        return number

    def failed(self, digest: bytes) -> None:
        """A call of the prompt got no whole answer."""
        self.failures[digest] = self.failures.get(digest, 0) + 1

    def begin(self) -> None:
        """A call is in progress."""
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def as_dict(self, *, by_prompt: bool) -> dict[str, object]:
        """For /stats; with the calls of every prompt by the hex of its hash when asked."""
        shown: dict[str, object] = {
            "requests": dict(self.requests),
            "prompts": self.prompts,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "rejected": {str(status): count for status, count in self.rejected.items()},
            "faults": dict(self.faults),
            "batches": self.batches,
            "batch_lines": self.batch_lines,
            "client_disconnects": self.client_disconnects,
            "stream_disconnects": self.stream_disconnects,
        }
        if by_prompt:
            shown["calls_by_prompt"] = {key.hex(): count for key, count in self.calls.items()}
            shown["last_call_by_prompt"] = {key.hex(): at for key, at in self.last_calls.items()}
            shown["failures_by_prompt"] = {key.hex(): n for key, n in self.failures.items()}
        return shown
