"""A worker's loads in a process of their own: so many jobs in flight, until somebody ends it."""

from __future__ import annotations

import asyncio
import sys
import time

from promptfleet_shared.fleet import parse_fleet
from promptfleet_workers.balancing.load_exchange import LoadExchange
from promptfleet_workers.balancing.places import Place, Places


async def main(url: str, jobs: int) -> None:
    fleet = parse_fleet("[models.m]\ndeployments = [{ name = 'a', base_url = 'http://a/v1' }]")
    (deployment,) = fleet.models["m"].deployments
    place = Place(deployment, decay_s=10.0, clock=time.monotonic)
    places = Places([place])
    exchange = LoadExchange(places, url, interval_s=0.05)
    place.own = jobs
    places.use()
    await exchange.exchange()
    print("ready", flush=True)
    await exchange.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
