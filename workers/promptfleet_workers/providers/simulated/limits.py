"""Rate limits, strict: no window of time admits more than the limit.

A sliding log; or, where asked for, a token bucket of the limit's size that is filled all the time,
as real providers have: it admits up to twice its limit in its first window.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from .options import Options

_COMPACT_AT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Which limit said no (`requests`, `tokens`, `concurrency`), and when to come back."""

    limit: str
    message: str
    retry_after_ms: int
    value: int | None = None


class RateLimits:
    """What was admitted in the last window; times are seconds of any steady clock."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._totals: list[int] = []  # tokens admitted up to and with each entry
        self._head = 0  # entries before it have left the window
        self._dropped_total = 0
        self._buckets = _Buckets()

    def admit(self, options: Options, *, tokens: int, in_flight: int, now: float) -> Refusal | None:
        """Count one request of `tokens`, or say why not; a refusal costs nothing."""
        self._expire(now - options.limit_window_s)
        if options.limit_kind == "bucket":
            return self._buckets.admit(options, tokens, in_flight, now)
        refusal = self._refusal(options, tokens, in_flight, now)
        if refusal is None and (options.rpm or options.tpm):
            self._times.append(now)
            self._totals.append((self._totals[-1] if self._totals else 0) + tokens)
        return refusal

    def headers(self, options: Options, now: float) -> bytes:
        """OpenAI's `x-ratelimit-*` header lines for the limits that are set."""
        lines = b""
        reset = (self._times[-1] + options.limit_window_s - now) if self._used_requests() else 0.0
        requests, tokens = self._used_requests(), self._used_tokens()
        if options.limit_kind == "bucket":
            requests, tokens, reset = self._buckets.used(options, now)
        for name, limit, used in (
            (b"requests", options.rpm, requests),
            (b"tokens", options.tpm, tokens),
        ):
            if limit:
                lines += (
                    b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\n"
                    b"x-ratelimit-reset-%b: %b\r\n"
                    % (name, limit, name, max(0, limit - used), name, _duration(reset))
                )
        return lines

    def clear(self) -> None:
        """Forget what was admitted."""
        self.__init__()  # type: ignore[misc]

    def _used_requests(self) -> int:
        return len(self._times) - self._head

    def _used_tokens(self) -> int:
        return (self._totals[-1] - self._dropped_total) if self._totals else 0

    def _expire(self, until: float) -> None:
        head = bisect_right(self._times, until, lo=self._head)
        if head > self._head:
            self._dropped_total = self._totals[head - 1]
            self._head = head
        if self._head > _COMPACT_AT and self._head * 2 > len(self._times) + 1:
            # The last entry stays: its total is what the next one counts on from.
            cut = min(self._head, len(self._times) - 1)
            del self._times[:cut], self._totals[:cut]
            self._head -= cut

    def _refusal(self, options: Options, tokens: int, in_flight: int, now: float) -> Refusal | None:
        if options.max_concurrent and in_flight >= options.max_concurrent:
            message = f"Too many concurrent requests: limit {options.max_concurrent}."
            return Refusal(limit="concurrency", message=message, retry_after_ms=100)
        if options.rpm and self._used_requests() >= options.rpm:
            index = len(self._times) - options.rpm
            return self._come_back("requests", 1, index=index, options=options, now=now)
        if options.tpm and self._used_tokens() + tokens > options.tpm:
            surplus = self._dropped_total + self._used_tokens() + tokens - options.tpm
            index = bisect_left(self._totals, surplus, lo=self._head)
            return self._come_back("tokens", tokens, index=index, options=options, now=now)
        return None

    def _come_back(
        self, name: str, asked: int, *, index: int, options: Options, now: float
    ) -> Refusal:
        """Refused until the entry at `index` has left the window."""
        limit = options.rpm if name == "requests" else options.tpm
        window_s = options.limit_window_s
        wait_s = window_s  # for what is larger than the whole limit and will never fit
        if index < len(self._times):
            wait_s += self._times[index] - now
        return Refusal(
            limit=name,
            value=limit,
            message=f"Rate limit reached on {name} per {window_s:g} s: limit {limit}, "
            f"requested {asked}. Please try again in {wait_s:.3f}s.",
            retry_after_ms=max(1, int(wait_s * 1000) + 1),
        )


class _Buckets:
    """What is missing in the buckets of requests and tokens; it flows back all the time."""

    def __init__(self) -> None:
        self._missing = [0.0, 0.0]
        self._at = 0.0

    def admit(self, options: Options, tokens: int, in_flight: int, now: float) -> Refusal | None:
        """Take from both, or say why not."""
        if options.max_concurrent and in_flight >= options.max_concurrent:
            message = f"Too many concurrent requests: limit {options.max_concurrent}."
            return Refusal(limit="concurrency", message=message, retry_after_ms=100)
        self._flow(options, now)
        asked = (("requests", options.rpm, 1), ("tokens", options.tpm, tokens))
        for n, (name, limit, amount) in enumerate(asked):
            surplus = self._missing[n] + amount - limit
            if limit and surplus > 0:
                wait_s = surplus * options.limit_window_s / limit
                message = f"Rate limit reached on {name}: limit {limit}, requested {amount}. "
                return Refusal(
                    limit=name,
                    value=limit,
                    message=f"{message}Please try again in {wait_s:.3f}s.",
                    retry_after_ms=max(1, int(wait_s * 1000) + 1),
                )
        self._missing = [self._missing[0] + 1, self._missing[1] + tokens]
        return None

    def used(self, options: Options, now: float) -> tuple[int, int, float]:
        """Missing requests and tokens, and seconds until nothing is missing."""
        self._flow(options, now)
        shares = [
            missing / limit
            for missing, limit in zip(self._missing, (options.rpm, options.tpm), strict=True)
            if limit
        ]
        reset_s = max(shares, default=0.0) * options.limit_window_s
        return round(self._missing[0]), round(self._missing[1]), reset_s

    def _flow(self, options: Options, now: float) -> None:
        passed = max(0.0, now - self._at) / options.limit_window_s
        limits = (options.rpm, options.tpm)
        self._missing = [
            max(0.0, missing - limit * passed)
            for missing, limit in zip(self._missing, limits, strict=True)
        ]
        self._at = now


def _duration(seconds: float) -> bytes:
    """As OpenAI writes it: 120ms, 8.64s, 6m0s."""
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    return (f"{int(minutes)}m{text}" if minutes else text).encode()
