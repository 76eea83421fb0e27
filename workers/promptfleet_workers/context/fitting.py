"""Fit one request to the models that may answer it; pure, and slow where the request is long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from promptfleet_shared.jobs import ClaimedJob, JobKind
from promptfleet_shared.policies.context import ContextPolicy, ContextSection
from promptfleet_workers.context import bm25, choosing
from promptfleet_workers.context.chats import Chat, read_chat, summary_turn
from promptfleet_workers.context.cutting import cut
from promptfleet_workers.context.errands import Answers, Errand, embedding_errand, summary_errand
from promptfleet_workers.context.estimates import Estimates, Size
from promptfleet_workers.context.turns import Split, split, text_of, transcript
from promptfleet_workers.context.windows import Window
from promptfleet_workers.providers.responses import read_json

Message = Mapping[str, Any]

MAX_EMBEDDED_TURNS = 256
MAX_EMBEDDED_CHARS = 8_000
MAX_TRANSCRIPT_CHARS = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What became of a request.

    Attributes:
        models: Those that can hold it now, in their order; empty if none can.
        request: What is to be sent instead; None where it stays as it is.
        counted: Input tokens as they were counted for the first of the models.
        tokens: The same, rather too many than too few; what is sent, not what came in.
        facts: For the job's `decision`.
        errands: What has to be known first; then nothing else is said here.
    """

    models: tuple[str, ...] = ()
    request: str | None = None
    counted: int = 0
    tokens: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    errands: tuple[Errand, ...] = ()


class _Waits(Exception):  # noqa: N818 - no error: what it waits for has to come first
    def __init__(self, *errands: Errand) -> None:
        super().__init__()
        self.errands = errands


def fit(
    job: ClaimedJob,
    request: str,
    models: Mapping[str, Window | None],
    *,
    section: ContextSection,
    estimates: Estimates,
    answers: Answers,
) -> Fitted:
    """Find the models that hold a request, or make it smaller by the policy if none does.

    Args:
        job: Whose request it is.
        request: What is to be sent, as JSON.
        models: The window of each model that may answer, the best first; None where it is unknown.
        section: The policy.
        estimates: Counts tokens.
        answers: What is known of errands.
    """
    chat = read_chat(request) if job.kind is JobKind.CHAT else None
    if chat is None:
        return _holding_text(request, models, section, estimates)
    sizes = {
        name: estimates.size(chat.body, chat.messages, window.vocabulary)
        for name, window in models.items()
        if window is not None
    }
    fits = tuple(
        name
        for name, window in models.items()
        if window is None
        or sizes[name].total <= window.room(chat.wanted, section.reserve_output_tokens)
    )
    if fits:
        return _held(models, fits, sizes)
    if section.policy is ContextPolicy.ERROR:
        return _refused(models, chat, section, sizes)
    return _squeezed(
        job, chat, models, sizes=sizes, section=section, estimates=estimates, answers=answers
    )


def _squeezed(
    job: ClaimedJob,
    chat: Chat,
    models: Mapping[str, Window | None],
    *,
    sizes: Mapping[str, Size],
    section: ContextSection,
    estimates: Estimates,
    answers: Answers,
) -> Fitted:
    """No model can hold it: make it fit the one with the most room."""
    rooms = {
        name: window.room(chat.wanted, section.reserve_output_tokens)
        for name, window in models.items()
        if window is not None
    }
    name = max(rooms, key=rooms.__getitem__)
    window = models[name]
    fitting = _Fitting(
        job,
        chat,
        size=sizes[name],
        room=rooms[name],
        section=section,
        estimates=estimates,
        vocabulary=window.vocabulary if window else name,
        answers=answers,
    )
    try:
        messages = fitting.messages()
    except _Waits as waits:
        return Fitted(errands=waits.errands)
    facts = {
        "policy": section.policy.value,
        "tokens": sizes[name].total,
        "room": rooms[name],
        **fitting.facts,
    }
    if messages is None:
        return Fitted(facts=facts)
    return _made_smaller(chat, messages, models, section=section, estimates=estimates, facts=facts)


def _held(
    models: Mapping[str, Window | None], fits: tuple[str, ...], sizes: Mapping[str, Size]
) -> Fitted:
    skipped = [name for name in models if name not in fits]
    size = sizes.get(fits[0])
    facts: dict[str, Any] = {"skipped": skipped} if skipped else {}
    if size is not None:
        facts["tokens"] = size.total
    return Fitted(
        models=fits,
        counted=size.counted if size else 0,
        tokens=size.total if size else 0,
        facts=facts if skipped else {},
    )


def _refused(
    models: Mapping[str, Window | None],
    chat: Chat,
    section: ContextSection,
    sizes: Mapping[str, Size],
) -> Fitted:
    """Only what is too long for sure is refused unasked: the rest is the provider's to judge."""
    perhaps = tuple(
        name
        for name, window in models.items()
        if window is None
        or sizes[name].least <= window.room(chat.wanted, section.reserve_output_tokens)
    )
    facts = {"policy": section.policy.value, "tokens": min(s.least for s in sizes.values())}
    if not perhaps:
        return Fitted(facts=facts)
    return dataclasses.replace(_held(models, perhaps, sizes), facts={})


def _made_smaller(
    chat: Chat,
    messages: Sequence[Message],
    models: Mapping[str, Window | None],
    *,
    section: ContextSection,
    estimates: Estimates,
    facts: dict[str, Any],
) -> Fitted:
    """What was made to fit the largest model may fit others, too."""
    held = []
    size: Size | None = None
    for other, window in models.items():
        if window is None:
            continue
        its = estimates.size(chat.body, messages, window.vocabulary)
        if its.total <= window.room(chat.wanted, section.reserve_output_tokens):
            held.append(other)
            size = size or its
    if size is None:
        return Fitted(facts=facts)
    skipped = [other for other in models if other not in held]
    if skipped:
        facts["skipped"] = skipped
    facts["sent_tokens"] = size.total
    return Fitted(
        models=tuple(held),
        request=chat.with_messages(messages),
        counted=size.counted,
        tokens=size.total,
        facts=facts,
    )


def _holding_text(
    request: str,
    models: Mapping[str, Window | None],
    section: ContextSection,
    estimates: Estimates,
) -> Fitted:
    """A prompt or an input has no turns: it fits a model or it does not."""
    body = read_json(request.encode("utf-8", "surrogatepass"))
    value = body.get("prompt", body.get("input", body.get("messages")))
    wanted = body.get("max_tokens") if isinstance(body.get("max_tokens"), int) else None
    reserve = section.reserve_output_tokens if "prompt" in body else 0
    messages = [{"role": "", "content": text} for text in _texts(value)]
    sizes = {
        name: estimates.size({}, messages, window.vocabulary)
        for name, window in models.items()
        if window is not None
    }
    fits = tuple(
        name
        for name, window in models.items()
        if window is None or sizes[name].least <= window.room(wanted, reserve)
    )
    if fits:
        return _held(models, fits, sizes)
    least = min(size.least for size in sizes.values())
    return Fitted(facts={"policy": ContextPolicy.ERROR.value, "tokens": least})


def _texts(value: object) -> list[str]:
    """The longest of what may be many prompts: each is read by itself."""
    if isinstance(value, str):
        return [value]
    texts = [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
    return [max(texts, key=len)] if texts else []


class _Fitting:
    """Makes one chat smaller for one model."""

    def __init__(
        self,
        job: ClaimedJob,
        chat: Chat,
        *,
        size: Size,
        room: int,
        section: ContextSection,
        estimates: Estimates,
        vocabulary: str,
        answers: Answers,
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._job = job
        self._chat = chat
        self._size = size
        self._section = section
        self._estimates = estimates
        self._vocabulary = vocabulary
        self._answers = answers
        self._parts: Split = split(chat.messages)
        self._turns = [sum(size.messages[place] for place in turn) for turn in self._parts.turns]
        fixed = sum(size.messages[place] for place in [*self._parts.pinned, *self._parts.last])
        self._left = room - size.rest - fixed

    def messages(self) -> list[Message] | None:
        """The messages that fit; None if that can't be done."""
        if self._left < 0:
            return self._with_last_turn_cut()
        if self._section.policy is ContextPolicy.SUMMARIZE:
            summarised = self._summarised()
            if summarised is not None:
                return summarised
        return self._kept(self._choose())

    def _choose(self) -> list[int]:
        match self._section.policy:
            case ContextPolicy.MIDDLE_OUT:
                return choosing.from_both_ends(self._turns, self._left)
            case ContextPolicy.RELEVANCE:
                return choosing.most_relevant(self._turns, self._left, self._scores())
            case _:
                return choosing.newest(self._turns, self._left)

    def _kept(self, kept: Sequence[int]) -> list[Message]:
        self.facts["left_out"] = len(self._turns) - len(kept)
        return [self._chat.messages[place] for place in self._parts.places(kept)]

    # -- relevance ---------------------------------------------------------------------------

    def _scores(self) -> list[float]:
        question = text_of([self._chat.messages[place] for place in self._parts.last])
        texts = [
            text_of([self._chat.messages[place] for place in turn]) for turn in self._parts.turns
        ]
        model = self._section.embedding_model
        if model is not None:
            found = self._cosines(question, texts, model)
            if found is not None:
                return found
            self.facts["relevance"] = "bm25, for want of embeddings"
        return bm25.scores(question, texts)

    def _cosines(self, question: str, texts: list[str], model: str) -> list[float] | None:
        first = max(0, len(texts) - MAX_EMBEDDED_TURNS)
        asked = [
            embedding_errand(self._job, text[:MAX_EMBEDDED_CHARS] or " ", model)
            for text in [question, *texts[first:]]
        ]
        missing = [errand for errand in asked if errand.key not in self._answers]
        if missing:
            raise _Waits(*asked)
        vectors = [_vector(self._answers[errand.key]) for errand in asked]
        if vectors[0] is None:
            return None
        return [0.0] * first + bm25.cosines(vectors[0], vectors[1:])

    # -- summaries ---------------------------------------------------------------------------

    def _summarised(self) -> list[Message] | None:
        """The oldest turns replaced by their summary; None where there is none to be had."""
        section = self._section
        if section.summary_tier is None:
            self.facts["summary"] = "no summary_tier"
            return None
        frame = self._size_of(summary_turn(""))
        beside = self._left - frame - section.summary_tokens
        if beside < 0:
            return None  # no room for a summary: the newest turns are worth more
        count = choosing.to_summarise(self._turns, beside)
        old = [self._chat.messages[place] for turn in self._parts.turns[:count] for place in turn]
        text = cut(transcript(old), MAX_TRANSCRIPT_CHARS, len, keep_both_ends=True)
        errand = summary_errand(
            self._job,
            text or "",
            tier=section.summary_tier,
            model=None,
            tokens=section.summary_tokens,
        )
        if errand.key not in self._answers:
            raise _Waits(errand)
        answer = self._answers[errand.key]
        if answer is None or not answer.text:
            self.facts["summary"] = "failed"
            return None
        kept = list(range(count, len(self._turns)))
        room = self._left - frame - sum(self._turns[n] for n in kept)
        summary = cut(answer.text, room, self._tokens, keep_both_ends=True)
        if summary is None:
            return None
        self.facts |= {"left_out": count, "summary": "made"}
        return self._with_summary(summary, kept)

    def _with_summary(self, summary: str, kept: Sequence[int]) -> list[Message]:
        """The summary where the first turn was: behind the system messages that begin the chat."""
        at = self._parts.turns[0][0]
        places = self._parts.places(kept)
        before = [self._chat.messages[place] for place in places if place < at]
        after = [self._chat.messages[place] for place in places if place >= at]
        return [*before, *summary_turn(summary), *after]

    # -- a last turn that is too long by itself -----------------------------------------------

    def _with_last_turn_cut(self) -> list[Message] | None:
        if not self._section.cut_last_turn:
            return None
        place = self._longest()
        if place is None:
            return None
        message = self._chat.messages[place]
        field, text = _longest_text(message)
        others = self._size.messages[place] - self._tokens(text)
        keep_both_ends = self._section.policy is not ContextPolicy.TRUNCATE
        room = self._size.messages[place] + self._left - max(0, others)

        def with_text(shorter: str) -> Message:
            return _with_text(message, field, shorter)

        def count(shorter: str) -> int:
            return self._estimates.message(with_text(shorter), self._vocabulary) - max(0, others)

        shorter = cut(text, room, count, keep_both_ends=keep_both_ends)
        if shorter is None:
            return None
        self.facts |= {"left_out": len(self._turns), "cut": True}
        return [
            with_text(shorter) if n == place else self._chat.messages[n]
            for n in self._parts.places([])
        ]

    def _longest(self) -> int | None:
        """The longest message of the last turn that the user wrote."""
        places = [n for n in self._parts.last if self._chat.messages[n].get("role") == "user"]
        return max(
            places, key=lambda n: len(_longest_text(self._chat.messages[n])[1]), default=None
        )

    def _size_of(self, messages: Sequence[Message]) -> int:
        return sum(self._estimates.message(message, self._vocabulary) for message in messages)

    @property
    def _tokens(self) -> Callable[[str], int]:
        return lambda text: self._estimates.text(text, self._vocabulary)


def _longest_text(message: Message) -> tuple[int | None, str]:
    """The longest text of a message, and in which part of it; None where it has no parts."""
    content = message.get("content")
    if isinstance(content, str):
        return None, content
    parts = content if isinstance(content, list) else []
    texts = [
        (n, part["text"])
        for n, part in enumerate(parts)
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    ]
    return max(texts, key=lambda item: len(item[1]), default=(None, ""))


def _with_text(message: Message, field: int | None, text: str) -> Message:
    if field is None:
        return {**message, "content": text}
    parts = list(message["content"])
    parts[field] = {**parts[field], "text": text}
    return {**message, "content": parts}


def _vector(answer: object) -> list[float] | None:
    """The embedding of an answer in OpenAI's shape; None where there is none."""
    text = getattr(answer, "response", None)
    data = read_json(text.encode()) if isinstance(text, str) else None
    items = data.get("data") if isinstance(data, dict) else None
    first = items[0] if isinstance(items, list) and items else None
    vector = first.get("embedding") if isinstance(first, dict) else None
    return vector if isinstance(vector, list) else None
