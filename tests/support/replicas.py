"""Replicas made for tests: golden ones, and small ones built segment by segment."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from walship.replica.clock import SystemClock
from walship.replica.format.ltx import Encoder, Header, PageEncoding
from walship.replica.format.types import format_segment_name, lock_pgno
from walship.replica.store.local import LocalStore

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
START_MS = 1_700_000_000_000


def manifest(name: str) -> dict[str, Any]:
    """The recorded facts of a golden set."""
    content: dict[str, Any] = json.loads((GOLDEN / name / "manifest.json").read_text())
    return content


def golden_copy(name: str, directory: Path) -> Path:
    """A golden replica in ``directory``, with the modification times of its manifest."""
    root = directory / name
    shutil.copytree(GOLDEN / name / "replica", root)
    for entry in manifest(name)["files"]:
        if "mtime_ms" in entry:
            nanoseconds = entry["mtime_ms"] * 1_000_000
            os.utime(root / entry["path"], ns=(nanoseconds, nanoseconds))
    return root


def local_store(root: Path) -> LocalStore:
    """A directory store with the real clock."""
    return LocalStore(root, SystemClock())


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_page(pgno: int, txid: int, page_size: int, *, compressible: bool = True) -> bytes:
    """A page whose content tells its number and TXID."""
    words = pgno.to_bytes(4, "big") + txid.to_bytes(4, "big")
    if compressible:
        return (words * (page_size // 8))[:page_size]
    rng = random.Random(pgno << 32 | txid)
    return words + rng.randbytes(page_size - len(words))


def write_segment(
    root: Path,
    level: int,
    min_txid: int,
    max_txid: int,
    commit: int,
    pages: Mapping[int, bytes],
    *,
    page_size: int = 512,
    timestamp_ms: int | None = None,
    encoding: PageEncoding = PageEncoding.BLOCK,
) -> Path:
    """Write one segment into a directory replica; its time is ``START_MS`` + 1 s for each TXID."""
    if timestamp_ms is None:
        timestamp_ms = START_MS + max_txid * 1000
    header = Header(
        page_size=page_size,
        commit=commit,
        min_txid=min_txid,
        max_txid=max_txid,
        timestamp_ms=timestamp_ms,
        wal_offset=32 if level in (0, 9) else 0,
    )
    path = root / "ltx" / str(level) / format_segment_name(min_txid, max_txid)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        encoder = Encoder(file.writelines, header, encoding)
        for pgno in sorted(pages):
            encoder.add_page(pgno, pages[pgno])
        encoder.finish()
    os.utime(path, ns=(timestamp_ms * 1_000_000,) * 2)
    return path


def write_pages(
    root: Path,
    level: int,
    min_txid: int,
    max_txid: int,
    commit: int,
    pgnos: Iterable[int],
    *,
    page_size: int = 512,
    compressible: bool = True,
) -> Path:
    """`write_segment` with `make_page` content of the last TXID; no lock page."""
    lock = lock_pgno(page_size)
    pages = {
        pgno: make_page(pgno, max_txid, page_size, compressible=compressible)
        for pgno in pgnos
        if pgno != lock
    }
    return write_segment(root, level, min_txid, max_txid, commit, pages, page_size=page_size)
