"""What programs that run on write to their log: one line a record, with fixed keys."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable

import pytest

from walship.logs import JSONFormatter, PrettyFormatter, TextFormatter, logging_to
from walship.replica.config.file import LoggingSettings
from walship.replica.config.sources import log_level

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def lines(
    capsys: pytest.CaptureFixture[str], settings: LoggingSettings, say: Callable[[], None]
) -> list[str]:
    """What is written to standard error when ``say`` logs."""
    with logging_to(settings):
        say()
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def _say() -> None:
    log = logging.getLogger("walship.uploader")
    log.debug("%s: not wanted", "app.db")
    log.info("%s -> %s, at txid %s", "app.db", "s3://bucket/app", "0000000000000007")
    log.warning('it said "no"\nand %s', "käse")
    try:
        raise ValueError("wrong = bad")
    except ValueError:
        log.exception("%s: unexpected error in the uploader", "app.db")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is an object with the fixed keys, whatever is in the message."""
    found = [json.loads(line) for line in lines(capsys, LoggingSettings(type="json"), _say)]
    assert [sorted(each) for each in found] == [
        ["db", "level", "logger", "msg", "time"],
        ["level", "logger", "msg", "time"],
        ["db", "error", "level", "logger", "msg", "time", "traceback"],
    ]
    info, warning, error = found
    assert TIME.fullmatch(info["time"])
    assert (info["level"], info["logger"]) == ("INFO", "walship.uploader")
    assert info["msg"] == "app.db -> s3://bucket/app, at txid 0000000000000007"
    assert info["db"] == error["db"] == "app.db"
    assert (warning["level"], warning["msg"]) == ("WARN", 'it said "no"\nand käse')
    assert error["error"] == "ValueError: wrong = bad"
    assert error["traceback"].endswith("ValueError: wrong = bad")
    assert "test_logs.py" in error["traceback"]


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    """The same as key=value; values with blanks, quotes or line breaks are quoted."""
    info, warning, error = lines(capsys, LoggingSettings(), _say)
    assert re.fullmatch(
        rf"time={TIME.pattern} level=INFO logger=walship\.uploader "
        r'msg="app\.db -> s3://bucket/app, at txid 0000000000000007" db=app\.db',
        info,
    )
    assert warning.endswith(r'msg="it said \"no\"\nand käse"')
    assert ' error="ValueError: wrong = bad" traceback="Traceback' in error


def test_pretty(capsys: pytest.CaptureFixture[str]) -> None:
    """For people: time, level, message; a traceback on lines of its own."""
    found = lines(capsys, LoggingSettings(type="pretty"), _say)
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} INFO  app\.db -> s3://bucket/app, .*7", found[0])
    assert found[1].endswith('WARN  it said "no" and käse')
    assert found[-1] == "ValueError: wrong = bad"


@pytest.mark.parametrize("formatter", [JSONFormatter, TextFormatter, PrettyFormatter])
def test_source(formatter: type[logging.Formatter]) -> None:
    """With ``source`` each record names file and line."""
    record = logging.LogRecord("walship", logging.INFO, "/x/engine.py", 12, "hello", (), None)
    assert "engine.py:12" in formatter(source=True).format(record)  # type: ignore[call-arg]
    assert "engine.py" not in formatter().format(record)


@pytest.mark.parametrize(
    ("message", "args", "database"),
    [
        ("%s: fenced", ("app.db",), "app.db"),
        ("%s: %s", ("app.db", "fenced"), "app.db"),
        ("%s", ("app.db: fenced",), None),
        ("%s: waiting", (7,), None),
        ("unknown-key key=%s", ("retenton",), None),
        ("no arguments: %s", (), None),
    ],
)
def test_database(message: str, args: tuple[object, ...], database: str | None) -> None:
    """The database is what a message about one begins with; else there is none."""
    record = logging.LogRecord("walship", logging.INFO, "x.py", 1, message, args, None)
    assert json.loads(JSONFormatter().format(record)).get("db") == database


def test_a_database_that_is_given() -> None:
    """``extra={"db": ...}`` wins."""
    record = logging.LogRecord("walship", logging.INFO, "x.py", 1, "%s: x", ("a.db",), None)
    record.db = "b.db"
    assert json.loads(JSONFormatter().format(record))["db"] == "b.db"


def test_level(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is at least as grave as the level is written."""
    assert len(lines(capsys, LoggingSettings(level="debug"), _say)) == 4
    assert len(lines(capsys, LoggingSettings(level="trace"), _say)) == 4
    assert len(lines(capsys, LoggingSettings(level="warn"), _say)) == 2
    assert len(lines(capsys, LoggingSettings(level="error"), _say)) == 1


def test_changed_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    """Other settings hold for what is said from then on: stream, form and level."""
    logger = logging.getLogger("walship")
    with logging_to(LoggingSettings(type="json", stderr=False)) as change:
        logger.info("a")
        change(LoggingSettings(type="pretty", level="warn"))
        logger.info("b")
        logger.warning("c")
    out, err = capsys.readouterr()
    assert json.loads(out)["msg"] == "a"
    assert re.fullmatch(r"[\d:.]{12} WARN  c\n", err)


def test_everything_is_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    """What was set up ends with the block, also by an error; nothing is written twice meanwhile."""
    logger = logging.getLogger("walship")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    before = list(logger.handlers), logger.level, logger.propagate
    try:
        with pytest.raises(KeyError), logging_to(LoggingSettings()):
            logger.info("only once")
            raise KeyError
        assert (list(logger.handlers), logger.level, logger.propagate) == before
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue() == ""
    assert capsys.readouterr().err.count("only once") == 1


@pytest.mark.parametrize(
    ("value", "level"),
    [("debug", "debug"), (" WARN ", "warn"), ("notice", None), ("", None), (None, None)],
)
def test_the_variable(value: str | None, level: str | None) -> None:
    """``LOG_LEVEL`` names a level; other programs' levels are passed over."""
    assert log_level({} if value is None else {"LOG_LEVEL": value}) == level
