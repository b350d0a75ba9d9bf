"""What a restore reads: winners, small segments whole, and little that is outdated."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.replicas import local_store, make_page, write_pages, write_segment
from walship.replica.clock import SystemClock
from walship.replica.errors import ChecksumError, FormatError
from walship.replica.format.ltx import PageEncoding, parse_index
from walship.replica.format.types import lock_pgno
from walship.replica.restore import RestoreResult, find_source, restore
from walship.replica.store.base import ObjectInfo, segment_key
from walship.replica.store.local import LocalStore

CLOCK = SystemClock()
PAGE_SIZE = 65536
N_PAGES = 160  # incompressible: ten MiB, so a snapshot of them is large


class CountingStore(LocalStore):
    """Keeps every read: key, start, length."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, CLOCK)
        self.reads: list[tuple[str, int, int | None]] = []
        self.heads: list[str] = []
        self.at_once = 0
        self.at_once_max = 0
        self._count = threading.Lock()

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._count:
            self.at_once += 1
            self.at_once_max = max(self.at_once_max, self.at_once)
            self.reads.append((key, start, length))
        try:
            return super().get(key, start, length)
        finally:
            with self._count:
                self.at_once -= 1

    def head(self, key: str) -> ObjectInfo:
        with self._count:
            self.heads.append(key)
        return super().head(key)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large snapshot (TXID 1) of which a large segment (TXID 2) replaces all but 20 pages."""
    root = tmp_path_factory.mktemp("large")
    write_pages(
        root, 9, 1, 1, N_PAGES, range(1, N_PAGES + 1), page_size=PAGE_SIZE, compressible=False
    )
    newer = [pgno for pgno in range(1, N_PAGES + 1) if pgno % 8 != 0]
    write_pages(root, 1, 2, 2, N_PAGES, newer, page_size=PAGE_SIZE, compressible=False)
    return root


def expected_content(large: Path) -> bytes:
    return b"".join(
        make_page(pgno, 1 if pgno % 8 == 0 else 2, PAGE_SIZE, compressible=False)
        for pgno in range(1, N_PAGES + 1)
    )


def sizes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*.ltx")}


def test_small_segments_are_read_whole_and_once(tmp_path: Path) -> None:
    """Small segments cost one request each; every page of them is decoded, winners are written."""
    root = tmp_path / "replica"
    write_pages(root, 9, 1, 1, 50, range(1, 51))
    for txid in range(2, 12):
        write_pages(root, 0, txid, txid, 50, [1, txid, 40])
    store = CountingStore(root)
    result = restore(store, tmp_path / "out.db", clock=CLOCK)
    assert sorted(store.reads) == sorted((key, 0, size) for key, size in sizes(root).items())
    assert result.bytes_fetched == sum(sizes(root).values())
    assert result.pages_decoded == 50 + 30
    assert result.pages_written == 50
    assert result.n_segments == 11
    newest = {pgno: pgno for pgno in range(2, 12)} | {1: 11, 40: 11}
    assert (tmp_path / "out.db").read_bytes() == b"".join(
        make_page(pgno, newest.get(pgno, 1), 512) for pgno in range(1, 51)
    )


def test_outdated_parts_of_large_segments_are_not_read(large: Path, tmp_path: Path) -> None:
    """Of a snapshot that is mostly outdated only header, index and winning ranges are fetched."""
    store = CountingStore(large)
    result = restore(store, tmp_path / "out.db", clock=CLOCK)
    assert (tmp_path / "out.db").read_bytes() == expected_content(large)
    n_old = N_PAGES // 8
    assert result.pages_decoded == result.pages_written == N_PAGES
    snapshot = next((large / "ltx" / "9").iterdir())
    key = str(snapshot.relative_to(large))
    index = parse_index(snapshot.read_bytes())
    winning = sum(
        length for pgno, length in zip(index.pgnos, index.lengths, strict=True) if pgno % 8 == 0
    )
    ranges = [(start, length) for name, start, length in store.reads if name == key]
    read = sum(length or 0 for _, length in ranges)
    tail_guess = max(64 << 10, snapshot.stat().st_size // 128)
    assert read == winning + 100 + tail_guess
    assert len(ranges) == n_old + 2
    assert (
        result.bytes_fetched == read + sizes(large)["ltx/1/0000000000000002-0000000000000002.ltx"]
    )


def test_verify_full_reads_everything(large: Path, tmp_path: Path) -> None:
    """With full verification every byte of every segment is fetched."""
    result = restore(CountingStore(large), tmp_path / "out.db", clock=CLOCK, verify="full")
    assert result.bytes_fetched == sum(sizes(large).values())
    assert result.pages_decoded == N_PAGES + N_PAGES * 7 // 8
    assert result.pages_written == N_PAGES
    assert (tmp_path / "out.db").read_bytes() == expected_content(large)


def test_damage_in_an_outdated_page(large: Path, tmp_path: Path) -> None:
    """Damage in a page that is not needed does no harm, but full verification finds it."""
    root = tmp_path / "replica"
    for name in sizes(large):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes((large / name).read_bytes())
    snapshot = next((root / "ltx" / "9").iterdir())
    data = bytearray(snapshot.read_bytes())
    data[100 + 1000] ^= 1  # within page 1, which the newer segment replaces
    snapshot.write_bytes(data)
    restore(local_store(root), tmp_path / "out.db", clock=CLOCK)
    assert (tmp_path / "out.db").read_bytes() == expected_content(large)
    with pytest.raises(FormatError, match="ltx/9/"):
        restore(local_store(root), tmp_path / "out2.db", clock=CLOCK, verify="full")


def test_large_segments_are_verified_across_their_requests(large: Path, tmp_path: Path) -> None:
    """A flipped bit far inside a segment that takes several requests is found by its checksum."""
    root = tmp_path / "replica"
    name = "ltx/9/0000000000000001-0000000000000001.ltx"
    (root / name).parent.mkdir(parents=True)
    data = bytearray((large / name).read_bytes())
    assert len(data) > 8 << 20
    data[-200_000] ^= 1  # an incompressible page is stored as literals: it still decompresses
    (root / name).write_bytes(data)
    with pytest.raises(ChecksumError, match="file checksum does not match"):
        restore(local_store(root), tmp_path / "out.db", clock=CLOCK)


@pytest.mark.parametrize("encoding", list(PageEncoding))
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_pieces_of_any_size_decode_alike(
    page_size: int, encoding: PageEncoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Borders between requests may fall anywhere: within header, frame, index or trailer."""
    root = tmp_path / "replica"
    pages = {
        pgno: make_page(pgno, 1, page_size, compressible=pgno % 3 != 0) for pgno in range(1, 9)
    }
    path = write_segment(root, 9, 1, 1, 8, pages, page_size=page_size, encoding=encoding)
    size = path.stat().st_size
    monkeypatch.setattr("walship.replica.apply.SMALL_BYTES", 0)
    for step in {1 + size // 200, 17, 99, 100, 101, 601, 4113, 70_000, size - 1, size, size + 1}:
        if size // step > 5000:
            continue
        monkeypatch.setattr("walship.replica.apply.RANGE_BYTES", step)
        output = tmp_path / f"{step}.db"
        restore(local_store(root), output, clock=CLOCK)
        assert output.read_bytes() == b"".join(pages.values())


def test_lock_page_is_zeros(tmp_path: Path) -> None:
    """The page at 1 GiB is in no segment and reads as zeros; what lies behind it is restored."""
    root = tmp_path / "replica"
    lock = lock_pgno(PAGE_SIZE)
    commit = lock + 2
    zeros = bytes(PAGE_SIZE)
    last = make_page(commit, 1, PAGE_SIZE)
    pages = {pgno: zeros for pgno in range(1, commit + 1) if pgno != lock} | {commit: last}
    write_segment(root, 9, 1, 1, commit, pages, page_size=PAGE_SIZE)
    output = tmp_path / "out.db"
    result = restore(local_store(root), output, clock=CLOCK)
    assert output.stat().st_size == commit * PAGE_SIZE
    assert result.pages_written == commit - 1
    with output.open("rb") as file:
        file.seek((lock - 1) * PAGE_SIZE)
        assert file.read(PAGE_SIZE) == zeros
        file.seek((commit - 1) * PAGE_SIZE)
        assert file.read() == last


def test_shrunk_database_drops_pages_above_its_size(tmp_path: Path) -> None:
    """Pages above the final size are dropped wherever they come from."""
    root = tmp_path / "replica"
    write_pages(root, 9, 1, 1, 20, range(1, 21))
    write_pages(root, 0, 2, 2, 30, [*range(21, 31), 1])
    write_pages(root, 0, 3, 3, 5, [1])
    result = restore(local_store(root), tmp_path / "out.db", clock=CLOCK)
    assert result.commit == 5
    assert (tmp_path / "out.db").read_bytes() == b"".join(
        make_page(pgno, 3 if pgno == 1 else 1, 512) for pgno in range(1, 6)
    )


def test_page_that_no_segment_holds(tmp_path: Path) -> None:
    """A grown database whose new pages are nowhere is damaged; the first of them is named."""
    root = tmp_path / "replica"
    write_pages(root, 9, 1, 1, 4, range(1, 5))
    write_pages(root, 0, 2, 2, 7, [1, 5, 7])
    with pytest.raises(FormatError, match="page 6 of 7 is in no segment"):
        restore(local_store(root), tmp_path / "out.db", clock=CLOCK)


def test_requests_at_once_stay_within_parallelism(large: Path, tmp_path: Path) -> None:
    """No more requests than asked for are under way at any time."""
    store = CountingStore(large)
    restore(store, tmp_path / "out.db", clock=CLOCK, parallelism=2, verify="full")
    assert 1 <= store.at_once_max <= 2


def test_only_timestamps_ask_for_metadata(large: Path, tmp_path: Path) -> None:
    """A HEAD for every segment is sent for a timestamp, and for nothing else."""
    store = CountingStore(large)
    restore(store, tmp_path / "a.db", clock=CLOCK)
    assert store.heads == []
    restore(store, tmp_path / "b.db", clock=CLOCK, timestamp_ms=1_700_000_001_500)
    assert sorted(store.heads) == sorted(sizes(large))


def test_progress_grows_to_what_was_expected(large: Path, tmp_path: Path) -> None:
    """Progress never goes back and ends at its own total, also when ranges were left out."""
    calls: list[tuple[int, int]] = []
    result: RestoreResult = restore(
        CountingStore(large),
        tmp_path / "out.db",
        clock=CLOCK,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == result.bytes_fetched == calls[-1][1]


def test_a_page_index_that_is_too_large_is_not_parsed(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with a segment's index: above a limit the segment is read whole."""
    monkeypatch.setattr("walship.replica.apply.INDEX_BYTES_MAX", 1000)
    store = CountingStore(large)
    result = restore(store, tmp_path / "out.db", clock=CLOCK)
    assert (tmp_path / "out.db").read_bytes() == expected_content(large)
    assert result.pages_decoded > N_PAGES
    assert result.bytes_fetched > sum(sizes(large).values())


class LongListing(LocalStore):
    """A replica of very many segments, which are not there."""

    logical_times = False

    def __init__(self, root: Path, count: int) -> None:
        super().__init__(root, CLOCK)
        self.count = count

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        for txid in range(1, self.count + 1) if prefix == self.level_prefix(0) else ():
            key = segment_key(self, 0, txid, txid)
            yield ObjectInfo(key, 5_000, 1_700_000_000_000 + txid, f"{txid:032x}")

    def head(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, 5_000, 1_700_000_000_000, f"{1:032x}")


@pytest.mark.parametrize("timestamp_ms", [None, 1_800_000_000_000])
def test_a_plan_takes_a_kilobyte_for_each_segment(tmp_path: Path, timestamp_ms: int | None) -> None:
    """A listing and its plan stay below 100 MB for 100,000 segments, also by time."""
    n_segments = 10_000
    tracemalloc.start()
    try:
        source = find_source(LongListing(tmp_path, n_segments), timestamp_ms=timestamp_ms)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert source.plan is not None
    assert len(source.plan.segments) == n_segments
    assert peak_bytes < 1_000 * n_segments
