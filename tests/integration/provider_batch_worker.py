"""Workers that move providers' batches on and do nothing else, to be killed at any moment.

What they need is read once, here; each `URL FLEET LEASE_S` on a line of stdin then becomes a
process of its own, whose number is the answer. All of them end with stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.integration.provider_batching import Station

from promptfleet_shared.fleet import load_fleet


async def work(url: str, fleet: str, lease_s: str) -> None:
    station = Station(url, load_fleet(Path(fleet)), lease_s=float(lease_s))
    await station.service.run()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    children = []
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            asyncio.run(work(*line.split()))
            return
        children.append(child)
        print(child, flush=True)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
