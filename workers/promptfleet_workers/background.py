"""Tasks that run as long as their worker: one that fails is told of, and begins again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

AGAIN_AFTER_S = 1.0


async def keep_running(
    name: str, run: Callable[[], Awaitable[None]], *, again_after_s: float = AGAIN_AFTER_S
) -> None:
    """Run it until cancelled or until it returns; after a bug of ours, again a moment later.

    A sweeper that ended in silence would keep no promise any more, and nobody would know.
    """
    while True:
        try:
            await run()
        except Exception as error:  # noqa: BLE001 - whatever it was, it must not end unnoticed
            facts = {"task": name, "error": type(error).__name__}
            log.error("background_crashed", extra=facts)  # noqa: TRY400 - a traceback could show a prompt
            await asyncio.sleep(again_after_s)
        else:
            return
