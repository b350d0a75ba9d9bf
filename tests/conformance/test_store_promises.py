"""What every object store promises, asked of each of them, also through the wrappers."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.clock import FakeClock
from support.faulty import FaultyStore
from support.servers import S3Endpoint
from walship.replica.clock import SystemClock
from walship.replica.config.sources import parse_replica
from walship.replica.counts import RequestCounts
from walship.replica.errors import ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable
from walship.replica.store.base import (
    ObjectInfo,
    ObjectStore,
    Version,
    list_segments,
    segment_key,
)
from walship.replica.store.counting import CountingStore
from walship.replica.store.opening import open_store
from walship.replica.store.retrying import RetryingStore
from walship.replica.store.timestamps import TIMESTAMP_METADATA, parse_timestamp

MIB = 1024 * 1024

#: One bucket per server is enough: each store has a path of its own.
BUCKETS: dict[str, str] = {}

#: kind of store, and whether it stands behind RetryingStore and CountingStore
KINDS = [
    pytest.param(("local", False), id="local"),
    pytest.param(("local", True), id="local-retrying"),
    pytest.param(("minio", False), id="minio", marks=pytest.mark.s3),
    pytest.param(("minio", True), id="minio-retrying", marks=pytest.mark.s3),
    pytest.param(("seaweedfs", False), id="seaweedfs", marks=pytest.mark.s3),
    pytest.param(("seaweedfs", True), id="seaweedfs-retrying", marks=pytest.mark.s3),
]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """An empty store."""
    kind, retrying = request.param
    clock = SystemClock()
    if kind == "local":
        settings = parse_replica(tmp_path / "replica", environ={})
    else:
        server: S3Endpoint = request.getfixturevalue(f"{kind}_server")
        if kind not in BUCKETS:
            BUCKETS[kind] = server.make_bucket()
        path = f"some/{uuid.uuid4().hex}"
        settings = parse_replica(server.replica(BUCKETS[kind], path), environ={})
    opened = open_store(settings.store, clock)
    if retrying:
        # The inner store fails now and then, so that the wrapper has something to do; creations
        # are left alone, because their outcome would be ambiguous.
        faulty = FaultyStore(
            opened,
            seed=7,
            before=0.1,
            after=0.1,
            operations=("get", "read", "head", "list", "delete"),
        )
        counted = CountingStore(faulty, "s3", RequestCounts(), clock)
        opened = RetryingStore(counted, FakeClock(), attempts=50, deadline_s=None)
    yield opened
    opened.close()


def keys(store: ObjectStore, prefix: str = "", start_after: str | None = None) -> list[str]:
    return [info.key for info in store.list(prefix, start_after)]


def test_put_then_get_and_head(store: ObjectStore) -> None:
    """What was put is what get returns and what head measures."""
    put = store.put("0000/a.ltx", b"hello")
    assert put.key == "0000/a.ltx"
    assert put.size_bytes == 5
    assert store.get("0000/a.ltx") == b"hello"
    head = store.head("0000/a.ltx")
    assert (head.key, head.size_bytes) == ("0000/a.ltx", 5)
    assert head.etag == put.etag
    assert abs(head.modified_ms - time.time() * 1000) < 3600_000


@pytest.mark.parametrize(
    "make",
    [bytes, bytearray, memoryview, lambda b: memoryview(bytearray(b"--" + b))[2:]],
    ids=["bytes", "bytearray", "memoryview", "slice"],
)
def test_every_kind_of_body(store: ObjectStore, make: Callable[[bytes], bytes]) -> None:
    """A body may be any kind of bytes."""
    store.put("0000/x", make(b"content"))
    assert store.get("0000/x") == b"content"


def test_body_from_a_file(store: ObjectStore, tmp_path: Path) -> None:
    """A body may be a file, of which nothing is changed."""
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    assert store.put("0000/x", source).size_bytes == 11
    assert store.get("0000/x") == b"from a file"
    assert source.read_bytes() == b"from a file"


def test_a_body_file_that_is_missing_is_a_store_error(store: ObjectStore, tmp_path: Path) -> None:
    """A body that cannot be read creates nothing."""
    with pytest.raises(StoreError):
        store.put("0000/x", tmp_path / "missing")
    assert keys(store) == []


def test_put_replaces(store: ObjectStore) -> None:
    """A plain put replaces content and metadata as a whole."""
    store.put("0000/x", b"a longer first content", timestamp_ms=1000)
    store.put("0000/x", b"second", timestamp_ms=2000)
    assert store.get("0000/x") == b"second"
    assert store.head("0000/x").size_bytes == 6


def test_create_only(store: ObjectStore) -> None:
    """A create-only put fails on an existing key and leaves its object alone."""
    store.put("0000/x", b"first", if_absent=True)
    with pytest.raises(PreconditionFailed) as caught:
        store.put("0000/x", b"second", if_absent=True)
    assert not caught.value.retryable
    assert not caught.value.ambiguous
    assert store.get("0000/x") == b"first"


def test_create_only_race_has_one_winner(store: ObjectStore) -> None:
    """Of many create-only puts at once exactly one succeeds, and its bytes are what is there."""
    for race in range(4):
        barrier = threading.Barrier(8)

        def create(n: int, race: int = race, barrier: threading.Barrier = barrier) -> int | None:
            barrier.wait(30)
            try:
                store.put(f"0000/race-{race}", b"writer %d" % n, if_absent=True)
            except PreconditionFailed:
                return None
            except StoreUnavailable:  # a conflict: the server asks to try again
                with pytest.raises(PreconditionFailed):
                    store.put(f"0000/race-{race}", b"writer %d" % n, if_absent=True)
                return None
            return n

        with ThreadPoolExecutor(8) as pool:
            winners = [n for n in pool.map(create, range(8)) if n is not None]
        assert len(winners) == 1
        assert store.get(f"0000/race-{race}") == b"writer %d" % winners[0]


def etag_of(info: ObjectInfo) -> str:
    assert info.etag
    return info.etag


def read(store: ObjectStore, key: str) -> Version:
    version = store.read(key)
    assert version is not None
    return version


def test_read(store: ObjectStore) -> None:
    """read returns a small object whole, with the tag that put and head show, and its age."""
    before = etag_of(store.put("0000/x", b"content"))
    version = read(store, "0000/x")
    assert version.body == b"content"
    assert version.etag == before == store.head("0000/x").etag
    assert version.modified_ms == store.head("0000/x").modified_ms
    # Seconds are all that S3 tells.
    assert -1000 <= version.now_ms - version.modified_ms <= 3600_000


def test_read_of_an_empty_object(store: ObjectStore) -> None:
    """An object may be empty here too."""
    store.put("0000/x", b"")
    assert read(store, "0000/x").body == b""


def test_read_unless_unchanged(store: ObjectStore) -> None:
    """With the tag of the newest version there is nothing to read; with an older one there is."""
    first = etag_of(store.put("0000/x", b"1"))
    assert store.read("0000/x", unless_etag=first) is None
    second = etag_of(store.put("0000/x", b"2"))
    changed = store.read("0000/x", unless_etag=first)
    assert changed is not None
    assert (changed.body, changed.etag) == (b"2", second)
    assert store.read("0000/x", unless_etag=second) is None
    store.delete(["0000/x"])
    for tag in (None, second):
        with pytest.raises(ObjectNotFound) as caught:
            store.read("0000/x", unless_etag=tag)
        assert not caught.value.retryable


def test_compare_and_swap(store: ObjectStore) -> None:
    """if_match replaces the version that it names, once, and gives the tag of the next."""
    tag = etag_of(store.put("0000/x", b"0", if_absent=True))
    for n in range(1, 4):
        stale, tag = tag, etag_of(store.put("0000/x", b"%d" % n, if_match=tag))
        assert store.get("0000/x") == b"%d" % n
        with pytest.raises(PreconditionFailed) as caught:
            store.put("0000/x", b"late", if_match=stale)
        assert not caught.value.retryable
        assert not caught.value.ambiguous
    version = read(store, "0000/x")
    assert (version.body, version.etag) == (b"3", tag)


@pytest.mark.parametrize("size", [5 * MIB, 5 * MIB + 1])
def test_compare_and_swap_of_large_objects(store: ObjectStore, size: int) -> None:
    """The condition holds for uploads in parts too."""
    first = etag_of(store.put("0009/x", b"1"))
    second = etag_of(store.put("0009/x", bytes(size), if_match=first))
    with pytest.raises(PreconditionFailed):
        store.put("0009/x", bytes(size + 1), if_match=first)
    assert store.head("0009/x").size_bytes == size
    store.put("0009/x", b"3", if_match=second)
    assert store.get("0009/x") == b"3"


def test_compare_and_swap_of_a_missing_object(store: ObjectStore) -> None:
    """What is gone, or never was, is not replaced."""
    tag = etag_of(store.put("0000/x", b"1"))
    store.delete(["0000/x"])
    for key in ("0000/x", "never/x"):
        with pytest.raises(PreconditionFailed) as caught:
            store.put(key, b"2", if_match=tag)
        assert not caught.value.retryable
    assert keys(store) == []


def test_one_condition_at_most(store: ObjectStore) -> None:
    """Create-only and compare-and-swap exclude each other."""
    tag = etag_of(store.put("0000/x", b"1"))
    with pytest.raises(ValueError, match="if_match"):
        store.put("0000/x", b"2", if_absent=True, if_match=tag)
    assert store.get("0000/x") == b"1"


@pytest.mark.timeout(300)
def test_compare_and_swap_race_has_one_winner(store: ObjectStore) -> None:
    """Of many writers that replace one version exactly one succeeds, in each of many rounds."""
    tag = etag_of(store.put("0000/x", b"start", if_absent=True))
    threads = 16
    barrier = threading.Barrier(threads)

    def swap(n: int, round_: int, tag: str) -> tuple[int, str] | None:
        barrier.wait(60)
        while True:
            try:
                info = store.put("0000/x", b"%d by %d" % (round_, n), if_match=tag)
            except PreconditionFailed as error:
                assert not error.ambiguous
                return None
            except StoreUnavailable as error:  # a conflict: the server asks to try again
                assert not error.ambiguous
                continue
            return n, etag_of(info)

    with ThreadPoolExecutor(threads) as pool:
        for round_ in range(8):
            done = list(pool.map(swap, range(threads), [round_] * threads, [tag] * threads))
            winners = [winner for winner in done if winner is not None]
            assert len(winners) == 1
            winner, tag = winners[0]
            version = read(store, "0000/x")
            assert (version.body, version.etag) == (b"%d by %d" % (round_, winner), tag)


def test_missing_key(store: ObjectStore) -> None:
    """get and head of a key that is not there raise ObjectNotFound, which is not retryable."""
    for call in (
        lambda: store.get("0000/nothing"),
        lambda: store.get("0000/nothing", 5, 10),
        lambda: store.get("0000/nothing", 0, 0),
        lambda: store.head("0000/nothing"),
    ):
        with pytest.raises(ObjectNotFound) as caught:
            call()
        assert not caught.value.retryable


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (0, 1, b"0"),
        (9, 1, b"9"),
        (8, 100, b"89"),
        (0, 10, b"0123456789"),
        (10, None, b""),
        (10, 5, b""),
        (100, 5, b""),
        (4, 0, b""),
    ],
)
def test_ranges(store: ObjectStore, start: int, length: int | None, expected: bytes) -> None:
    """get returns the range asked for, cut at the end of the object."""
    store.put("0000/x", b"0123456789")
    assert store.get("0000/x", start, length) == expected


def test_empty_object(store: ObjectStore) -> None:
    """An object may be empty."""
    assert store.put("0000/empty", b"").size_bytes == 0
    assert store.get("0000/empty") == b""
    assert store.get("0000/empty", 0, 10) == b""
    assert store.head("0000/empty").size_bytes == 0
    assert [(i.key, i.size_bytes) for i in store.list("0000/")] == [("0000/empty", 0)]


def test_timestamp(store: ObjectStore) -> None:
    """The logical time of an object comes back to the millisecond."""
    stamp = 1_736_000_000_120
    store.put("0000/x", b"x", timestamp_ms=stamp)
    head = store.head("0000/x")
    text = head.metadata.get(TIMESTAMP_METADATA)
    assert (parse_timestamp(text) if text is not None else head.modified_ms) == stamp


def test_listing_of_nothing(store: ObjectStore) -> None:
    """A prefix under which nothing lies gives an empty listing, not an error."""
    assert keys(store) == []
    assert keys(store, "0000/") == []
    assert keys(store, store.level_prefix(9)) == []


def test_listing_is_in_key_order_and_by_prefix(store: ObjectStore) -> None:
    """list returns the keys under the prefix, in order, with the whole key."""
    # No folder here is another's name with a character below "/" behind it: SeaweedFS orders by
    # folder there.  Folders of a replica are numbers of one length.
    for key in ("0001/b", "0000/c", "0000/a", "0000/b", "0009/a", "0000a/x"):
        store.put(key, key.encode())
    assert keys(store, "0000/") == ["0000/a", "0000/b", "0000/c"]
    assert keys(store, "0000/b") == ["0000/b"]
    assert keys(store, "0000") == ["0000/a", "0000/b", "0000/c", "0000a/x"]
    assert keys(store) == sorted(("0001/b", "0000/c", "0000/a", "0000/b", "0009/a", "0000a/x"))
    sizes = {info.key: info.size_bytes for info in store.list("")}
    assert sizes == {key: len(key) for key in sizes}


def test_listing_starts_after(store: ObjectStore) -> None:
    """start_after names a key, existing or not, behind which the listing begins."""
    for key in ("0000/a", "0000/c", "0000/e", "0001/a"):
        store.put(key, b"")
    assert keys(store, "0000/", "0000/c") == ["0000/e"]
    assert keys(store, "0000/", "0000/b") == ["0000/c", "0000/e"]
    assert keys(store, "0000/", "0000/e") == []
    assert keys(store, "0000/", "0000/") == ["0000/a", "0000/c", "0000/e"]
    assert keys(store, "", "0000/d") == ["0000/e", "0001/a"]


@pytest.mark.timeout(300)
def test_listings_around_the_pages_of_s3(store: ObjectStore) -> None:
    """Listing and deleting do not stop at the thousand keys of one S3 request, nor stumble where
    a page is just full."""
    names = [f"0000/{n:016x}-{n:016x}.ltx" for n in range(1, 2002)]
    put = 0
    for count in (0, 999, 1000, 1001, 2001):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: store.put(name, b""), names[put:count]))
        put = count
        assert keys(store, "0000/") == names[:count]
        # Behind the first key there is one page less, just full or not.
        assert keys(store, "0000/", names[0]) == names[1:count]
    assert keys(store, "0000/", names[1100]) == names[1101:]
    store.delete(names[:-2])
    assert keys(store, "0000/") == names[-2:]


def test_delete(store: ObjectStore) -> None:
    """delete removes what it is given and does not mind what is not there."""
    for key in ("0000/a", "0000/b", "0000/c"):
        store.put(key, b"x")
    store.delete(["0000/a", "0000/missing", "0000/c"])
    assert keys(store) == ["0000/b"]
    store.delete(["0000/a"])
    store.delete([])
    with pytest.raises(ObjectNotFound):
        store.get("0000/a")


@pytest.mark.parametrize("size", [0, 5, 12 * MIB + 3])
def test_copy(store: ObjectStore, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, logical time and metadata are copied, also in parts; the target may exist."""
    monkeypatch.setattr("walship.replica.store.s3._COPY_PART_BYTES", 5 * MIB)
    body = os.urandom(size)
    store.put("0000/a", body, timestamp_ms=1_700_000_000_123, metadata={"x-mark": "seven"})
    store.put("0009/b", b"something else")
    for _ in range(2):
        copied = store.copy("0000/a", "0009/b")
        assert (copied.key, copied.size_bytes) == ("0009/b", size)
    source, target = store.head("0000/a"), store.head("0009/b")
    assert store.get("0009/b") == store.get("0000/a") == body
    assert target.metadata == source.metadata
    if store.logical_times:
        assert target.modified_ms == source.modified_ms == 1_700_000_000_123
    store.delete(["0000/a"])
    assert store.get("0009/b") == body
    assert keys(store) == ["0009/b"]


def test_copy_of_nothing(store: ObjectStore) -> None:
    """No source, no target."""
    with pytest.raises(ObjectNotFound):
        store.copy("0000/a", "0009/b")
    assert keys(store) == []


def test_created_again_after_delete(store: ObjectStore) -> None:
    """A deleted key can be created again."""
    store.put("0000/x", b"1", if_absent=True)
    store.delete(["0000/x"])
    store.put("0000/x", b"2", if_absent=True)
    assert store.get("0000/x") == b"2"


@pytest.mark.parametrize("size", [5 * MIB, 5 * MIB + 1, 11 * MIB + 3])
@pytest.mark.parametrize("from_file", [False, True], ids=["memory", "file"])
def test_large_objects(store: ObjectStore, tmp_path: Path, size: int, from_file: bool) -> None:
    """Objects around and above the part size arrive whole, from memory and from a file."""
    content = os.urandom(MIB) * (size // MIB) + os.urandom(size % MIB)
    source = tmp_path / "source"
    source.write_bytes(content)
    info = store.put(
        "0009/big", source if from_file else content, timestamp_ms=1_736_000_000_500, if_absent=True
    )
    assert info.size_bytes == size
    assert store.get("0009/big") == content
    assert store.get("0009/big", 5 * MIB - 3, 6) == content[5 * MIB - 3 : 5 * MIB + 3]
    head = store.head("0009/big")
    assert head.size_bytes == size
    text = head.metadata.get(TIMESTAMP_METADATA)
    assert (parse_timestamp(text) if text is not None else head.modified_ms) == 1_736_000_000_500
    with pytest.raises(PreconditionFailed):
        store.put("0009/big", source if from_file else content, if_absent=True)


def test_segments(store: ObjectStore) -> None:
    """Segments lie under their level's prefix; other names there are passed over."""
    for level, low, high in ((0, 1, 1), (0, 2, 2), (0, 10, 16), (9, 1, 2)):
        store.put(segment_key(store, level, low, high), b"12")
    store.put(store.level_prefix(0) + "notes.txt", b"")
    found = [(s.level, s.min_txid, s.max_txid, s.size_bytes) for s in list_segments(store, 0)]
    assert found == [(0, 1, 1, 2), (0, 2, 2, 2), (0, 10, 16, 2)]
    assert [s.min_txid for s in list_segments(store, 0, after_txid=2)] == [10]
    assert [s.max_txid for s in list_segments(store, 9)] == [2]
    assert list(list_segments(store, 1)) == []


def test_used_from_many_threads(store: ObjectStore) -> None:
    """All methods may run at once."""

    def work(n: int) -> None:
        key = f"0000/thread-{n}"
        body = b"%d" % n * 1000
        store.put(key, body)
        assert store.get(key) == body
        assert store.head(key).size_bytes == len(body)
        assert key in keys(store, key)
        store.delete([key])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(32)))
    assert keys(store) == []


def test_close_twice(store: ObjectStore) -> None:
    """close may be called again."""
    store.close()
    store.close()


@pytest.mark.usefixtures("s3_server")
class TestS3Failures:
    """Errors that only a server can give."""

    def open(self, server: S3Endpoint, bucket: str, **more: object) -> ObjectStore:
        settings = parse_replica(server.replica(bucket, "db", **more), environ={})
        return open_store(settings.store, SystemClock())

    def test_missing_bucket(self, s3_server: S3Endpoint) -> None:
        """A bucket that does not exist is an error that says so, not an empty replica."""
        store = self.open(s3_server, "no-such-bucket")
        for call in (
            lambda: store.put("0000/x", b""),
            lambda: store.get("0000/x"),
            lambda: list(store.list("0000/")),
        ):
            with pytest.raises(StoreError, match="bucket 'no-such-bucket' does not exist") as e:
                call()
            assert not isinstance(e.value, ObjectNotFound)
            assert not e.value.retryable

    @pytest.mark.parametrize(
        "wrong", [{"access-key-id": "nobody"}, {"secret-access-key": "wrong"}], ids=["id", "secret"]
    )
    def test_wrong_credentials(
        self, s3_server: S3Endpoint, make_bucket: Callable[[], str], wrong: dict[str, object]
    ) -> None:
        """Wrong keys are an error that names the setting to check and is not tried again."""
        store = self.open(s3_server, make_bucket(), **wrong)
        for call in (
            lambda: store.put("0000/x", b""),
            lambda: store.get("0000/x"),
            lambda: store.head("0000/x"),
            lambda: list(store.list("")),
            lambda: store.delete(["0000/x"]),
        ):
            with pytest.raises(StoreError, match=r"access-key|credentials|keys") as caught:
                call()
            assert not caught.value.retryable
            assert "wrong" not in str(caught.value).replace(str(wrong), "")

    def test_bare_bucket_continues_what_is_there(
        self, s3_server: S3Endpoint, make_bucket: Callable[[], str]
    ) -> None:
        """Without a path, segments lie at the bucket's top, and are found again."""
        bucket = make_bucket()
        settings = parse_replica(s3_server.replica(bucket), environ={})
        open_store(settings.store, SystemClock()).put("0000/x", b"1")
        assert list(s3_server.keys(bucket)) == ["0000/x"]
        assert keys(open_store(settings.store, SystemClock()), "0000/") == ["0000/x"]

    def test_no_unfinished_uploads(
        self, s3_server: S3Endpoint, make_bucket: Callable[[], str]
    ) -> None:
        """An upload that loses the race for its key leaves no parts behind."""
        bucket = make_bucket()
        store = self.open(s3_server, bucket)
        store.put("0009/x", b"first")
        with pytest.raises(PreconditionFailed):
            store.put("0009/x", bytes(6 * MIB), if_absent=True)
        assert store.get("0009/x") == b"first"
        client = s3_server.client()
        assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
        client.close()


def test_unreachable_endpoint() -> None:
    """A server that is not there is StoreUnavailable, and a write certainly had no effect."""
    settings = parse_replica(
        "s3://bucket/db?endpoint=http://127.0.0.1:9&connect-timeout=2",
        environ={"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
    )
    store = open_store(settings.store, SystemClock())
    with pytest.raises(StoreUnavailable) as caught:
        store.put("0000/x", b"")
    assert caught.value.retryable
    assert not caught.value.ambiguous
    store.close()
