"""Connections are given out in turn."""

from __future__ import annotations

import threading

from tests.waiting import eventually

from promptfleet_shared.store.engines import FairPool


class Connection:
    """What a pool holds."""

    def close(self) -> None:
        pass

    def rollback(self) -> None:
        pass


def test_who_waits_for_a_connection_gets_it_before_who_comes_by() -> None:
    pool = FairPool(Connection, pool_size=1, max_overflow=0, timeout=10)
    held = pool.connect()
    served = []

    def wait() -> None:
        connection = pool.connect()
        served.append("who waited")
        connection.close()

    waiting = threading.Thread(target=wait)
    waiting.start()
    eventually(pool._turn.locked, "somebody waits")
    held.close()
    pool.connect().close()
    served.append("who came by")
    waiting.join(10)

    assert served == ["who waited", "who came by"]
