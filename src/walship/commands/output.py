"""What is printed: results to standard output, messages to standard error; sizes and times."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from walship.replica.format.types import format_segment_name, format_txid
from walship.replica.plan import format_time
from walship.replica.store.base import SegmentInfo

__all__ = [
    "human_duration",
    "human_size",
    "one_line",
    "print_json",
    "print_table",
    "say",
    "segment_json",
    "timestamp",
]


def say(message: str) -> None:
    print(f"walship: {message}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def segment_json(segment: SegmentInfo, *, named: bool = False) -> dict[str, object]:
    fields: dict[str, object] = {"level": segment.level}
    if named:
        fields["name"] = format_segment_name(segment.min_txid, segment.max_txid)
    fields["min_txid"] = format_txid(segment.min_txid)
    fields["max_txid"] = format_txid(segment.max_txid)
    fields["size"] = segment.size_bytes
    fields["timestamp"] = timestamp(segment.created_ms)
    return fields


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns that line up, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def timestamp(timestamp_ms: int) -> str:
    """RFC 3339 to the second, as Litestream prints it."""
    try:
        moment = datetime.fromtimestamp(timestamp_ms // 1000, tz=UTC)
    except (OverflowError, ValueError, OSError):
        return format_time(timestamp_ms)
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def human_duration(duration_ms: int) -> str:
    """A duration in its two largest units: ``2h 5m``."""
    left = (duration_ms + 999) // 1000
    parts = []
    for unit, seconds in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, seconds)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "-"


def human_size(n_bytes: int) -> str:
    """Bytes in decimal units: ``4.2 kB``."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    size = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.1f} {unit}" if size < 10 else f"{size:.0f} {unit}"
