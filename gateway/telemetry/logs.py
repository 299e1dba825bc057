"""The operational log: events for operators, never evidence, never content.

Keys are allow-listed: whatever else a caller of the log hands over is dropped and named in
`dropped`, so that no header, body or token can slip in. Tracebacks show no local variables.
"""

import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

ALLOWED: Final = frozenset(
    {
        "event", "level", "timestamp", "exception", "dropped", "role", "pid", "exit_code", "reason",
        "proxy", "sessions", "admin", "workers", "issuer", "error", "version", "vkey", "policy",
        "boot", "code", "hint", "faults", "fields", "path", "count", "limit", "percent",
    }
)  # fmt: skip


def allow_keys(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Return the event with its allowed keys only."""
    dropped = sorted(set(event) - ALLOWED)
    kept = {key: value for key, value in event.items() if key in ALLOWED}
    if dropped:
        kept["dropped"] = dropped
    return kept


def configure_logs(form: str, level: str, role: str) -> None:
    """Set the process's log up: `form` is `json` or `console`."""
    renderer: structlog.types.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            allow_keys,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role)


def get_log() -> structlog.typing.FilteringBoundLogger:
    """Return the operational log."""
    log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return log
