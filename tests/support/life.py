"""A replica's life in virtual time: the real `Levels` and the real restore, on a history of pages.

What a database commits is made up here, page by page, and put into level 0 as the uploader does;
everything above level 0 is the doing of `Levels`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support.clock import FakeClock
from support.memory import MemoryStore, Object
from support.replicas import make_page
from walship.replica.compaction import Levels
from walship.replica.config.levels import LevelSettings
from walship.replica.files import Files
from walship.replica.format.ltx import Encoder, Header
from walship.replica.format.types import LEVEL_SNAPSHOT
from walship.replica.levels import KEPT_L0
from walship.replica.listing import list_replica
from walship.replica.plan import plan
from walship.replica.restore import restore
from walship.replica.store.base import SegmentInfo, segment_key

PAGE_SIZE = 512
#: Midnight.
T0_MS = 19_700 * 86_400_000


class Crash(BaseException):
    """The process is gone, in the middle of a request."""


@dataclass(frozen=True, slots=True)
class State:
    """The database after a TXID: its time, and its pages from the first on."""

    txid: int
    timestamp_ms: int
    pages: tuple[bytes, ...]


class Life:
    """One database and its replica.

    Args:
        directory: for temporary files.
        settings: of the levels.
        seed: chooses what is committed and what goes wrong.

    Attributes:
        states: after each TXID, in order.
    """

    def __init__(self, directory: Path, settings: LevelSettings, seed: int) -> None:
        self.directory = directory
        self.settings = settings
        self.rng = random.Random(seed)
        self.clock = FakeClock(T0_MS)
        self.objects: dict[str, Object] = {}
        self.store = MemoryStore(self.objects, clock=self.clock)
        self.states: list[State] = []
        self.restored = 0
        self.requests_left = -1
        self.store.before = self._before
        self.store.after = self._after
        self.start()

    # -- what happens -------------------------------------------------------------------------

    def start(self) -> None:
        """A new process comes to lead; it knows nothing of the replica."""
        self.requests_left = -1
        self.levels = Levels(
            "app.db",
            self.store,
            self.clock,
            self.settings,
            directory=self.directory,
            files=Files(),
            prove=lambda: None,
            acked_txid=lambda: len(self.states),
        )
        self.levels.begin()

    def commit(self) -> None:
        """Commit some pages and send them; grows and shrinks the database now and then."""
        before = self.states[-1].pages if self.states else ()
        txid = len(self.states) + 1
        commit = len(before) or 24
        if self.rng.random() < 0.1:
            commit = max(4, commit + self.rng.randint(-6, 6))
        changed = set(self.rng.sample(range(1, commit + 1), min(commit, self.rng.randint(1, 4))))
        changed |= set(range(len(before) + 1, commit + 1)) | {1}
        pages = {pgno: make_page(pgno, txid, PAGE_SIZE) for pgno in changed}
        after = tuple(pages.get(pgno) or before[pgno - 1] for pgno in range(1, commit + 1))
        timestamp_ms = self.clock.now_ms()
        body = _encode(pages, commit, txid, timestamp_ms)
        self.store.put(
            segment_key(self.store, 0, txid, txid), body, timestamp_ms=timestamp_ms, if_absent=True
        )
        self.states.append(State(txid, timestamp_ms, after))
        self.levels.sent(txid, body)
        self.levels.acknowledged(txid, len(body), timestamp_ms)

    def step(self) -> None:
        """Let `Levels` do what is due."""
        try:
            self.levels.step()
        except Crash:
            self.start()

    def advance(self, seconds: float) -> None:
        """Let time pass; what becomes due is done."""
        end = self.clock.monotonic() + seconds
        while self.levels.due <= end:
            self.clock.advance(max(0.0, self.levels.due - self.clock.monotonic()))
            self.step()
        self.clock.advance(max(0.0, end - self.clock.monotonic()))

    def crash_after(self, n_requests: int) -> None:
        """The process dies at its so-manieth change of the replica from now on."""
        self.requests_left = n_requests

    @property
    def is_idle(self) -> bool:
        """Whether nothing is going to be requested before something is committed."""
        return self.levels.due == float("inf")

    def _before(self, key: str, made: Object | None) -> None:
        if self.requests_left == 0:
            raise Crash
        if self.requests_left > 0:
            self.requests_left -= 1
            if self.requests_left == 0 and self.rng.random() < 0.5:
                raise Crash
        if made is None and self.store.level_prefix(0) in key:
            level0 = sorted(k for k in self.objects if k.startswith(self.store.level_prefix(0)))
            assert key not in level0[-KEPT_L0:], "one of the newest level-0 segments was deleted"

    def _after(self, key: str, made: Object | None) -> None:
        if made is None and self.rng.random() < 0.02:  # looking takes longer than deleting
            self.assert_newest_is_there()
        if self.requests_left == 0:
            raise Crash

    # -- what must hold -----------------------------------------------------------------------

    def listing(self) -> list[SegmentInfo]:
        return list_replica(self.store)

    def assert_newest_is_there(self) -> None:
        """A plan leads to the newest state, and level 0 reaches as far as anything."""
        listing = self.listing()
        assert plan(listing).max_txid == len(self.states)
        assert max(s.max_txid for s in listing if s.level == 0) == len(self.states)

    def oldest_txid(self, listing: list[SegmentInfo]) -> int:
        """From where on everything that is listed must lead somewhere."""
        return min((s.max_txid for s in listing if s.level == LEVEL_SNAPSHOT), default=1)

    def assert_txids_are_there(self, samples: int) -> None:
        """Each TXID at which a segment ends has a plan; some are restored."""
        listing = self.listing()
        oldest = self.oldest_txid(listing)
        txids = sorted({s.max_txid for s in listing if s.max_txid >= oldest})
        for txid in txids:
            assert plan(listing, txid=txid).max_txid == txid
        for txid in self.rng.sample(txids, min(samples, len(txids))):
            self.assert_restores(txid)

    def assert_restores(self, txid: int) -> None:
        """A restore of exactly that state gives it."""
        assert self._restore(txid=txid) == self._bytes(self.states[txid - 1])

    def assert_times_are_there(self, samples: int) -> None:
        """Each time within the retention leads to the state then, to within level 1's interval."""
        now_ms = self.clock.now_ms()
        retention_ms = round(self.settings.snapshot_retention_s * 1000)
        earliest = max(now_ms - retention_ms, self.states[0].timestamp_ms + 1)
        interval_ms = self.settings.interval_ms(1)
        for _ in range(samples):
            moment = self.rng.randint(earliest, now_ms)
            found = self._restore(timestamp_ms=moment)
            fits = [
                state
                for state in self.states[-4000:]
                if state.timestamp_ms < moment and self._bytes(state) == found
            ]
            assert fits, f"what was restored for {moment} is no state from before"
            window = moment // interval_ms * interval_ms
            due = [state.txid for state in self.states if state.timestamp_ms < window]
            assert fits[-1].txid >= max(due, default=1)

    def assert_few_objects(self) -> None:
        """As many as there were intervals with commits since the oldest that may be there."""
        now_ms = self.clock.now_ms()
        settings = self.settings
        retention_ms = round(settings.snapshot_retention_s * 1000)
        snapshot_ms = settings.interval_ms(LEVEL_SNAPSHOT)
        # The base snapshot is the newest from before the retention, the times it covers included.
        snapshots = sorted(s.created_ms for s in self.listing() if s.level == LEVEL_SNAPSHOT)
        assert sum(at < now_ms - retention_ms for at in snapshots) <= 1
        assert len(snapshots) <= 2 + retention_ms // snapshot_ms
        oldest_ms = snapshots[0] if snapshots else 0
        for level in settings.levels:
            found = [s for s in self.listing() if s.level == level]
            interval_ms = settings.interval_ms(level)
            windows = {
                state.timestamp_ms // interval_ms
                for state in self.states
                if state.timestamp_ms >= oldest_ms - interval_ms
            }
            # One for the newest that always stays, one that reaches over the oldest snapshot.
            assert len(found) <= len(windows) + 2
        slack_ms = settings.interval_ms(1) + round(
            1000 * (settings.l0_retention_s + 2 * settings.l0_retention_check_interval_s)
        )
        # What was merged together goes together, and the newest never.
        newest_ms = self.states[-KEPT_L0].timestamp_ms
        since_ms = min(now_ms - slack_ms, newest_ms) - settings.interval_ms(1)
        young = sum(state.timestamp_ms >= since_ms for state in self.states[-4000:])
        assert sum(s.level == 0 for s in self.listing()) <= young + 1

    def _restore(self, **target: int) -> bytes:
        self.restored += 1
        output = self.directory / "restored"
        restore(self.store, output, clock=self.clock, overwrite=True, **target)
        return output.read_bytes()

    @staticmethod
    def _bytes(state: State) -> bytes:
        return b"".join(state.pages)

    def outage(self, seconds: float) -> None:
        """The store is away for so long."""
        self.store.away = True
        try:
            self.advance(seconds)
        finally:
            self.store.away = False


def _encode(pages: Mapping[int, bytes], commit: int, txid: int, timestamp_ms: int) -> bytes:
    parts: list[bytes] = []
    header = Header(
        page_size=PAGE_SIZE,
        commit=commit,
        min_txid=txid,
        max_txid=txid,
        timestamp_ms=timestamp_ms,
        wal_offset=32,
    )
    encoder = Encoder(lambda more: parts.extend(bytes(part) for part in more), header)
    for pgno in sorted(pages):
        encoder.add_page(pgno, pages[pgno])
    encoder.finish()
    return b"".join(parts)


__all__ = ["T0_MS", "Crash", "Life", "State"]
