"""A worker's breakers in a process of their own: it asks without end, and says what it may.

Redis tells it how the provider is: `hold` (1: a call never ends) and `healthy`. It notes the calls
it starts in `starts`, how often it asked in `asked:NAME`, and itself in `open` while it is that.
"""

from __future__ import annotations

import asyncio
import sys

import redis.asyncio

from promptfleet_shared.fleet import BreakerOptions
from promptfleet_workers.breaker import BreakerState, Permit
from promptfleet_workers.breaker_exchange import BreakerExchange
from promptfleet_workers.breakers import Breakers

OPTIONS = BreakerOptions(window_s=3, cool_down_s=0.2, max_cool_down_s=60, ramp_s=0.5)


async def main(url: str, name: str) -> None:
    breakers = Breakers({"a": 4}, options=OPTIONS, emit=lambda _: None)
    exchange = BreakerExchange(breakers, url, interval_s=0.05, idle_s=0.1)
    running = asyncio.create_task(exchange.run())
    async with redis.asyncio.Redis.from_url(url, decode_responses=True) as server:
        print("ready", flush=True)
        while not running.done():
            answer = breakers.admit("a", retry=False)
            await server.incr(f"asked:{name}")
            if isinstance(answer, Permit):
                await server.rpush("starts", name)
                while await server.get("hold") == "1":
                    await asyncio.sleep(0.02)
                breakers.ended(answer, ok=await server.get("healthy") == "1")
            closed = breakers.snapshot()[0].state is BreakerState.CLOSED
            await (server.srem if closed else server.sadd)("open", name)
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
