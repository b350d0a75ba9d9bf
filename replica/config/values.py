"""Text of settings to values: durations, sizes, switches, names.

The same readers serve keywords, mappings, URLs, configuration files and the environment, so that a
value means the same wherever it is written.  Knows no setting by name; reads nothing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import urlsplit

from walship.replica.errors import ConfigError

__all__ = [
    "nearest",
    "parse_address",
    "parse_bool",
    "parse_choice",
    "parse_duration",
    "parse_int",
    "parse_size",
    "parse_text",
    "parse_web_url",
]

_DURATION_UNITS_S: Final = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,  # micro sign
    "μs": 1e-6,  # Greek mu
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_DURATION_MAX_S: Final = 9e9  # 285 years; locks count no further
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h|d)")
_SIZE: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)")
_SIZE_UNITS: Final = {
    unit: factor
    for power, letter in enumerate(("", "k", "m", "g", "t"))
    for unit, factor in (
        (letter, 1000**power),
        (letter + "b", 1000**power),
        (letter + "i", 1024**power),
        (letter + "ib", 1024**power),
    )
}
_BOOLS: Final = {
    **dict.fromkeys(("1", "t", "true", "y", "yes", "on"), True),
    **dict.fromkeys(("0", "f", "false", "n", "no", "off"), False),
}


def parse_duration(name: str, value: object) -> float:
    """Seconds (not negative, finite) of a number (seconds) or text: ``1s``, ``1h30m``, ``7d``.

    Raises:
        ConfigError: anything else, naming the setting.
    """
    seconds: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        text = value.strip()
        position, total = 0, 0.0
        while match := _DURATION_PART.match(text, position):
            total += float(match[1]) * _DURATION_UNITS_S[match[2]]
            position = match.end()
        if text and position == len(text):
            seconds = total
        elif re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
            seconds = float(text)
    if seconds is None or not 0 <= seconds <= _DURATION_MAX_S:
        raise ConfigError(f"{name}: not a duration: {value!r} (seconds, or 500ms, 1s, 5m, 24h, 7d)")
    return seconds


def parse_size(name: str, value: object) -> int:
    """Bytes of a whole number or text: ``10M`` and ``10MB`` are 10**7, ``10MiB`` 10 * 2**20.

    Raises:
        ConfigError: anything else, naming the setting.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is not None and match[2].lower() in _SIZE_UNITS:
            size = float(match[1]) * _SIZE_UNITS[match[2].lower()]
            if math.isfinite(size) and size == int(size):
                return int(size)
    raise ConfigError(f"{name}: not a size: {value!r} (bytes, or 5MiB, 10MB, 1G)")


def parse_int(name: str, value: object) -> int:
    """A whole number, written as one.

    Raises:
        ConfigError: anything else, naming the setting.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip()):
        return int(value)
    raise ConfigError(f"{name}: not a whole number: {value!r}")


def parse_bool(name: str, value: object) -> bool:
    """A switch: a bool, or true/false, yes/no, on/off, 1/0.

    Raises:
        ConfigError: anything else, naming the setting.
    """
    if isinstance(value, bool):
        return value
    known = _BOOLS.get(str(value).strip().lower()) if isinstance(value, (str, int)) else None
    if known is None:
        raise ConfigError(f"{name}: neither true nor false: {value!r}")
    return known


def parse_text(name: str, value: object) -> str:
    """Text without control characters; numbers are taken as they print.

    Raises:
        ConfigError: anything else, naming the setting (not the value: it may be secret).
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ConfigError(f"{name}: text is expected, not {type(value).__name__}")
    text = value.strip()
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ConfigError(f"{name}: there is a line break or another control character in it")
    return text


def parse_address(name: str, value: object) -> str:
    """An address to listen on: ``host:port``, ``[IPv6]:port``, or ``:port``.

    Raises:
        ConfigError: anything else, naming the setting.
    """
    text = parse_text(name, value)
    match = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]*):(\d{1,5})", text)
    if match is None or int(match[1]) > 65535:
        raise ConfigError(f"{name}: not an address: {text!r} (:9090 or 127.0.0.1:9090)")
    return text


def parse_web_url(name: str, value: object) -> str:
    """The URL of a page: ``http://`` or ``https://``, with a host.

    Raises:
        ConfigError: anything else, naming the setting (not the value: it may be secret).
    """
    text = parse_text(name, value)
    try:
        parts = urlsplit(text)
        is_page = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_page = is_page and parts.port != 0 and text.isascii() and " " not in text
    except ValueError:
        is_page = False
    if not is_page:
        raise ConfigError(f"{name}: a URL that begins with https:// or http:// is expected")
    return text


def parse_choice(*choices: str) -> Callable[[str, object], str]:
    """A reader that takes only these words (in any case)."""

    def parse(name: str, value: object) -> str:
        text = str(value).strip().lower()
        if text not in choices:
            raise ConfigError(f"{name}: {value!r} is none of {', '.join(choices)}")
        return text

    return parse


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for a name that is not known, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""
