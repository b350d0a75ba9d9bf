"""What counts at the end of a replica, and what may be replaced there."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.clock import FakeClock
from support.memory import MemoryStore
from walship.replica.errors import StoreError
from walship.replica.listing import list_replica, live_segments, replica_head
from walship.replica.sender import Sender
from walship.replica.spool import Sealed
from walship.replica.sqlite import FencedError
from walship.replica.store.base import PREVIOUS_METADATA, SHA256_METADATA, segment_key


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({}, clock=FakeClock())


def content(txid: int, writer: str) -> bytes:
    """Stands for a segment."""
    return f"{writer} {txid}".encode()


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def put(
    store: MemoryStore, txid: int, writer: str = "a", *, on: str | None = None, level: int = 0
) -> None:
    """An object as a writer puts it, resting on its own one before, or on that of ``on``."""
    body = content(txid, writer)
    metadata = {SHA256_METADATA: digest(body)}
    if txid > 1:
        metadata[PREVIOUS_METADATA] = digest(content(txid - 1, on or writer))
    store.put(segment_key(store, level, txid, txid), body, metadata=metadata)


def counting(store: MemoryStore) -> list[int]:
    """TXIDs of the segments that count."""
    return [s.max_txid for s in live_segments(store, list_replica(store)).segments]


def test_a_chain_counts(store: MemoryStore) -> None:
    """Also where another writer goes on, and where nothing is known of a predecessor."""
    for txid in range(1, 21):
        put(store, txid)
    put(store, 21, "b", on="a")
    store.put(segment_key(store, 0, 22, 22), b"of Litestream")
    put(store, 23, "c", on="nobody")
    assert counting(store) == list(range(1, 24))
    assert live_segments(store, list_replica(store)).reason == ""


def test_what_rests_on_another_predecessor_does_not_count(store: MemoryStore) -> None:
    """A fenced writer's later segments lie behind the new writer's first one."""
    for txid in range(1, 4):
        put(store, txid)
    put(store, 4, "b", on="a")
    put(store, 5, "a")
    put(store, 6, "a")
    assert counting(store) == [1, 2, 3, 4]
    assert "TXID 0000000000000005" in live_segments(store, list_replica(store)).reason
    head = replica_head(store)
    assert head is not None
    assert head.max_txid == 4


def test_a_first_segment_that_never_arrived(store: MemoryStore) -> None:
    """The replica is empty, although segments behind the first one are there."""
    put(store, 2)
    put(store, 3)
    assert counting(store) == []
    assert replica_head(store) is None


def test_a_gap_that_compaction_covers_is_none(store: MemoryStore) -> None:
    """Level 0 may begin anywhere, and a lost segment may be in a higher level."""
    put(store, 3)
    store.put(segment_key(store, 1, 1, 3), b"compacted")
    store.put(segment_key(store, 1, 4, 6), b"compacted")
    put(store, 7)
    assert counting(store) == [3, 7, 3, 6]


def test_a_listing_that_begins_in_the_middle(store: MemoryStore) -> None:
    """Up to the TXID that is known to be there nothing is missing."""
    for txid in (7, 8, 10):
        put(store, txid)
    live = live_segments(store, list_replica(store), covered=6)
    assert [s.max_txid for s in live.segments] == [7, 8]


def test_sizes_are_those_of_the_objects_that_were_looked_at(store: MemoryStore) -> None:
    """A dead upload may be replaced between the listing and the look at it."""
    put(store, 1)
    put(store, 2, "a much longer name", on="nobody")
    listing = list_replica(store)
    put(store, 2, "b", on="a")
    (first, second) = live_segments(store, listing).segments
    assert (first.size_bytes, second.size_bytes) == (3, 3)


# -- sending into a place that is taken ------------------------------------------------------------


def sender(store: MemoryStore, acked_txid: int = 0) -> tuple[Sender, list[bytes]]:
    """A sender, and the bodies that its capture gives out."""
    bodies: list[bytes] = []
    capture = SimpleNamespace(
        record=SimpleNamespace(body=lambda sealed: bodies[0]),
        state=SimpleNamespace(acked_txid=acked_txid),
    )
    fence = SimpleNamespace(rival=lambda: None, ensure=lambda: None, has_outlasted=lambda: False)
    made = Sender("app.db", cast(Any, capture), store, cast(Any, fence), FakeClock())
    return made, bodies


def sealed(txid: int, writer: str, previous: str = "") -> Sealed:
    body = content(txid, writer)
    return Sealed(txid=txid, size_bytes=len(body), sha256=digest(body), previous=previous)


def send(store: MemoryStore, txid: int, *, on: str, acked_txid: int = 0) -> bytes:
    """Send "b"'s segment; what lies under the TXID afterwards."""
    made, bodies = sender(store, acked_txid)
    bodies.append(content(txid, "b"))
    made.send(sealed(txid, "b", digest(content(txid - 1, on))))
    return store.get(segment_key(store, 0, txid, txid))


def test_a_segment_names_its_predecessor(store: MemoryStore) -> None:
    """In its metadata; so later ones can be told from those of a writer that is fenced."""
    put(store, 1)
    send(store, 2, on="a")
    found = store.head(segment_key(store, 0, 2, 2)).metadata
    assert found[PREVIOUS_METADATA] == digest(content(1, "a"))


def test_a_dead_upload_gives_way(store: MemoryStore) -> None:
    """What rests on something else than our segment before it was never acknowledged."""
    put(store, 1)
    put(store, 2, "b", on="a")
    put(store, 3, "a")
    assert send(store, 3, on="b") == content(3, "b")
    put(store, 3, "a")
    store.delete([segment_key(store, 0, 2, 2)])  # compacted
    assert send(store, 3, on="b", acked_txid=2) == content(3, "b")


def test_what_rests_on_what_is_there_is_never_replaced(store: MemoryStore) -> None:
    """Whoever put it there, and however late: somebody may have gone on from it."""
    put(store, 1)
    put(store, 2, "a")
    with pytest.raises(FencedError):
        send(store, 2, on="a", acked_txid=1)
    assert store.get(segment_key(store, 0, 2, 2)) == content(2, "a")


def test_before_our_own_predecessor_is_there_nothing_is_replaced(store: MemoryStore) -> None:
    """It may be the other's that arrives there, and then ours are the dead ones."""
    put(store, 1)
    put(store, 3, "a")
    with pytest.raises(StoreError, match="waits for the one before it"):
        send(store, 3, on="b", acked_txid=1)
    put(store, 2, "a")
    with pytest.raises(StoreError, match="waits for the one before it"):
        send(store, 3, on="b", acked_txid=1)
    assert store.get(segment_key(store, 0, 3, 3)) == content(3, "a")
