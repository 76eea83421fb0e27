"""Programs of ours as processes that are forked from one that has imported them already.

A worker, an API and a provider start by the dozen in the tests, and importing is nearly all of
a start: over a second of CPU each time. What runs is the same program with the arguments,
environment, directory and output of its own; only its imports are there before it. That the
commands work from nothing is what the tests of deployment, of `promptfleet dev` and of the
acceptance show, which start them as a user does.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

_PROGRAMS = frozenset({"celery", "promptfleet.cli"})
_IMPORTED = (  # all that `promptfleet_workers.app` imports; it reads the settings, and is not here
    "celery.bin.celery",
    "celery.app.amqp",
    "celery.app.control",
    "celery.app.log",
    "celery.apps.worker",
    "celery.concurrency.thread",
    "celery.contrib.abortable",
    "celery.fixups.django",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.consumer.delayed_delivery",
    "celery.worker.request",
    "celery.worker.strategy",
    "genai_prices.data",
    "genai_prices.data_units",
    "promptfleet_workers.caching.building",
    "promptfleet_workers.context.fitter",
    "promptfleet_workers.metrics",
    "promptfleet_workers.pipeline",
    "promptfleet_workers.provider_batches.building",
    "promptfleet_workers.providers.batch_building",
    "promptfleet_workers.providers.building",
    "promptfleet_workers.rate_limits.building",
    "promptfleet_workers.shadowing",
    "promptfleet_workers.tiering",
    "promptfleet_workers.triage",
    "promptfleet_workers.worker",
    "promptfleet.cli",
    "promptfleet.api.app",
    "uvicorn.main",
)


def can_be_forked(argv: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether it is one of these programs, run by an interpreter that is set up as this one.

    An API of several processes is not: it spawns them, which takes an interpreter of its own.
    """
    program = argv[0] == sys.executable and argv[1] == "-m" and argv[2] in _PROGRAMS
    alone = "--workers" not in argv
    return program and alone and _of_python(env) == _of_python(os.environ)


def _of_python(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("PYTHON")}


class ForkedProcess:
    """`python -m MODULE ARGUMENTS`, with what `subprocess.Popen` says of a process."""

    def __init__(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str]) -> None:
        """Start it; its output is added to the log, beside which it runs."""
        self._process = _context().Process(target=_run, args=(list(argv), str(log), dict(env)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; none while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit status, once it has ended."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return status

    def terminate(self) -> None:
        self._process.terminate()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def _run(argv: Sequence[str], log: str, env: Mapping[str, str]) -> None:
    """Become `python -m MODULE ARGUMENTS` in the new process."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(Path(log).parent)
    sys.path.insert(0, str(Path(log).parent))
    _, _, module, *arguments = argv
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
