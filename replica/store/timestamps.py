"""The ``litestream-timestamp`` metadata value: RFC 3339 in UTC, written without trailing zeros."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["TIMESTAMP_METADATA", "format_timestamp", "parse_timestamp"]

#: Name of the metadata entry, without a provider's own prefix.
TIMESTAMP_METADATA: Final = "litestream-timestamp"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_RE: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:[Zz]|([+-])(\d\d):(\d\d))"
)


def format_timestamp(timestamp_ms: int) -> str:
    """Milliseconds since the epoch as ``2025-01-31T15:54:37.1Z`` (no fraction when it is zero).

    Raises:
        OverflowError: outside the years 1 to 9999.
    """
    moment = _EPOCH + timedelta(milliseconds=timestamp_ms)
    text = f"{moment.year:04d}-{moment:%m-%dT%H:%M:%S}"
    fraction = f"{moment.microsecond // 1000:03d}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


def parse_timestamp(text: str) -> int | None:
    """Milliseconds since the epoch (finer digits are cut off), or None if it is no such time."""
    match = _RE.fullmatch(text.strip())
    if match is None:
        return None
    fraction, sign, hours, minutes = match[7], match[8], match[9], match[10]
    try:
        moment = datetime(*(int(part) for part in match.groups()[:6]), tzinfo=UTC)  # type: ignore[arg-type,misc]
    except ValueError:
        return None
    milliseconds = int((moment - _EPOCH).total_seconds()) * 1000
    if fraction is not None:
        milliseconds += int(fraction.ljust(9, "0")[:3])
    if sign is not None:
        offset = (int(hours) * 60 + int(minutes)) * 60_000
        milliseconds += -offset if sign == "+" else offset
    return milliseconds
