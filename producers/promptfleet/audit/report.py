"""What an audit finds in a file, and what it suggests, by money."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import orjson

from promptfleet.audit.prefixes import (
    MIN_CACHED_TOKENS,
    Beginning,
    SharedPrefix,
    best_order,
    cached_tokens,
    shared_prefixes,
    signature,
)
from promptfleet.audit.repetitions import Duplicates, Paragraph, Paragraphs
from promptfleet.estimates import Dollars, Estimates, ModelAt, Remembered
from promptfleet_shared.jobs import JobSpec, Usage
from promptfleet_shared.policies.compact import compact_text

MAX_BOILERPLATE = 5
FREE = Decimal(0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """Something to do.

    Attributes:
        code: A short name, for programs.
        text: What, and why.
        tokens: Input tokens that it saves or makes cheaper; 0 where it is about something else.
        usd: US dollars that it saves; None where no price is known.
    """

    code: str
    text: str
    tokens: int
    usd: Decimal | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What was found.

    Attributes:
        output_tokens: Expected.
        usd: As the lines are written; `batch_usd` by the providers' batch APIs.
        all_on: The whole file on each tier, and there by the batch API.
        order: The places of the valid lines in the proposed order.
        cached_now: Input tokens that a prefix cache has in the file's order, one call after the
            other; `cached_then` in the proposed order.
        white_space: Tokens that `compact` saves.
        repeated: Tokens of paragraphs that a prompt has twice.
        boilerplate: Paragraphs of many prompts, and the tokens of one of them each.
    """

    prompts: int
    invalid: int
    input_tokens: int
    output_tokens: int
    longest: tuple[int, int]
    usd: Decimal | None
    batch_usd: Decimal | None
    all_on: Mapping[str, tuple[Decimal | None, Decimal | None]]
    order: Sequence[int]
    prefixes: Sequence[SharedPrefix]
    cached_now: int
    cached_then: int
    white_space: int
    repeated: int
    repeated_prompts: int
    boilerplate: Sequence[tuple[Paragraph, int]]
    duplicates: int
    near_duplicates: int
    near_examples: Sequence[tuple[int, int]]
    unbounded: int
    suggestions: Sequence[Suggestion]


class Auditor:
    """Reads prompts one by one and keeps a few hundred bytes of each."""

    def __init__(self, estimates: Estimates, tiers: Sequence[str]) -> None:
        """Know nothing yet; `tiers` are those that prices are compared for."""
        self._estimates = estimates
        self._beginnings: list[Beginning] = []
        self._paragraphs = Paragraphs()
        self._duplicates = Duplicates()
        self._usd, self._batch_usd = Dollars(), Dollars()
        self._duplicate_usd, self._near_usd = Dollars(), Dollars()
        self._compacted = Remembered[int]()
        self._all_on = {tier: (Dollars(), Dollars()) for tier in tiers}
        self._input = self._output = self._white_space = self._repeated = self._unbounded = 0
        self._chars = 0
        self._longest = (0, 0)
        self._invalid = 0
        # What a million input tokens cost, and what they cost cached, where prompts are asked.
        self._input_usd, self._discount_usd = Dollars(), Dollars()

    def refuse(self) -> None:
        """Count a line that is not valid."""
        self._invalid += 1

    def add(self, spec: JobSpec, line: int) -> None:
        """Look at the next prompt."""
        body = orjson.loads(spec.request)
        texts, whole = _texts(body)
        model = self._estimates.model_of(spec)
        tokens = self._estimates.input_tokens(body, model)
        usage = Usage(
            input=tokens,
            output=self._estimates.output(spec.kind, spec.tier, body.get("max_tokens")).expected,
        )
        price = self._add_prices(spec, usage, body.get("max_tokens"))
        self._input += tokens
        self._output += usage.output
        self._chars += len(whole)
        self._longest = max(self._longest, (tokens, line))
        self._unbounded += "max_tokens" not in body
        self._beginnings.append(
            Beginning(signature=signature(whole), tokens=tokens, chars=len(whole), line=line)
        )
        facts = b"\0".join([spec.tier.encode(), (spec.model or "").encode(), spec.request])
        if self._duplicates.is_repeated(facts, line):
            self._duplicate_usd.add(price)
        elif self._duplicates.is_alike(texts[-1] if texts else "", line):
            self._near_usd.add(price)
        self._add_waste(texts, whole, tokens, line, model)

    def _add_prices(self, spec: JobSpec, usage: Usage, max_tokens: int | None) -> Decimal | None:
        estimates = self._estimates
        model = estimates.model_of(spec)
        price = estimates.cost(model, usage)
        self._usd.add(price)
        self._batch_usd.add(estimates.cost(model, usage, batch=True))
        for tier, (ordinary, batch) in self._all_on.items():
            there = estimates.model_of_tier(tier)
            output = estimates.output(spec.kind, tier, max_tokens).expected
            expected = Usage(input=usage.input, output=output)
            ordinary.add(estimates.cost(there, expected))
            batch.add(estimates.cost(there, expected, batch=True))
        plain = estimates.cost(model, Usage(input=usage.input))
        cached = estimates.cost(model, Usage(input=usage.input, cached=usage.input))
        self._input_usd.add(plain)
        self._discount_usd.add(None if plain is None or cached is None else plain - cached)
        return price

    def _add_waste(
        self, texts: Sequence[str], whole: str, tokens: int, line: int, model: ModelAt | None
    ) -> None:
        for text in texts:
            there = model.there if model else ""
            find = functools.partial(self._white_space_of, text, model)
            self._white_space += self._compacted.of(text, there, find)
        repeated = self._paragraphs.add(whole, line)
        self._repeated += tokens * repeated // max(len(whole), 1)

    def _white_space_of(self, text: str, model: ModelAt | None) -> int:
        shorter = compact_text(text)
        if shorter == text:
            return 0
        count = self._estimates.text_tokens
        return max(0, count(text, model) - count(shorter, model))

    def report(self) -> Audit:
        """What was found in all of them."""
        beginnings = self._beginnings
        file_order = range(len(beginnings))
        order = best_order(beginnings)
        tokens_a_char = self._input / max(self._chars, 1)
        boilerplate = [
            (paragraph, round(paragraph.chars * tokens_a_char))
            for paragraph in self._paragraphs.boilerplate()
        ]
        audit = Audit(
            prompts=len(beginnings),
            invalid=self._invalid,
            input_tokens=self._input,
            output_tokens=self._output,
            longest=self._longest,
            usd=self._usd.total,
            batch_usd=self._batch_usd.total,
            all_on={tier: (a.total, b.total) for tier, (a, b) in self._all_on.items()},
            order=order,
            prefixes=shared_prefixes(beginnings, order),
            cached_now=cached_tokens(beginnings, file_order),
            cached_then=cached_tokens(beginnings, order),
            white_space=self._white_space,
            repeated=self._repeated,
            repeated_prompts=self._paragraphs.prompts_with_repeats,
            boilerplate=boilerplate,
            duplicates=self._duplicates.exact,
            near_duplicates=self._duplicates.near_count,
            near_examples=self._duplicates.near,
            unbounded=self._unbounded,
            suggestions=(),
        )
        return dataclasses.replace(
            audit,
            boilerplate=boilerplate[:MAX_BOILERPLATE],
            suggestions=self._suggestions(audit),
        )

    def _suggestions(self, audit: Audit) -> list[Suggestion]:
        found = [
            *self._about_repetitions(audit),
            *self._about_input(audit),
            *self._about_prices(audit),
        ]
        worth = [item for item in found if item.usd is None or item.usd > 0]
        return sorted(worth, key=lambda item: (item.usd or FREE, item.tokens), reverse=True)

    def _about_repetitions(self, audit: Audit) -> list[Suggestion]:
        found = []
        if audit.duplicates:
            text = (
                f"{audit.duplicates:,} lines repeat an earlier one to the letter: the response"
                " cache answers them without a call."
            )
            found.append(_of("duplicates", text, 0, self._duplicate_usd.total))
        if audit.near_duplicates:
            pairs = ", ".join(f"{one} and {other}" for one, other in audit.near_examples)
            text = (
                f"{audit.near_duplicates:,} lines end nearly like an earlier one (lines {pairs}):"
                " see whether each needs an answer of its own."
            )
            found.append(_of("near_duplicates", text, 0, self._near_usd.total))
        return found

    def _about_input(self, audit: Audit) -> list[Suggestion]:
        found = []
        gained = audit.cached_then - audit.cached_now
        if gained > 0:
            text = (
                f"Put next to each other what begins alike (--reorder): {gained:,} more input"
                " tokens can come from the provider's prefix cache."
            )
            found.append(_of("reorder", text, gained, self._price(gained, self._discount_usd)))
        moving = sum(
            tokens * (paragraph.prompts - 1)
            for paragraph, tokens in audit.boilerplate
            if paragraph.moves
        )
        a_prompt = moving // max(audit.prompts, 1)
        if moving and a_prompt >= MIN_CACHED_TOKENS:
            text = (
                "Put the paragraphs that many prompts share before what is different, best into the"
                f" system message: {moving:,} input tokens could come from the prefix cache."
            )
            found.append(_of("fixed_first", text, moving, self._price(moving, self._discount_usd)))
        if audit.white_space:
            text = f"compact=True leaves out {audit.white_space:,} input tokens of white space."
            usd = self._price(audit.white_space, self._input_usd)
            found.append(_of("compact", text, audit.white_space, usd))
        if audit.repeated:
            text = (
                f"{audit.repeated_prompts:,} prompts say a paragraph twice:"
                f" {audit.repeated:,} input tokens."
            )
            usd = self._price(audit.repeated, self._input_usd)
            found.append(_of("repeated_paragraphs", text, audit.repeated, usd))
        return found

    def _about_prices(self, audit: Audit) -> list[Suggestion]:
        found = []
        if audit.usd and audit.batch_usd is not None:
            text = 'If it may take a day, service="batch": the providers\' batch APIs are cheaper.'
            found.append(_of("batch", text, 0, audit.usd - audit.batch_usd))
        priced = {tier: usd for tier, (usd, _) in audit.all_on.items() if usd is not None}
        if audit.usd and priced:
            cheapest = min(priced, key=lambda tier: priced[tier])
            text = (
                f"Try the tier {cheapest!r} on a sample: if its answers will do, all of it costs"
                f" ${priced[cheapest]:,.4f} there."
            )
            found.append(_of("cheaper_tier", text, 0, audit.usd - priced[cheapest]))
        if audit.unbounded:
            text = (
                f"{audit.unbounded:,} prompts set no max_tokens: nothing bounds what their answers"
                " cost."
            )
            found.append(_of("max_tokens", text, 0, None))
        return found

    def _price(self, tokens: int, price_of_all: Dollars) -> Decimal | None:
        """So many of the file's input tokens at the file's own average."""
        total = price_of_all.total
        return None if total is None else total * tokens / max(self._input, 1)


def _of(code: str, text: str, tokens: int, usd: Decimal | None) -> Suggestion:
    return Suggestion(code=code, text=text, tokens=tokens, usd=usd)


def _texts(body: dict[str, Any]) -> tuple[list[str], str]:
    """The texts of a request, and all that a provider reads of it, in its order."""
    if "messages" not in body:
        text = str(body.get("prompt", body.get("input", "")))
        return [text], text
    texts: list[str] = []
    parts = [orjson.dumps(body["tools"]).decode()] if "tools" in body else []
    for message in body["messages"]:
        content = message.get("content")
        own = [content] if isinstance(content, str) else []
        own += [
            part["text"]
            for part in (content if isinstance(content, list) else ())
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        texts += own
        parts += [f"{message.get('role')}:", *own]
    return texts, "\n\n".join(parts)
