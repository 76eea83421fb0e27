"""A worker's limits in a process of their own: it makes calls without end, as fast as it may.

Each call is noted in Redis while it lasts (`calls`) with the most that there were (`most`), and
every start in `starts` with the server's time.
"""

from __future__ import annotations

import asyncio
import sys
import uuid

import redis.asyncio

from promptfleet_workers.rate_limits.asking import Reservation, Verdict, unused
from promptfleet_workers.rate_limits.exchange import FleetLimits
from promptfleet_workers.rate_limits.keys import LimitKey
from promptfleet_workers.rate_limits.local import LocalLimits

PERMITS = LimitKey(name="test:permits", label="permits", kind="permits", limit=5)
NOTE = """
local now = redis.call('INCR', 'calls')
if now > tonumber(redis.call('GET', 'most') or '0') then redis.call('SET', 'most', now) end
redis.call('INCR', 'made')
"""


async def call(limits: FleetLimits, server: redis.asyncio.Redis, hold_s: float) -> None:
    while True:
        reservation = Reservation(id=uuid.uuid4().hex, items=[(PERMITS, 0.0)])
        grant = await limits.reserve(reservation)
        if grant.verdict is not Verdict.GO:
            await asyncio.sleep(0.005)
            continue
        await server.eval(NOTE, 0)
        await asyncio.sleep(hold_s)
        await server.decr("calls")
        limits.tell(unused(reservation))


async def main(url: str, hold_s: float, lease_s: float) -> None:
    local = LocalLimits(patience_s=1, headroom=0.02)
    limits = FleetLimits(url, local, patience_s=1, headroom=0.02, lease_s=lease_s, timeout_s=10)
    async with redis.asyncio.Redis.from_url(url) as server, asyncio.TaskGroup() as group:
        group.create_task(limits.run())
        for _ in range(8):
            group.create_task(call(limits, server, hold_s))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
