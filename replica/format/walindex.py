"""The header of the wal-index: what SQLite has published of the WAL.

Basis: https://www.sqlite.org/walformat.html.  It stands twice at the beginning of the
``-shm`` file, and is whole while both copies are the same.  Integers are in the host's byte order
but for the salts, which stand as they do in the WAL::

     0  version                      16  mxFrame: frames that are committed
     8  counter of changes           20  database size in pages
    12  1: initialised               24  running checksum through mxFrame
    13  1: checksums read big-endian 32  salt-1, salt-2
    14  page size                    40  checksum of the 40 bytes above

Pure functions of bytes.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from .types import WalSalts

__all__ = ["COPIES_SIZE", "IndexHeader", "is_initialised", "whole"]

_HEADER: Final = struct.Struct("=3I2BH4I")
_SIZE: Final = 48
_IS_INITIALISED: Final = 12
_SALTS: Final = struct.Struct(">2I")
_SALTS_OFFSET: Final = 32

#: Bytes of both copies.
COPIES_SIZE: Final = 2 * _SIZE


class IndexHeader(NamedTuple):
    """What the header says.

    Attributes:
        mx_frame: number of frames that are committed; 0 once everything is in the main file.
        checksum: running checksum through that frame.
        salts: of the WAL that is meant.
        is_big_endian: how checksums of that WAL read their words.
    """

    mx_frame: int
    checksum: tuple[int, int]
    salts: WalSalts
    is_big_endian: bool

    @classmethod
    def parse(cls, header: bytes) -> IndexHeader:
        """From one copy, 48 bytes, as `whole` gives it."""
        fields = _HEADER.unpack_from(header)
        salts = WalSalts(*_SALTS.unpack_from(header, _SALTS_OFFSET))
        return cls(fields[6], (fields[8], fields[9]), salts, bool(fields[4]))


def is_initialised(copies: bytes) -> bool:
    """Whether there is a header at all, perhaps a torn one."""
    return len(copies) == COPIES_SIZE and bool(copies[_IS_INITIALISED])


def whole(copies: bytes) -> bytes | None:
    """The header, if both copies are the same; else somebody is writing it."""
    first = copies[:_SIZE]
    return first if len(copies) == COPIES_SIZE and first == copies[_SIZE:] else None
