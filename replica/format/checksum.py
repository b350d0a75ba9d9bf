"""The checksums of the formats: CRC-64 of LTX, page and database checksums, WAL running checksum.

Pure arithmetic over bytes that are already in memory; what is covered by which checksum is the
business of ``ltx`` and ``wal``.

* CRC-64/GO-ISO: polynomial ``0x1b`` (reflected ``0xd800000000000000``), initial value and final
  XOR all ones, reflected.  The CRC of nothing is 0.
* Every checksum stored in an LTX file has bit 63 forced to 1, so that 0 can mean "absent".
* Page checksum: CRC of the page number (u32 big-endian) and the page, with bit 63 set.  Database
  checksum: the XOR of all page checksums except the lock page's, with bit 63 set after each step.
* WAL checksum: two running 32-bit sums over pairs of 32-bit words
  (https://www.sqlite.org/fileformat2.html#checksum_algorithm).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal, TypeAlias

from fastcrc import crc64 as _fastcrc64

__all__ = [
    "CHECKSUM_FLAG",
    "BytesLike",
    "RollingChecksum",
    "crc64",
    "crc64_combine",
    "page_checksum",
    "wal_checksum",
]

BytesLike: TypeAlias = bytes | bytearray | memoryview

CHECKSUM_FLAG: Final = 1 << 63

_go_iso = _fastcrc64.go_iso


def crc64(data: BytesLike, previous: int = 0) -> int:
    """CRC-64/GO-ISO of ``data``, continuing from the result ``previous`` of the bytes before it.

    Releases the GIL for inputs of 16 KiB and more.
    """
    result: int = _go_iso(data, previous)
    return result


# --- Combining CRCs -----------------------------------------------------------------------------
#
# Appending n zero bytes to a message multiplies its CRC register, seen as a polynomial over GF(2),
# by x**(8n) modulo the CRC polynomial.  Because the initial value equals the final XOR, the two
# constants cancel and CRC(A || B) = CRC(A) * x**(8 * len(B)) + CRC(B).  In the reflected form used
# here bit 63 is x**0 and bit 0 is x**63.

_POLY: Final = 0xD800000000000000
_ONE: Final = 1 << 63


def _times_x(value: int) -> int:
    return (value >> 1) ^ (_POLY if value & 1 else 0)


def _times_x4(value: int) -> int:
    for _ in range(4):
        value = _times_x(value)
    return value


# What the four bits that fall out of the register on a multiplication by x**4 leave behind.
_REDUCE4: Final = tuple(_times_x4(low) for low in range(16))


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo the CRC polynomial, four bits of ``a`` at a time."""
    b1 = _times_x(b)
    b2 = _times_x(b1)
    b3 = _times_x(b2)
    # multiples[n] = n * b, where bit 3 of n is x**0 and bit 0 is x**3.
    multiples = [0, b3, b2, b2 ^ b3, b1, b1 ^ b3, b1 ^ b2, b1 ^ b2 ^ b3]
    multiples += [multiple ^ b for multiple in multiples]
    product = 0
    for shift in range(0, 64, 4):
        product = (product >> 4) ^ _REDUCE4[product & 15] ^ multiples[(a >> shift) & 15]
    return product


@lru_cache(maxsize=256)
def _zero_bytes_digit(digit: int, position: int) -> int:
    """The operator that appends ``digit * 16**position`` zero bytes; digit 1..15."""
    if digit > 1:
        return _multiply(_zero_bytes_digit(digit - 1, position), _zero_bytes_digit(1, position))
    if position > 0:
        return _multiply(_zero_bytes_digit(15, position - 1), _zero_bytes_digit(1, position - 1))
    return _times_x4(_times_x4(_ONE))


@lru_cache(maxsize=1024)
def _zero_bytes(n_bytes: int) -> int:
    """The operator that appends ``n_bytes`` zero bytes."""
    operator = _ONE
    position = 0
    while n_bytes:
        digit = n_bytes & 15
        if digit:
            step = _zero_bytes_digit(digit, position)
            operator = step if operator == _ONE else _multiply(operator, step)
        n_bytes >>= 4
        position += 1
    return operator


def crc64_combine(crc1: int, crc2: int, len2: int) -> int:
    """CRC-64/GO-ISO of A followed by B, from the CRCs of both.

    Args:
        crc1: CRC of A.
        crc2: CRC of B.
        len2: length of B in bytes, >= 0.
    """
    if len2 < 0:
        raise ValueError(f"the length of the second part must not be negative: {len2}")
    return _multiply(_zero_bytes(len2), crc1) ^ crc2


# --- Page and database checksums ----------------------------------------------------------------


def page_checksum(pgno: int, page: BytesLike) -> int:
    """Checksum of one database page, with bit 63 set.

    Args:
        pgno: page number, 1 .. 2**32 - 1.
        page: the whole page.
    """
    return crc64(page, crc64(pgno.to_bytes(4, "big"))) | CHECKSUM_FLAG


class RollingChecksum:
    """Database checksum that is kept up to date page by page.  Not thread-safe.

    The caller leaves the lock page out.  ``value`` of a database without pages is 2**63.
    """

    __slots__ = ("value",)

    def __init__(self, value: int = CHECKSUM_FLAG) -> None:
        self.value = value | CHECKSUM_FLAG

    def toggle(self, pgno: int, page: BytesLike) -> None:
        """Add a page, or take away one that was added with the same content."""
        self.value = (self.value ^ page_checksum(pgno, page)) | CHECKSUM_FLAG

    def replace(self, pgno: int, old: BytesLike, new: BytesLike) -> None:
        """Exchange the content of a page."""
        self.toggle(pgno, old)
        self.toggle(pgno, new)


# --- WAL checksum -------------------------------------------------------------------------------
#
# One step of the algorithm, on the words x0 and x1, is
#
#     c1 += x0 + c2;  c2 += x1 + c1      (modulo 2**32)
#
# which is linear: (c1, c2) becomes M * (c1, c2) + (x0, x0 + x1) with M = ((1, 1), (1, 2)).  So for
# the first and second half of n steps, sum(M**(n-1-i) * y[i]) = sum over i < n/2 of
# M**(n/2-1-i) * (M**(n/2) * y[i] + y[i + n/2]): the first half can be multiplied by one constant
# matrix and added to the second.  Python's big integers do that to all words of a half in a few
# operations when each word sits in a 64-bit lane of its own; repeating it leaves a single pair.
# M**k holds Fibonacci numbers: ((F(2k-1), F(2k)), (F(2k), F(2k+1))).

_MASK32: Final = 0xFFFFFFFF
# Below this many steps the plain loop is as fast.
_PLAIN_STEPS: Final = 8


@lru_cache(maxsize=64)
def _fibonacci_pair(index: int) -> tuple[int, int]:
    """(F(index), F(index + 1)) modulo 2**32."""
    if index == 0:
        return 0, 1
    a, b = _fibonacci_pair(index >> 1)
    c = a * (2 * b - a)
    d = a * a + b * b
    if index & 1:
        return d & _MASK32, (c + d) & _MASK32
    return c & _MASK32, d & _MASK32


@lru_cache(maxsize=64)
def _lane_mask(n_lanes: int) -> int:
    """The low 32 bits of each of ``n_lanes`` 64-bit lanes."""
    return int.from_bytes(b"\x00\x00\x00\x00\xff\xff\xff\xff" * n_lanes, "big")


def _fold_block(block: BytesLike, n_steps: int, big_endian: bool) -> tuple[int, int]:
    """Checksum, starting from (0, 0), of ``n_steps`` (a power of two) pairs of words."""
    mask = _lane_mask(n_steps)
    if big_endian:
        lanes = int.from_bytes(block, "big")
        y0 = (lanes >> 32) & mask
        y1 = lanes & mask
    else:
        lanes = int.from_bytes(block, "little")
        y0 = lanes & mask
        y1 = (lanes >> 32) & mask
    y1 = (y0 + y1) & mask
    half = n_steps
    while half > 1:
        half >>= 1
        shift = half << 6
        mask = _lane_mask(half)
        low = (1 << shift) - 1
        # The earlier words are the high lanes of a big-endian number, the low ones of the other.
        if big_endian:
            first0, last0 = y0 >> shift, y0 & low
            first1, last1 = y1 >> shift, y1 & low
        else:
            first0, last0 = y0 & low, y0 >> shift
            first1, last1 = y1 & low, y1 >> shift
        f0, f1 = _fibonacci_pair(2 * half - 1)
        # Products fill their 64-bit lane exactly, so each is cut to 32 bits before it is added.
        cross = (f1 * first1) & mask
        y0 = (((f0 * first0) & mask) + cross + last0) & mask
        y1 = (((f1 * first0) & mask) + ((f0 * first1) & mask) + cross + last1) & mask
    return y0, y1


def wal_checksum(data: BytesLike, c1: int, c2: int, big_endian: bool) -> tuple[int, int]:
    """Continue SQLite's WAL checksum over ``data``.

    Args:
        data: a multiple of 8 bytes.
        c1: first sum so far, 0 .. 2**32 - 1.
        c2: second sum so far.
        big_endian: byte order of the words, as the magic number of the WAL says.

    Returns:
        The two sums after ``data``.
    """
    view = memoryview(data)
    remaining, odd = divmod(view.nbytes, 8)
    if odd:
        raise ValueError(f"the WAL checksum covers multiples of 8 bytes, not {view.nbytes}")
    position = 0
    while remaining >= _PLAIN_STEPS:
        n_steps = 1 << (remaining.bit_length() - 1)
        end = position + n_steps * 8
        d1, d2 = _fold_block(view[position:end], n_steps, big_endian)
        f0, f1 = _fibonacci_pair(2 * n_steps - 1)
        c1, c2 = (
            (f0 * c1 + f1 * c2 + d1) & _MASK32,
            (f1 * c1 + (f0 + f1) * c2 + d2) & _MASK32,
        )
        position = end
        remaining -= n_steps
    order: Literal["big", "little"] = "big" if big_endian else "little"
    for offset in range(position, position + remaining * 8, 8):
        c1 = (c1 + int.from_bytes(view[offset : offset + 4], order) + c2) & _MASK32
        c2 = (c2 + int.from_bytes(view[offset + 4 : offset + 8], order) + c1) & _MASK32
    return c1, c2
