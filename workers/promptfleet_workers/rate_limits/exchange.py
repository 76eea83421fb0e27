"""The fleet's limits in Redis: questions of the same moment are one round trip.

Redis may be slow, away or empty. Then this worker keeps its share of the limits by itself, and
looks once a second whether the fleet can be asked again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.resources
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_workers.rate_limits.asking import (
    Grant,
    News,
    Pieces,
    Reservation,
    Verdict,
    WindowMemory,
    unused,
)
from promptfleet_workers.rate_limits.keys import MICROSECONDS, LimitKey
from promptfleet_workers.rate_limits.local import LocalLimits, Share

log = logging.getLogger(__name__)

PREFIX = "promptfleet:{limits}:"
"""In braces, so that a cluster keeps all of them in one place: a script needs that."""
TIMEOUT_S = 1.0
AGAIN_S = 1.0
"""Between two looks whether Redis is there again."""
MAX_CALLS = 200
"""In one script call, so that Redis is not held up for long."""
LEASE_S = 20.0
"""A permit lasts so long without being renewed: that of a worker that died."""
LONGEST_S = 600.0
"""The longest wait that is told: what is true for longer is not known."""
UNSURE_S = 3.0
"""The same where a call's cost is a mere guess."""
CHANGED = f"{PREFIX}changed"
"""The windows that were changed since they were last kept."""

_Waiting = tuple[Reservation, "asyncio.Future[Grant]"]


class FleetLimits:
    """Asks Redis for the whole worker; on its event loop only."""

    def __init__(
        self,
        url: str,
        local: LocalLimits,
        *,
        patience_s: float,
        headroom: float,
        memory: WindowMemory | None = None,
        timeout_s: float = TIMEOUT_S,
        lease_s: float = LEASE_S,
        again_s: float = AGAIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect with the first question.

        Args:
            url: As in redis://user:password@host:6379/0.
            local: Decides while Redis can't be asked.
            patience_s: Seconds that a call waits in the worker.
            headroom: The share of a minute's limit that is left unused.
            memory: Knows what was used of windows that Redis has lost; None: nobody does.
            timeout_s: Seconds that a round trip may take.
            lease_s: Seconds after which the permit of a dead worker's call is free again.
            again_s: Seconds between two looks whether a lost Redis is back.
            clock: Gives steady seconds.
        """
        self._local = local
        self._memory = memory
        self._owed: dict[str, tuple[LimitKey, float]] = {}
        self._terms = {
            "kept": memory is not None,
            "worker": uuid.uuid4().hex,
            "patience": int(patience_s * MICROSECONDS),
            "headroom": headroom,
            "lease": int(lease_s * MICROSECONDS),
            "longest": int(LONGEST_S * MICROSECONDS),
            "unsure": int(UNSURE_S * MICROSECONDS),
        }
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._again_s = again_s
        self._clock = clock
        self._waiting: list[_Waiting] = []
        self._news = News()
        self._held: dict[tuple[str, str], LimitKey] = {}
        self._asking: asyncio.Task[None] | None = None
        self._lost_until = self._forgetful_until = float("-inf")
        self._is_lost = False
        self._redis = impatient_client(url, connect_s=timeout_s)
        files = importlib.resources.files("promptfleet_workers.rate_limits")
        self._script = self._redis.register_script(files.joinpath("reserve.lua").read_text("utf-8"))

    async def reserve(self, reservation: Reservation) -> Grant:
        """Ask for leave to make a call, together with all who ask at this moment."""
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._waiting.append((reservation, future))
        self._ask_soon()
        try:
            return await future
        except asyncio.CancelledError:
            # Leave that came too late: who asked has been given up in the same moment.
            if future.done() and not future.cancelled():
                self._undo(reservation, future.result())
            raise

    def tell(self, news: News) -> None:
        """Tell with the next question, or by itself."""
        for name in ("settled", "returned", "refusals", "outcomes", "told"):
            getattr(self._news, name).extend(getattr(news, name))
        for key, permit in news.returned:
            self._held.pop((key.name, permit), None)
        self._ask_soon()

    async def run(self) -> None:
        """Renew the permits until cancelled, and be seen by the other workers."""
        while True:
            await self._exchange([], News(), renews=True)
            await asyncio.sleep(self._lease_s / 4)

    async def aclose(self) -> None:
        """Tell what is left, and close the connection."""
        while self._asking is not None:
            await asyncio.wait([self._asking])
        await self._redis.aclose()

    # -- one round trip for all ------------------------------------------------------------

    def _ask_soon(self) -> None:
        if self._asking is None:
            # Whoever else asks before the loop's next turn, or during the round trip, shares one.
            self._asking = asyncio.get_running_loop().create_task(self._ask_all())

    async def _ask_all(self) -> None:
        try:
            while self._waiting or self._news:
                asked = self._waiting[:MAX_CALLS]
                del self._waiting[:MAX_CALLS]
                news, self._news = self._news, News()
                await self._exchange(asked, news)
        finally:
            self._asking = None

    async def _exchange(
        self, asked: Sequence[_Waiting], news: News, *, renews: bool = False
    ) -> None:
        live = [(reservation, future) for reservation, future in asked if not future.done()]
        reservations = [reservation for reservation, _ in live]
        if self._clock() < self._lost_until:
            grants = self._alone(reservations, news)
        else:
            try:
                async with asyncio.timeout(self._timeout_s):
                    grants = await self._ask(reservations, news, renews=renews)
            except REDIS_FAILURES as error:
                self._say_lost(error)
                # What was settled may have come through: rather twice than not at all.
                settled = [(key, cost) for key, cost in news.settled if cost > 0]
                grants = self._alone(reservations, dataclasses.replace(news, settled=settled))
            else:
                grants = await self._with_memory(reservations, grants)
        for (reservation, future), grant in zip(live, grants, strict=True):
            if grant.verdict is Verdict.GO:
                self._hold(reservation)
            if future.done():
                self._undo(reservation, grant)
            else:
                future.set_result(grant)

    def _undo(self, reservation: Reservation, grant: Grant) -> None:
        """Give back what nobody is there to use."""
        if grant.verdict is Verdict.GO:
            self.tell(unused(reservation))

    def _hold(self, reservation: Reservation) -> None:
        for key, _ in reservation.items:
            if key.kind == "permits":
                self._held[key.name, reservation.id] = key

    def _alone(self, reservations: Sequence[Reservation], news: News) -> list[Grant]:
        self._local.hear(news)
        for key, difference in news.settled:
            self._owe(key, difference)
        grants = [self._local.decide(reservation) for reservation in reservations]
        for reservation, grant in zip(reservations, grants, strict=True):
            for key, cost in reservation.items if grant.verdict is Verdict.GO else ():
                self._owe(key, cost)
        return grants

    def _owe(self, key: LimitKey, cost: float) -> None:
        """What counts for hours is told once the fleet can be told."""
        if key.kind == "window":
            self._owed[key.name] = (key, self._owed.get(key.name, (key, 0.0))[1] + cost)

    async def _with_memory(
        self, reservations: Sequence[Reservation], grants: list[Grant]
    ) -> list[Grant]:
        """Ask again where Redis has to be told first what was used of a window; else alone."""
        unknown = [n for n, grant in enumerate(grants) if grant.verdict is Verdict.UNKNOWN]
        if not unknown:
            return grants
        asked = [reservations[n] for n in unknown]
        again = await self._ask_telling(asked) or self._alone(asked, News())
        answers = dict(zip(unknown, again, strict=True))
        return [answers.get(n, grant) for n, grant in enumerate(grants)]

    async def _ask_telling(self, asked: Sequence[Reservation]) -> list[Grant] | None:
        if self._memory is None or self._clock() < self._forgetful_until:
            return None
        windows = {key.name: key for each in asked for key, _ in each.items if key.kind == "window"}
        try:
            async with asyncio.timeout(self._timeout_s):
                used = await self._memory.recall(list(windows.values()))
                recalled = [(key, used.get(name, [])) for name, key in windows.items()]
                grants = await self._ask(asked, News(), renews=False, recalled=recalled)
        except (*REDIS_FAILURES, StoreRefusedError, StoreUnavailableError) as error:
            self._forgetful_until = self._clock() + self._again_s
            facts = {"error": type(error).__name__, "windows": len(windows)}
            log.warning("limit_windows_unknown", extra=facts)
            return None
        return None if any(grant.verdict is Verdict.UNKNOWN for grant in grants) else grants

    async def _ask(
        self,
        reservations: Sequence[Reservation],
        news: News,
        *,
        renews: bool,
        recalled: Sequence[tuple[LimitKey, Pieces]] = (),
    ) -> list[Grant]:
        question = _Question(self._terms)
        for reservation in reservations:
            question.add(reservation)
        question.add_news(news, self._held if renews else {})
        question.recall(recalled)
        reply = await self._script(keys=question.redis_keys, args=[question.json()])
        self._found(Share(workers=int(reply[0]), place=int(reply[1])))
        return [
            Grant(
                verdict=Verdict(reply[n]),
                wait_s=reply[n + 1] / MICROSECONDS,
                decisive=question.keys[reply[n + 2] - 1] if reply[n + 2] else None,
            )
            for n in range(2, len(reply), 3)
        ]

    def _found(self, share: Share) -> None:
        self._local.share = share
        if self._owed:
            owed, self._owed = self._owed, {}
            self.tell(News(settled=list(owed.values())))
        if self._is_lost:
            log.warning("limits_found", extra={"workers": share.workers})
        self._is_lost = False

    def _say_lost(self, error: Exception) -> None:
        self._lost_until = self._clock() + self._again_s
        if not self._is_lost:
            facts = {"error": type(error).__name__, "workers": self._local.share.workers}
            log.warning("limits_alone", extra=facts)
        self._is_lost = True


class _Question:
    """One question as reserve.lua reads it: keys by their numbers, from 1."""

    def __init__(self, terms: dict[str, Any]) -> None:
        self._terms = terms
        self._numbers: dict[str, int] = {}
        self.keys: list[LimitKey] = []
        self._calls: list[dict[str, Any]] = []
        self._news: dict[str, list[Any]] = {}

    def add(self, reservation: Reservation) -> None:
        items = [(self._number(key), cost) for key, cost in reservation.items]
        self._calls.append(
            {
                "id": reservation.id,
                "items": items,
                "turn": reservation.turn,
                "sure": reservation.sure,
                "probe": reservation.probe,
            }
        )

    def add_news(self, news: News, held: dict[tuple[str, str], LimitKey]) -> None:
        number = self._number
        self._news = {
            "settled": [(number(key), difference) for key, difference in news.settled],
            "returned": [(number(key), permit) for key, permit in news.returned],
            "refusals": [(number(key), s * MICROSECONDS) for key, s in news.refusals],
            "outcomes": [(number(health), number(of), ok) for health, of, ok in news.outcomes],
            "told": [(number(key), limit, s * MICROSECONDS) for key, limit, s in news.told],
            "renewed": [(number(key), permit) for (_, permit), key in held.items()],
        }

    def recall(self, windows: Sequence[tuple[LimitKey, Pieces]]) -> None:
        if windows:
            self._news["recalled"] = [(self._number(key), pieces) for key, pieces in windows]

    @property
    def redis_keys(self) -> list[str]:
        changed = [CHANGED] if self._terms.get("kept") else []
        return [f"{PREFIX}workers", *(f"{PREFIX}{key.name}" for key in self.keys), *changed]

    def json(self) -> bytes:
        keys = [
            {
                "kind": key.kind,
                "limit": key.limit,
                "period": key.period_us,
                "health": None if key.health is None else self._numbers.get(key.health),
                "adaptive": key.adaptive,
                "tenant": key.tenant if key.kind == "window" else None,
            }
            for key in self.keys
        ]
        present = [{name: v for name, v in key.items() if v is not None} for key in keys]
        return orjson.dumps({**self._terms, **self._news, "keys": present, "calls": self._calls})

    def _number(self, key: LimitKey) -> int:
        number = self._numbers.get(key.name)
        if number is None:
            self.keys.append(key)
            number = self._numbers[key.name] = len(self.keys)
        return number
