"""Deliberate faults in the modules under test, each of which the simulation must notice."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from walship.replica import sealing
from walship.replica.capture import Capture
from walship.replica.compaction import Levels
from walship.replica.fence import Fence
from walship.replica.frames import WalReader
from walship.replica.levels import Listing
from walship.replica.pagemap import SegmentHashes
from walship.replica.resync import Resync
from walship.replica.sender import Sender
from walship.replica.spool import Sealed
from walship.replica.sqlite import Published, SqlitePort
from walship.replica.uploader import Uploader

from .bucket import Weather
from .world import Profile

__all__ = ["MUTANTS", "Mutant"]


def acknowledge_early(patch: pytest.MonkeyPatch) -> None:
    """A segment counts as done as soon as it was handed to a request."""
    real = Uploader._send_waiting

    def send_waiting(self: Uploader) -> None:
        real(self)
        for slot in self._slots.values():
            slot.done = slot.done or slot.in_flight

    patch.setattr(Uploader, "_send_waiting", send_waiting)


def acknowledge_without_proof(patch: pytest.MonkeyPatch) -> None:
    """The lease is taken, and never looked at again."""
    patch.setattr(Fence, "holds", lambda self: True)
    patch.setattr(Fence, "ensure", lambda self: None)


def acknowledge_out_of_order(patch: pytest.MonkeyPatch) -> None:
    """The highest TXID that is done counts, whatever became of those before it."""

    def acknowledge(self: Uploader) -> None:
        done = [txid for txid, slot in self._slots.items() if slot.done]
        if done and self._fence.holds():
            self._capture.acknowledge(max(done))
            self._acked_txid = max(done)
            self._waits.acknowledge(max(done))
            for txid in done:
                del self._slots[txid]

    patch.setattr(Uploader, "_acknowledge", acknowledge)


def ship_ghosts(patch: pytest.MonkeyPatch) -> None:
    """Every commit frame in the WAL that has its salts counts, published or not."""
    real = SqlitePort.published

    def published(self: SqlitePort) -> Published | None:
        found = real(self)
        reader = WalReader(self.path + "-wal", _files())
        try:
            header = reader.header()
            if found is None or header is None or not found.mx_frame:
                return found
            end, number = found.mx_frame, found.mx_frame + 1
            while (frame := reader.frame(number, header.page_size)) is not None:
                if frame.salts != header.salts:
                    break
                end = number if frame.commit else end
                number += 1
            return Published(end, found.n_backfill)
        finally:
            reader.close()

    patch.setattr(SqlitePort, "published", published)


def _files() -> Any:
    from walship.replica.files import Files

    return Files()


def drop_a_page(patch: pytest.MonkeyPatch) -> None:
    """The last page of a batch of several is left out now and then."""
    real = sealing.pages
    count = 0

    def pages(*arguments: Any) -> Iterator[tuple[int, memoryview]]:
        nonlocal count
        count += 1
        found = [(pgno, bytes(page)) for pgno, page in real(*arguments)]
        if len(found) > 2 and count % 5 == 0:
            del found[-1]
        return iter((pgno, memoryview(page)) for pgno, page in found)

    patch.setattr(sealing, "pages", pages)


def reuse_a_slot(patch: pytest.MonkeyPatch) -> None:
    """After a failure the segment is made anew, with what was committed meanwhile."""
    real = Uploader._failed

    def failed(self: Uploader, error: Any) -> float:
        state = self._capture.state
        if state.segments and self._reconciled and not any(s.done for s in self._slots.values()):
            with self._capture.mutex:
                self._capture.record.require_full_copy("made anew")
                fresh = replace(self._capture.state, txid=state.acked_txid, sha256="")
                self._capture.record.begin(fresh)
            self._slots.clear()
            self._covered_ticket = -1
        return real(self, error)

    patch.setattr(Uploader, "_failed", failed)


def take_over_without_waiting(patch: pytest.MonkeyPatch) -> None:
    """Somebody else's lease is taken although it has not run out."""
    patch.setattr(Fence, "_lease_of", lambda self, held: -10.0)
    patch.setattr(Fence, "_wait_for_the_last", lambda self, before, former: None)


def take_over_early(patch: pytest.MonkeyPatch) -> None:
    """Somebody else's lease is taken a little before its owner has stopped to believe in it."""
    patch.setattr(Fence, "_lease_of", lambda self, held: held.lease_s * 0.6 - 2.0)


def replace_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Whatever lies under a TXID of ours gives way."""
    patch.setattr(Sender, "_is_dead", lambda self, found, sealed: True)


def ignore_the_chain(patch: pytest.MonkeyPatch) -> None:
    """A segment counts whatever it rests on."""
    patch.setattr("walship.replica.listing.rests_on_another", lambda metadata, before: False)


def forget_the_gate(patch: pytest.MonkeyPatch) -> None:
    """A WAL is let go without a look at what it holds."""
    patch.setattr(Capture, "_rest_of_wal", lambda *arguments: None)


def keep_what_a_latecomer_brought(patch: pytest.MonkeyPatch) -> None:
    """The writer goes on behind a former writer's segment as if that had changed nothing."""
    real = Resync._hash_segment

    def hash_segment(self: Resync, txid: int, sealed: Sealed | None) -> SegmentHashes:
        found = real(self, txid, sealed)
        return found if sealed is not None else replace(found, pgnos=array("I"), hashes=array("Q"))

    patch.setattr(Resync, "_hash_segment", hash_segment)


def be_fenced_by_a_latecomer(patch: pytest.MonkeyPatch) -> None:
    """Any other segment under a TXID of ours means that there is another writer."""
    patch.setattr(Sender, "_latecomer", lambda self, found, sealed: None)


def merge_what_is_not_acknowledged(patch: pytest.MonkeyPatch) -> None:
    """Whatever lies in level 0 is merged."""
    real = Levels._list

    def list_all(self: Levels) -> Listing:
        patch.setattr(self, "_acked_txid", lambda: 1 << 62)
        return real(self)

    patch.setattr(Levels, "_list", list_all)


@dataclass(frozen=True)
class Mutant:
    """A fault, and where it shows.

    Attributes:
        install: puts it in.
        theme: of the worlds in which it matters; see `world.THEMES`.
        tune: makes them such that it shows sooner.
    """

    install: Callable[[pytest.MonkeyPatch], None]
    theme: str
    tune: Callable[[Profile], None] = lambda profile: None


def _sleepers(profile: Profile) -> None:
    """One sleeps with something to send, another waits to take over, and retention is short."""
    profile.machines, profile.lease_s, profile.fence_wait_s = 2, 5.0, 60.0
    profile.events = ("suspend", "compact", "compact")
    profile.chaos, profile.pause_s, profile.interval_s = 20, 3.0, 0.2


def _ghosts(profile: Profile) -> None:
    profile.processes, profile.interval_s = 3, 0.2
    profile.events, profile.chaos = ("kill-in-commit",), 12


def _twins(profile: Profile) -> None:
    """Machines that hold each other for themselves, with several segments on their way."""
    profile.machines, profile.processes, profile.threads = 1, 1, 2
    profile.directory, profile.interval_s, profile.ops = False, 0.0, 40
    profile.events, profile.chaos, profile.pause_s = ("clone",), 4, 3.0
    profile.weather = Weather(lost=0.25, timeout_s=3.0)


def _latecomers(profile: Profile) -> None:
    """One is stopped with a segment on its way, which lands when another one has taken over."""
    profile.machines, profile.processes, profile.lease_s, profile.fence_wait_s = 2, 1, 5.0, 60.0
    profile.directory, profile.on_fenced, profile.ops = False, "refuse", 300
    profile.open_timeout_s, profile.interval_s = 100.0, 1.0
    profile.level_s, profile.snapshot_s = 3600.0, 86400.0  # each TXID can be looked at
    profile.events, profile.chaos, profile.pause_s = ("straggle",), 24, 6.0


def _merging_twins(profile: Profile) -> None:
    """All that was sent is merged soon."""
    _twins(profile)
    profile.level_s, profile.snapshot_s, profile.lease_s = 1.0, 10.0, 5.0


MUTANTS = {
    mutant.install.__name__: mutant
    for mutant in (
        Mutant(acknowledge_early, "alone"),
        Mutant(acknowledge_without_proof, "retention", _sleepers),
        Mutant(acknowledge_out_of_order, "alone"),
        Mutant(ship_ghosts, "processes", _ghosts),
        Mutant(drop_a_page, "alone"),
        Mutant(reuse_a_slot, "alone"),
        Mutant(take_over_without_waiting, "fight"),
        Mutant(take_over_early, "fight", _latecomers),
        Mutant(replace_unchecked, "clones"),
        Mutant(ignore_the_chain, "clones", _twins),
        Mutant(forget_the_gate, "alone"),
        Mutant(keep_what_a_latecomer_brought, "fight", _latecomers),
        Mutant(be_fenced_by_a_latecomer, "fight", _latecomers),
        Mutant(merge_what_is_not_acknowledged, "clones", _merging_twins),
    )
}
