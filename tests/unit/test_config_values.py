"""Durations, sizes, switches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.replica.config.values import (
    nearest,
    parse_bool,
    parse_choice,
    parse_duration,
    parse_int,
    parse_size,
    parse_text,
)
from walship.replica.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (1.5, 1.5),
        ("1.5", 1.5),
        ("1s", 1.0),
        ("500ms", 0.5),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("24h", 86400.0),
        ("7d", 604800.0),
        (".5s", 0.5),
        ("1.5h", 5400.0),
        ("10us", 1e-5),
        ("10µs", 1e-5),
        ("1s500ms", 1.5),
        (" 2s ", 2.0),
    ],
)
def test_durations(value: object, seconds: float) -> None:
    """Numbers are seconds; text is Go's, and days."""
    assert parse_duration("x", value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value", [-1, "-1s", "", "s", "1x", "1 s", "1s!", True, None, float("inf"), float("nan"), [1]]
)
def test_durations_that_are_none(value: object) -> None:
    """Everything else is refused, naming the setting."""
    with pytest.raises(ConfigError, match="x: not a duration"):
        parse_duration("x", value)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("10M", 10**7),
        ("10MB", 10**7),
        ("10mb", 10**7),
        ("5MiB", 5 * 2**20),
        ("5Mi", 5 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("1G", 10**9),
        ("2 KiB", 2048),
        ("7B", 7),
    ],
)
def test_sizes(value: object, size: int) -> None:
    """Decimal units are powers of 1000, binary ones of 1024."""
    assert parse_size("x", value) == size


@pytest.mark.parametrize("value", [-1, "-1", "", "M", "1X", "0.3", 1.5, True, None, "1e9"])
def test_sizes_that_are_none(value: object) -> None:
    """Everything else is refused, naming the setting."""
    with pytest.raises(ConfigError, match="x: not a size"):
        parse_size("x", value)


@pytest.mark.parametrize("word", ["true", "True", "1", "yes", "on", "t", "y", True, 1])
def test_true(word: object) -> None:
    """The usual words for true."""
    assert parse_bool("x", word) is True


@pytest.mark.parametrize("word", ["false", "FALSE", "0", "no", "off", "f", "n", False, 0])
def test_false(word: object) -> None:
    """The usual words for false."""
    assert parse_bool("x", word) is False


@pytest.mark.parametrize("word", ["", "maybe", 2, None, [True]])
def test_neither(word: object) -> None:
    """Everything else is refused."""
    with pytest.raises(ConfigError, match="x: neither"):
        parse_bool("x", word)


@pytest.mark.parametrize(("value", "number"), [(5, 5), ("5", 5), ("-3", -3), (" 7 ", 7)])
def test_whole_numbers(value: object, number: int) -> None:
    """Whole numbers, also as text."""
    assert parse_int("x", value) == number


@pytest.mark.parametrize("value", ["", "1.0", 1.0, True, None, "0x10", "9" * 30])
def test_not_whole_numbers(value: object) -> None:
    """Everything else is refused."""
    with pytest.raises(ConfigError, match="x: not a whole number"):
        parse_int("x", value)


def test_text_does_not_show_what_it_refuses() -> None:
    """Text may be secret: an error does not quote it."""
    with pytest.raises(ConfigError) as caught:
        parse_text("secret-access-key", "hun\nter2")
    assert "ter2" not in str(caught.value)
    assert parse_text("x", 12) == "12"
    assert parse_text("x", " a ") == "a"


def test_choices() -> None:
    """A choice is one of its words in any case."""
    parse = parse_choice("block", "frame")
    assert parse("x", "FRAME") == "frame"
    with pytest.raises(ConfigError, match="block, frame"):
        parse("x", "zip")


def test_nearest() -> None:
    """A near miss is pointed out, a far one is not."""
    assert nearest("regoin", ["region", "bucket"]) == " (did you mean region?)"
    assert nearest("zzz", ["region", "bucket"]) == ""


@given(st.text() | st.integers() | st.floats() | st.none() | st.binary())
def test_readers_only_raise_config_error(value: object) -> None:
    """Whatever is given, a reader returns a value of its kind or raises ConfigError."""
    for reader, kind in (
        (parse_duration, float),
        (parse_size, int),
        (parse_int, int),
        (parse_bool, bool),
        (parse_text, str),
    ):
        try:
            assert isinstance(reader("x", value), kind)
        except ConfigError:
            continue
