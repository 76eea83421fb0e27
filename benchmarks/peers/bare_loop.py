"""The limit: one asyncio loop over our HTTP client, with no queue, no database and no promise.

    python -m benchmarks.peers.bare_loop PROVIDER_URL PROMPTS CONCURRENCY OUTPUT

Asks PROMPTS different prompts, CONCURRENCY at a time, writes the instant at which each answer was
decoded to OUTPUT (a JSON list of Unix seconds) and then waits to be stopped.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import uvloop

from promptfleet_shared.fleet import TimeoutOptions
from promptfleet_workers.providers.http import Endpoint, HttpClient

Post = Callable[[bytes], Awaitable[bytes]]


@asynccontextmanager
async def our_client(provider_url: str) -> AsyncIterator[Post]:
    """What sends a body to the provider: the client that the workers use."""
    client = HttpClient()
    endpoint = Endpoint(f"{provider_url}/v1/chat/completions", {"authorization": "Bearer none"})
    timeouts = TimeoutOptions()

    async def post(body: bytes) -> bytes:
        response = await client.post(endpoint, body, timeouts)
        assert response.status == 200, response.body
        return response.body

    try:
        yield post
    finally:
        await client.aclose()


async def ask_all(provider_url: str, prompts: int, concurrency: int) -> list[float]:
    """When each answer was there, in Unix seconds."""
    finished: list[float] = []
    numbers = iter(range(prompts))
    async with our_client(provider_url) as post, asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(_ask_one_by_one(post, numbers, finished))
    return finished


async def _ask_one_by_one(post: Post, numbers: Iterator[int], finished: list[float]) -> None:
    for number in numbers:
        answer = orjson.loads(await post(_body(number)))
        assert answer["choices"][0]["message"]["content"]
        finished.append(time.time())


def _body(number: int) -> bytes:
    message = {"role": "user", "content": f"Question {number}: how are you?"}
    return orjson.dumps({"model": "simulated", "messages": [message]})


def main() -> None:
    """Run what the command line says."""
    provider_url, prompts, concurrency, output = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        finished = runner.run(ask_all(provider_url, int(prompts), int(concurrency)))
    written = Path(f"{output}.new")
    written.write_bytes(orjson.dumps(finished))
    written.replace(output)
    # Our CPU time can be read as long as we live.
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
