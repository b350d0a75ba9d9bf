"""Logging of programs that run on: one line for each record, as text or JSON, with fixed keys.

    time    RFC 3339, UTC, with milliseconds
    level   DEBUG, INFO, WARN or ERROR
    logger  who says it: walship.uploader
    msg     what is said
    db      the database it is about, where that is known
    source  file and line, if it is wanted
    error   the exception behind it, its class and text; with it, traceback

An application has a logging of its own: it may use the formatters for its handlers.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from walship.replica.config.file import LoggingSettings

__all__ = ["JSONFormatter", "PrettyFormatter", "TextFormatter", "logging_to"]

_LEVELS: Final[Mapping[str, int]] = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
#: Messages about one database begin with its name: by these formats.
_OF_DATABASE: Final = ("%s: ", "%s -> ")


class _Formatter(logging.Formatter):
    """One of the three forms.

    Args:
        source: name file and line.
    """

    def __init__(self, *, source: bool = False) -> None:
        super().__init__()
        self._source = source


class JSONFormatter(_Formatter):
    """A JSON object for each record."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields(record, self._source), ensure_ascii=False)


class TextFormatter(_Formatter):
    """``key=value`` for each record, values in quotes where that is needed."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record, self._source)
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


class PrettyFormatter(_Formatter):
    """Time, level and message, for people; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record, self._source)
        where = f" ({fields['source']})" if self._source else ""
        said = " ".join(fields["msg"].split())
        line = f"{fields['time'][11:23]} {fields['level']:5} {said}{where}"
        return "\n".join([line, *fields.get("traceback", "").splitlines()])


_FORMATTERS: Final = {"json": JSONFormatter, "text": TextFormatter, "pretty": PrettyFormatter}


@contextmanager
def logging_to(settings: LoggingSettings) -> Iterator[Callable[[LoggingSettings], None]]:
    """Have what walship says written as these settings say, and nowhere else; then as before.

    Yields:
        A function that takes other settings, for what is said from then on.
    """
    logger = logging.getLogger("walship")
    before = list(logger.handlers), logger.level, logger.propagate

    def change(settings: LoggingSettings) -> None:
        handler = logging.StreamHandler(sys.stderr if settings.stderr else sys.stdout)
        handler.setFormatter(_FORMATTERS[settings.type](source=settings.source))
        logger.handlers = [handler]  # at once, for other threads
        logger.setLevel(_LEVELS[settings.level])

    change(settings)
    logger.propagate = False
    try:
        yield change
    finally:
        logger.handlers = before[0]
        logger.setLevel(before[1])
        logger.propagate = before[2]


def _fields(record: logging.LogRecord, source: bool) -> dict[str, str]:
    time = datetime.fromtimestamp(record.created, UTC)
    fields = {
        "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": "WARN" if record.levelno == logging.WARNING else record.levelname,
        "logger": record.name,
        "msg": record.getMessage(),
    }
    database = _database_of(record)
    if database is not None:
        fields["db"] = database
    if source:
        fields["source"] = f"{record.filename}:{record.lineno}"
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        text = str(error)
        fields["error"] = f"{type(error).__name__}: {text}" if text else type(error).__name__
        fields["traceback"] = "".join(traceback.format_exception(error)).rstrip()
    return fields


def _database_of(record: logging.LogRecord) -> str | None:
    given = getattr(record, "db", None)
    if isinstance(given, str):
        return given
    first = record.args[0] if isinstance(record.args, tuple) and record.args else None
    is_about = isinstance(record.msg, str) and record.msg.startswith(_OF_DATABASE)
    return first if is_about and isinstance(first, str) else None


def _quoted(value: str) -> str:
    is_plain = value != "" and all(
        character.isprintable() and character not in ' "=' for character in value
    )
    return value if is_plain else json.dumps(value, ensure_ascii=False)
