"""Puts a Python process's clock wrong, while it runs, by the seconds that a file names.

On PYTHONPATH, Python imports this at its start. time.time and datetime are moved, time.monotonic is
not. NEMESIS_CLOCK names the file.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

LOOK_EVERY_S = 0.2


def _offset(path: Path) -> float:
    try:
        return float(path.read_text(encoding="ascii") or 0)
    except (OSError, ValueError):
        return 0.0


def _follow(path: Path) -> None:
    sleep, real = time.sleep, time.time
    moved, traveller = 0.0, None
    while True:
        wanted = _offset(path)
        if wanted != moved and traveller is None:
            traveller = time_machine.travel(real() + wanted, tick=True).start()
        elif wanted != moved and traveller is not None:
            traveller.shift(wanted - moved)
        moved = wanted
        sleep(LOOK_EVERY_S)


if "NEMESIS_CLOCK" in os.environ:
    import time_machine  # here: a thread that imports would be in the way of the program's imports

    threading.Thread(
        target=_follow, args=(Path(os.environ["NEMESIS_CLOCK"]),), name="clock", daemon=True
    ).start()
