"""How log lines look: stable event names with their fields, for people or for machines."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog
from celery.signals import after_setup_logger, after_setup_task_logger
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor


def install(log_format: Literal["auto", "console", "json"]) -> None:
    """Give the handlers that Celery sets up one format: JSON lines, or for a terminal."""
    formatter = make_formatter(as_json=_wants_json(log_format))

    def dress(logger: logging.Logger, **_: Any) -> None:
        for handler in logger.handlers:
            handler.setFormatter(formatter)

    # Celery holds its receivers weakly, and this function is gone when it returns.
    after_setup_logger.connect(dress, weak=False)
    after_setup_task_logger.connect(dress, weak=False)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(),
            ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def make_formatter(*, as_json: bool) -> logging.Formatter:
    """A formatter for the standard library's handlers."""
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    return ProcessorFormatter(
        foreign_pre_chain=[*_shared(), structlog.stdlib.ExtraAdder(), _without_celerys_data],
        processors=[
            ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ]
        if as_json
        else [ProcessorFormatter.remove_processors_meta, renderer],
    )


def _shared() -> list[Processor]:
    return [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]


def _without_celerys_data(_: Any, __: str, event: EventDict) -> EventDict:
    """Celery repeats the whole of its message, a hundred ids and more, in a field `data`."""
    event.pop("data", None)
    return event


def _wants_json(log_format: Literal["auto", "console", "json"]) -> bool:
    return log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
