"""The words of the format as types: TXID, page number, level, WAL salts, page size.

Parse, print and validate; nothing here reads or writes.  Basis: superfly/ltx (``ltx.go``) and
SQLite's file format page (https://www.sqlite.org/fileformat2.html#the_write_ahead_log).
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from walship.replica.errors import FormatError

__all__ = [
    "LEVEL_MAX",
    "LEVEL_SNAPSHOT",
    "PAGE_SIZE_MAX",
    "PAGE_SIZE_MIN",
    "TXID_MAX",
    "WalSalts",
    "format_segment_name",
    "format_txid",
    "is_page_size",
    "lock_pgno",
    "parse_segment_name",
    "parse_txid",
]

TXID_MAX: Final = 2**64 - 1
PAGE_SIZE_MIN: Final = 512
PAGE_SIZE_MAX: Final = 65536
LEVEL_SNAPSHOT: Final = 9
LEVEL_MAX: Final = 9

_LOCK_BYTE_OFFSET: Final = 0x40000000
_TXID_RE: Final = re.compile(r"[0-9a-f]{16}")
_NAME_RE: Final = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.ltx")


class WalSalts(NamedTuple):
    """The two salts of a WAL generation, each 0 .. 2**32 - 1; compared as a pair."""

    salt1: int
    salt2: int


def is_page_size(value: int) -> bool:
    """Whether ``value`` is a page size SQLite can use: a power of two from 512 to 65536."""
    return PAGE_SIZE_MIN <= value <= PAGE_SIZE_MAX and value & (value - 1) == 0


def lock_pgno(page_size: int) -> int:
    """Number of the page that holds SQLite's lock bytes (offset 1 GiB); it never has content."""
    return _LOCK_BYTE_OFFSET // page_size + 1


def format_txid(txid: int) -> str:
    """A TXID as 16 lower-case hex digits."""
    return f"{txid:016x}"


def parse_txid(text: str) -> int:
    """Read exactly 16 lower-case hex digits.

    Raises:
        FormatError: for anything else.
    """
    if _TXID_RE.fullmatch(text) is None:
        raise FormatError(f"not a TXID: {text!r} (16 lower-case hex digits are expected)")
    return int(text, 16)


def format_segment_name(min_txid: int, max_txid: int) -> str:
    """File name of a segment, without its level: ``<min>-<max>.ltx``."""
    return f"{min_txid:016x}-{max_txid:016x}.ltx"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """``(min_txid, max_txid)`` of a segment's file name, or None if it is not one."""
    match = _NAME_RE.fullmatch(name)
    if match is None:
        return None
    return int(match[1], 16), int(match[2], 16)
