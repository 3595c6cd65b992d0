"""Where log lines go and what they look like: structlog, on standard error.  Set up once, by the command line."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum

import structlog


class LogFormat(StrEnum):
    """How a log line looks."""

    TEXT = "text"
    JSON = "json"


def set_up(form: LogFormat, *, verbose: bool) -> None:
    """Send log lines to standard error.

    :param form: ``json`` is one object a line, with ``timestamp`` (ISO 8601, UTC), ``level`` and ``event``.
    :param verbose: debug lines too.
    """
    level = logging.DEBUG if verbose else logging.INFO
    last: list[structlog.typing.Processor]
    if form is LogFormat.JSON:
        last = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
