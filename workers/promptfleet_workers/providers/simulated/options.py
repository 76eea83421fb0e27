"""The options of the simulated provider: the same names as flags and at /control."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .markers import Fault, FaultKind

Spread = tuple[float, float]
Mix = tuple[tuple[float, Fault], ...]
LIMIT_KINDS = ("window", "bucket")


def parse_spread(value: object) -> Spread:
    """`50` is fixed, `"100..10000"` is spread evenly; milliseconds."""
    text = "..".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    low, dots, high = text.partition("..")
    spread = (parse_number(low), parse_number(high if dots else low))
    if spread[0] > spread[1]:
        raise ValueError(f"{text!r} ends before it begins")
    return spread


def parse_number(value: object) -> float:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")  # noqa: TRY004 - one error for bad options
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} is not a number of at least 0")
    return number


def parse_count(value: object) -> int:
    """A whole number that is not negative."""
    number = parse_number(value)
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def parse_errors(value: object) -> Mix:
    """`"429:0.05,timeout:0.01"` or a mapping, as cumulated fractions of all calls."""
    mix: list[tuple[float, Fault]] = []
    total = 0.0
    for name, fraction in _shares(value):
        total += parse_number(fraction)
        mix.append((total, _mixed_fault(name)))
    if total > 1 + 1e-9:
        raise ValueError(f"the fractions of {value!r} add up to {total:g}, more than 1")
    return tuple(mix)


def parse_names(value: object) -> tuple[str, ...]:
    """`"a,b"` or a list of names."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} is not a list of names")
    return tuple(name.strip() for name in names if name.strip())


BATCH_FAULTS = frozenset(
    {
        "upload-hang",  # the file is kept, and no answer ever comes
        "create-hang",  # the batch is made, and no answer ever comes
        "create-deaf",  # nothing is made, and no answer ever comes
        "create-502",  # the batch is made, and the answer is a gateway's error
        "look-hang",  # nobody says how a batch stands
        "results-cut",  # results break off in the middle
        "results-hang",  # results stop in the middle, and nothing more comes
        "fail",  # the batch as a whole is refused
        "full",  # there is no room for it
    }
)


def parse_batch_faults(value: object) -> tuple[str, ...]:
    """Names of what goes wrong with batches."""
    names = parse_names(value)
    for name in names:
        if name not in BATCH_FAULTS:
            raise ValueError(f"{name!r} is none of {', '.join(sorted(BATCH_FAULTS))}")
    return names


def parse_limit_kind(value: object) -> str:
    """How rpm and tpm are counted."""
    if not isinstance(value, str) or value not in LIMIT_KINDS:
        raise ValueError(f"{value!r} is none of {', '.join(LIMIT_KINDS)}")
    return value


def parse_key(value: object) -> str | None:
    """A key; null or an empty text for none."""
    if value is not None and not isinstance(value, str):
        raise ValueError("the key is not a text")
    return value or None


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the provider behaves; 0 or empty switches a thing off."""

    latency_ms: Spread = (0.0, 0.0)
    first_token_ms: float = 0.0
    tokens_per_s: float = 0.0
    output_tokens: int = 16
    seed: int = 0
    errors: Mix = ()
    slow_ms: float = 5000.0
    drip_ms: float = 5000.0
    rpm: int = 0
    tpm: int = 0
    max_concurrent: int = 0
    limit_window_s: float = 60.0
    limit_kind: str = "window"
    api_key: str | None = None
    models: tuple[str, ...] = ()
    batch_ms: Spread = (0.0, 0.0)
    batch_expires_s: float = 86_400.0
    batch_cancel_ms: float = 0.0
    batch_faults: tuple[str, ...] = ()

    @property
    def limited(self) -> bool:
        """Whether any rate limit is set."""
        return bool(self.rpm or self.tpm or self.max_concurrent)

    def changed(self, changes: Mapping[str, object]) -> Options:
        """A copy with `changes`, by option name; ValueError names an option that is wrong."""
        parsed: dict[str, Any] = {}
        for name, value in changes.items():
            key = name.replace("-", "_")
            if key not in _PARSERS:
                raise ValueError(f"unknown option {name!r}")
            try:
                parsed[key] = _PARSERS[key][0](value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return dataclasses.replace(self, **parsed)

    def as_dict(self) -> dict[str, object]:
        """For showing: in the forms that `changed` understands, the key hidden."""
        shown: dict[str, object] = {name: getattr(self, name) for name in _PARSERS}
        shown["latency_ms"] = "{:g}..{:g}".format(*self.latency_ms)
        shown["batch_ms"] = "{:g}..{:g}".format(*self.batch_ms)
        shown["api_key"] = None if self.api_key is None else "set"
        before = 0.0
        shares: dict[str, float] = {}
        for total, fault in self.errors:
            name = str(fault.status) if fault.kind is FaultKind.STATUS else fault.kind.value
            shares[name] = round(total - before, 9)
            before = total
        shown["errors"] = shares
        return shown


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each option; those not given are absent from the parsed namespace."""
    for name, (_, meaning) in _PARSERS.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            help=meaning,
            metavar="VALUE",
        )


def options_of(flags: argparse.Namespace) -> Options:
    """The options that were given as flags; ValueError names one that is wrong."""
    return Options().changed(
        {name: value for name, value in vars(flags).items() if name in _PARSERS}
    )


def _shares(value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [(str(name), share) for name, share in value.items()]
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a mix of errors")  # noqa: TRY004 - as above
    shares: list[tuple[str, object]] = []
    for entry in filter(None, (part.strip() for part in value.split(","))):
        name, colon, share = entry.partition(":")
        if not colon:
            raise ValueError(f"{entry!r} lacks its fraction, as in 429:0.05")
        shares.append((name.strip(), share))
    return shares


def _mixed_fault(name: str) -> Fault:
    if name.isdecimal() and 400 <= int(name) <= 599:  # noqa: PLR2004 - HTTP's numbers
        return Fault(kind=FaultKind.STATUS, status=int(name))
    kinds = [kind for kind in FaultKind if kind is not FaultKind.STATUS]
    if name not in kinds:
        raise ValueError(f"{name!r} is none of 400 to 599, {', '.join(kinds)}")
    return Fault(kind=FaultKind(name), status=502)


_PARSERS: dict[str, tuple[Callable[[object], Any], str]] = {
    "latency_ms": (parse_spread, "before anything is sent: 50, or spread evenly: 100..10000"),
    "first_token_ms": (parse_number, "from then to the first token"),
    "tokens_per_s": (parse_number, "speed of the answer; 0 is at once"),
    "output_tokens": (parse_count, "words of an answer (16), up to the request's max_tokens"),
    "seed": (parse_count, "of the latency spread and the error mix"),
    "errors": (parse_errors, "fractions: 429:0.05,500:0.02,timeout:0.01 (also disconnect, ...)"),
    "slow_ms": (parse_number, "how long a 'slow' answer trickles (5000)"),
    "drip_ms": (parse_number, "the pause between two bytes of a 'drip' answer (5000)"),
    "rpm": (parse_count, "requests admitted in any window"),
    "tpm": (parse_count, "tokens, of prompts and answers, admitted in any window"),
    "max_concurrent": (parse_count, "requests in progress"),
    "limit_window_s": (parse_number, "window of rpm and tpm (60); shorter in tests"),
    "limit_kind": (parse_limit_kind, "window (strict; the default), or bucket, full at the start"),
    "api_key": (parse_key, "asked of every request"),
    "models": (parse_names, "the only models there are, as in a,b,c"),
    "batch_ms": (parse_spread, "how long a batch of the batch APIs takes, its lines evenly"),
    "batch_expires_s": (parse_number, "when a batch expires (86400)"),
    "batch_cancel_ms": (parse_number, "how long a batch is being cancelled"),
    "batch_faults": (parse_batch_faults, "of the batch APIs: upload-hang,create-hang,..."),
}
