"""What is known of a job's token stream, and how a reader goes through it. No I/O."""

from __future__ import annotations

from bisect import bisect_right

from promptfleet_shared.jobs import JobState, Result
from promptfleet_shared.token_stream import (
    LAST_TAKE,
    NO_TAKE,
    Entry,
    EventKind,
    Position,
    StreamEvent,
    Take,
)


class Transcript:
    """The newest take's text, as far as its entries came without a gap.

    Attributes:
        take: Which one; `NO_TAKE` before the first entry.
        length: Characters of its text.
        state: How the job ended, once its stream tells.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self.take: Take = NO_TAKE
        self.length = 0
        self.state: JobState | None = None
        self._pieces: list[str] = []
        self._starts: list[int] = []

    def add(self, entry: Entry) -> None:
        """Take in the next entry; one that is known already, or comes after a gap, adds nothing."""
        if entry.take < self.take:
            return  # a worker that lost its claim
        if entry.take > self.take:
            self.take, self.length = entry.take, 0
            self._pieces, self._starts = [], []
        self.state = entry.state or self.state
        if entry.at > self.length:
            return
        fresh = entry.text[self.length - entry.at :]
        if fresh:
            self._pieces.append(fresh)
            self._starts.append(self.length)
            self.length += len(fresh)

    def since(self, at: int) -> str:
        """The text after its first `at` characters."""
        if at >= self.length:
            return ""
        n = bisect_right(self._starts, at) - 1
        return "".join([self._pieces[n][at - self._starts[n] :], *self._pieces[n + 1 :]])


class Reader:
    """Goes through a transcript, and in the end through the result.

    Attributes:
        position: Where it stands.
    """

    def __init__(self, after: str | None = None) -> None:
        """Begin at the start, or after the event with this id."""
        self.position = Position()
        self._is_lost = False
        if after is not None:
            known = Position.parse(after)
            self.position = known or Position()
            self._is_lost = known is None

    def read(self, transcript: Transcript) -> list[StreamEvent]:
        """What has come since the last time."""
        if transcript.take < self.position.take or not transcript.length:
            return []
        events = []
        if transcript.take > self.position.take:
            events = self._begin(transcript.take)
        return events + self._go_on(transcript.since(self.position.at))

    def settle(self, result: Result) -> list[StreamEvent]:
        """What is missing of the job's text now that it has ended; the END comes last.

        Of a job without success, what was read stays as it is.
        """
        events = []
        if result.succeeded and result.text is not None:
            text, position = result.text, self.position
            so_far = Position().after(text[: position.at])
            if (so_far.at, so_far.crc) != (position.at, position.crc) or self._is_lost:
                events = self._begin(LAST_TAKE)
            events += self._go_on(text[self.position.at :])
        return [*events, StreamEvent(kind=EventKind.END, id=str(self.position), result=result)]

    def _begin(self, take: Take) -> list[StreamEvent]:
        has_text = self.position.at > 0 or self._is_lost
        self.position = Position(take=take)
        self._is_lost = False
        return [StreamEvent(kind=EventKind.RESET, id=str(self.position))] if has_text else []

    def _go_on(self, text: str) -> list[StreamEvent]:
        if not text:
            return []
        self.position = self.position.after(text)
        return [StreamEvent(kind=EventKind.TOKEN, id=str(self.position), text=text)]
