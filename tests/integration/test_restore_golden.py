"""Golden replicas: every recorded state comes back byte for byte, every damaged one is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import lz4.block
import lz4.frame
import pytest

from support.replicas import GOLDEN, golden_copy, local_store, manifest, sha256
from walship.replica.clock import SystemClock
from walship.replica.errors import FormatError, GapError, NoBackupError
from walship.replica.format.checksum import crc64
from walship.replica.format.ltx import Header
from walship.replica.restore import restore
from walship.replica.store.local import LocalStore

SETS = [
    "a-4096-levels",
    "b-512",
    "b-65536",
    "c-vacuum-shrink",
    "d-incremental-vacuum",
    "e-mixed-frame-block",
]
CORRUPT = json.loads((GOLDEN / "x-corrupt" / "expected.json").read_text())
# Accepted by Litestream, refused here: a snapshot must hold all pages, no page may lie above the
# commit size, and a page must have its size.
STRICTER = {"21-snapshot-missing-middle-page", "29-page-beyond-commit", "31-payload-short"}
# Litestream refuses checksums because it cannot write them; the file itself is valid.
ACCEPTED = {"14-checksums-tracked"}
# A whole segment is missing: no file is damaged, and the plan already fails.
INCOMPLETE = {"19-gap"}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("verify", ["auto", "full"])
def test_every_txid_is_restored_byte_for_byte(name: str, verify: str, tmp_path: Path) -> None:
    """Each TXID gives exactly the file that Litestream restores, and SQLite finds it sound."""
    store = local_store(GOLDEN / name / "replica")
    recorded = manifest(name)["txids"]
    assert recorded
    for txid, expected in recorded.items():
        output = tmp_path / f"{txid}.db"
        result = restore(
            store,
            output,
            clock=SystemClock(),
            txid=int(txid, 16),
            integrity_check="full",
            verify="full" if verify == "full" else "auto",
        )
        assert sha256(output) == expected["sha256"]
        assert output.stat().st_size == expected["size"] == result.page_size * result.commit
        assert result.txid == int(txid, 16)


@pytest.mark.parametrize("name", [*SETS, "f-v03-generations"])
def test_latest_is_restored_byte_for_byte(name: str, tmp_path: Path) -> None:
    """Without a target the newest state comes back; the layout of Litestream 0.3 works too."""
    output = tmp_path / "latest.db"
    result = restore(local_store(GOLDEN / name / "replica"), output, clock=SystemClock())
    assert sha256(output) == manifest(name)["latest"]["sha256"]
    assert (result.txid is None) == (name == "f-v03-generations")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.db"]


@pytest.mark.parametrize("name", ["a-4096-levels", "c-vacuum-shrink"])
def test_timestamps_restore_the_recorded_txid(name: str, tmp_path: Path) -> None:
    """In a directory the modification time of a segment is its time."""
    store = local_store(golden_copy(name, tmp_path))
    facts = manifest(name)
    cases = [case for case in facts["timestamp_cases"] if "txid" in case]
    assert cases
    for case in cases:
        output = tmp_path / f"{case['timestamp_ms']}.db"
        restore(store, output, clock=SystemClock(), timestamp_ms=case["timestamp_ms"])
        assert sha256(output) == facts["txids"][case["txid"]]["sha256"]


class _S3Layout(LocalStore):
    """A directory that mirrors the keys of an S3 replica."""

    def level_prefix(self, level: int) -> str:
        return f"{level:04x}/"


def test_s3_layout_is_restored_byte_for_byte(tmp_path: Path) -> None:
    """Objects in Litestream's S3 layout give the recorded files."""
    facts = manifest("g-s3-layout")
    store = _S3Layout(GOLDEN / "g-s3-layout" / "objects" / "backups" / "app.db", SystemClock())
    for txid, expected in facts["txids"].items():
        output = tmp_path / f"{txid}.db"
        restore(store, output, clock=SystemClock(), txid=int(txid, 16))
        assert sha256(output) == expected["sha256"]
    restore(store, tmp_path / "latest.db", clock=SystemClock())
    assert sha256(tmp_path / "latest.db") == facts["latest"]["sha256"]


@pytest.mark.parametrize("variant", sorted(CORRUPT))
def test_damaged_replicas(variant: str, tmp_path: Path) -> None:
    """What Litestream refuses is refused, leaving no file; what it restores comes out the same."""
    expected = CORRUPT[variant]
    output = tmp_path / "out.db"
    store = local_store(GOLDEN / "x-corrupt" / variant / "replica")
    refused = expected["restore_exit"] != 0 and variant not in ACCEPTED
    if refused or variant in STRICTER:
        with pytest.raises(GapError if variant in INCOMPLETE else FormatError) as caught:
            restore(store, output, clock=SystemClock())
        if variant not in INCOMPLETE:
            assert str(caught.value).startswith("ltx/0/")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        return
    result = restore(store, output, clock=SystemClock())
    if variant in ACCEPTED:
        assert sha256(output) == CORRUPT["15-reserved-nonzero"]["restored_sha256"]
    else:
        assert sha256(output) == expected["restored_sha256"]
        assert result.warnings == ()


def raw_segment(page: bytes, index_size: int | None = None) -> bytes:
    """A segment of one page, TXID 1, page size 512, with a right checksum over whatever it says."""
    header = Header(
        page_size=512, commit=1, min_txid=1, max_txid=1, timestamp_ms=1, wal_offset=32
    ).pack()
    block = lz4.block.compress(page, store_size=False)
    frame = struct.pack(">IHI", 1, 1, len(block))
    index = bytes([1, 100, len(frame) + len(block), 0])
    size = struct.pack(">Q", len(index) if index_size is None else index_size)
    ending = bytes(6) + index + size + bytes(8)
    checksum: int = crc64(ending, crc64(page, crc64(header + frame))) | 1 << 63
    return b"".join([header, frame, block, ending, struct.pack(">Q", checksum)])


def test_lengths_are_checked_besides_the_checksum(tmp_path: Path) -> None:
    """A page that is too short and a wrong index size are refused although the checksum fits."""
    path = tmp_path / "replica" / "ltx" / "0" / "0000000000000001-0000000000000001.ltx"
    path.parent.mkdir(parents=True)
    store = local_store(tmp_path / "replica")
    output = tmp_path / "out.db"
    for content, expected in (
        (raw_segment(bytes(511)), "511 bytes instead of 512"),
        (raw_segment(bytes(512), index_size=5), "size of its page index"),
    ):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=expected):
            restore(store, output, clock=SystemClock())
    path.write_bytes(raw_segment(bytes(512)))
    assert restore(store, output, clock=SystemClock()).commit == 1


def test_damaged_old_layout_is_refused(tmp_path: Path) -> None:
    """A damaged, missing or cut WAL segment of Litestream 0.3's layout leaves no file."""
    root = golden_copy("f-v03-generations", tmp_path)
    wal = sorted(root.glob("generations/*/wal/*"))
    original = wal[2].read_bytes()
    flipped = bytearray(original)
    flipped[len(flipped) // 2] ^= 0x10
    content = bytearray(lz4.frame.decompress(original))
    content[-100] ^= 1
    other_frame = lz4.frame.compress(bytes(content))
    output = tmp_path / "out" / "out.db"
    for damaged, expected in (
        (bytes(flipped), "cannot be decompressed"),
        (original[:-8], "does not end where it ends"),
        (b"", "does not end where it ends"),
        (other_frame, "of its .* frames are valid"),
        (None, "the WAL is missing from byte 61832"),
    ):
        if damaged is None:
            wal[2].unlink()
        else:
            wal[2].write_bytes(damaged)
        with pytest.raises(FormatError, match=expected):
            restore(local_store(root), output, clock=SystemClock())
        assert list(output.parent.iterdir()) == []


def test_newer_layout_wins(tmp_path: Path) -> None:
    """With both layouts present the one with the newer object is restored; a TXID means the new."""
    root = golden_copy("f-v03-generations", tmp_path)
    new = golden_copy("b-512", tmp_path)
    (new / "ltx").rename(root / "ltx")
    store = local_store(root)
    old_sha256 = manifest("f-v03-generations")["latest"]["sha256"]
    new_facts = manifest("b-512")
    # The old layout was copied just now, the new one has its recorded times, which lie elsewhere.
    for path in root.glob("generations/*/*/*"):
        os.utime(path, (4_000_000_000, 4_000_000_000))
    restore(store, tmp_path / "old.db", clock=SystemClock())
    assert sha256(tmp_path / "old.db") == old_sha256
    restore(store, tmp_path / "txid.db", clock=SystemClock(), txid=2)
    assert sha256(tmp_path / "txid.db") == new_facts["txids"]["0000000000000002"]["sha256"]
    for path in root.glob("generations/*/*/*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    restore(store, tmp_path / "new.db", clock=SystemClock())
    assert sha256(tmp_path / "new.db") == new_facts["latest"]["sha256"]
    restore(store, tmp_path / "early.db", clock=SystemClock(), timestamp_ms=1_100_000_000_000)
    assert sha256(tmp_path / "early.db") == old_sha256
    with pytest.raises(NoBackupError):
        restore(store, tmp_path / "none.db", clock=SystemClock(), timestamp_ms=900_000_000_000)
