"""Start the provider: `python -m promptfleet_workers.providers.simulated --port 17800`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys

from .http import HttpServer
from .options import Options, add_flags, options_of
from .server import SimulatedProvider

_GRACE_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean end, 2 for wrong flags."""
    parser = argparse.ArgumentParser(
        prog="python -m promptfleet_workers.providers.simulated", description=__doc__
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=17800, help="0 picks a free one")
    add_flags(parser)
    flags = parser.parse_args(arguments)
    try:
        options = options_of(flags)
    except ValueError as error:
        parser.error(str(error))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(flags.host, flags.port, options))


async def _serve(host: str, port: int, options: Options) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = HttpServer(SimulatedProvider(options))
    try:
        bound = await server.start(host, port)
    except OSError as error:
        sys.stderr.write(f"cannot listen on {host}:{port}: {error.strerror}\n")
        return 1
    gc.freeze()  # what is loaded now stays: the collector need not look at it again
    sys.stdout.write(f"listening on http://{host}:{bound}\n")
    sys.stdout.flush()
    await stop.wait()
    await server.drain(_GRACE_S)
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return uvloop.Loop


if __name__ == "__main__":
    sys.exit(main())
