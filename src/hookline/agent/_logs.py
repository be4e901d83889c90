"""The agent's log: a line for each event on standard error, for a person or as JSON.

The standard library's logging, since the libraries that serve HTTP log through it too, and a formatter is all that JSON
takes. What belongs to an event is given by name: ``log.info("applied", extra=fields(file=path, took_ms=3.1))``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from hookline.errors import HooklineError

LogFormat = Literal["text", "json"]
_STANDARD = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
LEVELS = ("debug", "info", "warning", "error")
log = logging.getLogger("hookline.agent")


def fields(**values: Any) -> dict[str, Any]:
    """What belongs to an event, for ``extra``."""
    return {"fields": values}


def error_fields(error: BaseException) -> dict[str, Any]:
    """An error's what, why and remedy, by name."""
    if isinstance(error, HooklineError):
        return {name: text for name, text in error.as_dict().items() if text}
    return {"error": f"{type(error).__name__}: {error}"}


class Formatter(logging.Formatter):
    """Lines of ``TIME LEVEL event name=value…``, or JSON documents with the same members."""

    def __init__(self, kind: LogFormat, constant: Mapping[str, Any]) -> None:
        super().__init__()
        self._json = kind == "json"
        self._constant = dict(constant)

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        time = stamp.replace("+00:00", "Z")
        values = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        values |= values.pop("fields", {})
        message, event = record.getMessage(), values.pop("event", "")
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        if self._json:
            document = {
                "time": time,
                "level": record.levelname.lower(),
                "logger": record.name,
                "event": event or message,
                **({"message": message} if event else {}),
                **self._constant,
                **values,
            }
            return json.dumps(document, default=str)
        pairs = "".join(f" {name}={_shown(value)}" for name, value in values.items())
        return f"{time} {record.levelname:<7} {message}{pairs}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def start(kind: LogFormat, level: str, **constant: Any) -> None:
    """Has everything that is logged go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(kind, constant))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("hookline").setLevel(level.upper())
