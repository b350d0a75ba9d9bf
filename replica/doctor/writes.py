"""Checks that decide whether a fence holds: conditional writes, and races for one object.

A fence keeps a second writer out of a replica.  It rests on create-only writes and on
compare-and-swap.  Stores that claim to have them may ignore them, or check first and write later;
that shows only in a race.  So these checks race: many threads, each on a connection of its own,
released together, judged by the answers and by what is there afterwards.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Final

from walship.replica.errors import PreconditionFailed, StoreError

from .bench import (
    NOT_IMPLEMENTED,
    WRITERS,
    Bench,
    Finding,
    failed,
    ok,
    seconds,
    skipped,
    together,
    warning,
)

__all__ = ["Outcome", "Writes", "judge"]

#: Races for each kind of conditional write: at least, and as long as they take no longer, seconds.
#: The second because there are servers where those who lose a race wait for a second.
_FEWEST_RACES: Final = 10
_MOST_RACES: Final = 30
_RACING_S: Final = 5.0

#: Sizes of racing bodies by turns: a server that checks when the headers are there, and one that
#: checks when the body is there, are slow between check and write in different ways.
_BODY_BYTES: Final = (3_000, 48_000)
#: An object that was written just now is not older than this by the store's own clock.
_FRESH_MS: Final = 60_000
_LARGEST_PART: Final = 64 * 1024 * 1024  # nobody wants to wait for more


class Outcome(Enum):
    """What a racing writer was told."""

    WON = "won"
    LOST = "lost"
    UNCLEAR = "unclear"  # no answer, or none that says whose object is there


class Writes:
    """The checks; those that build on others come behind them."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._store = bench.store
        self._first = b""  # what is under "create"
        self._stale = ""  # a tag that "update" has no more
        self._current = b""  # what is under "update"

    # --- one writer -------------------------------------------------------------------------------

    def create(self) -> Finding:
        """A create-only write of a new key works."""
        key = self._bench.key("create")
        self._first = secrets.token_bytes(_BODY_BYTES[0])
        try:
            self._store.put(key, self._first, if_absent=True)
        except PreconditionFailed as error:
            if not error.ambiguous:  # else it is our own, whose answer was lost
                return failed("a create of a new key is refused as if it existed (If-None-Match)")
        except StoreError as error:
            return _not_implemented(error)
        if self._bench.content(key) != self._first:
            return failed("a created object is not there afterwards")
        return ok("a new key can be created (If-None-Match: *)")

    def create_again(self) -> Finding:
        """A create-only write over another object fails."""
        return self._create_over(secrets.token_bytes(_BODY_BYTES[0]), "a second create of one key")

    def create_equal(self) -> Finding:
        """A writer whose answer was lost tries again, and finds out that the object is there."""
        return self._create_over(self._first, "a repeated create with equal bytes")

    def _create_over(self, body: bytes, what: str) -> Finding:
        key = self._bench.key("create")
        try:
            self._store.put(key, body, if_absent=True)
        except PreconditionFailed:
            if self._bench.content(key) != self._first:
                return failed(f"{what} was refused, and has replaced the object all the same")
            return ok(f"{what} is refused")
        return failed(f"{what} succeeded: the store ignores If-None-Match")

    def update(self) -> Finding:
        """A compare-and-swap with the right tag works."""
        key = self._bench.key("update")
        put = self._store.put(key, secrets.token_bytes(_BODY_BYTES[0]))
        self._stale = self._bench.read(key).etag
        if put.etag != self._stale:
            return failed("a write and a read of one object name different ETags")
        self._current = secrets.token_bytes(_BODY_BYTES[0])
        try:
            self._store.put(key, self._current, if_match=self._stale)
        except PreconditionFailed as error:
            if not error.ambiguous:
                return failed("an update with the right ETag is refused (If-Match)")
        except StoreError as error:
            return _not_implemented(error)
        if self._bench.content(key) != self._current:
            return failed("an update with the right ETag has no effect")
        return ok("the right ETag updates (If-Match)")

    def stale_update(self) -> Finding:
        """A compare-and-swap with an old tag fails."""
        key = self._bench.key("update")
        try:
            self._store.put(key, secrets.token_bytes(_BODY_BYTES[0]), if_match=self._stale)
        except PreconditionFailed:
            if self._bench.content(key) != self._current:
                return failed(
                    "a stale update was refused, and has replaced the object all the same"
                )
            return ok("a stale ETag is refused")
        return failed("an update with a stale ETag succeeded: the store ignores If-Match")

    def update_of_nothing(self) -> Finding:
        """A compare-and-swap of a key that is gone fails."""
        key = self._bench.key("nothing")
        try:
            self._store.put(key, b"nothing", if_match=self._stale)
        except PreconditionFailed:
            if self._bench.content(key) is not None:
                return failed("an update of a missing key was refused, and has created it")
            return ok("a missing key cannot be updated")
        return failed("an update of a missing key created it (If-Match)")

    # --- many writers -----------------------------------------------------------------------------

    def create_race(self) -> Finding:
        """Of many that create one key one succeeds."""
        return self._race("create-race", update=False)

    def update_race(self) -> Finding:
        """Of many that replace one version one succeeds."""
        return self._race("update-race", update=True)

    def _race(self, name: str, *, update: bool) -> Finding:
        connected = self._bench.key("connect")
        self._store.put(connected, b"connect")
        began = self._bench.clock.monotonic()
        n_races = n_clear = 0
        with self._bench.threads() as pool:
            # Connections are made before the first race, which would be spread out otherwise.
            together(pool, lambda _: self._store.get(connected))
            while n_races < _FEWEST_RACES or (
                n_races < _MOST_RACES and self._bench.clock.monotonic() < began + _RACING_S
            ):
                # A key of its own for each race: some stores limit the writes to one key.
                n_races += 1
                key = self._bench.key(f"{name}-{n_races}")
                etag = None
                if update:
                    self._store.put(key, secrets.token_bytes(8))
                    etag = self._bench.read(key).etag
                size = _BODY_BYTES[n_races % len(_BODY_BYTES)]
                bodies = [secrets.token_bytes(size) for _ in range(WRITERS)]
                outcomes = self._contended(pool, key, bodies, etag)
                wrong = judge(outcomes, bodies, self._bench.content(key), update=update)
                if wrong is not None:
                    return failed(f"{wrong} (race {n_races})")
                n_clear += Outcome.WON in outcomes and Outcome.LOST in outcomes
        if n_clear <= n_races // 2:
            return failed(
                f"only {n_clear} of {n_races} races had clear answers: try again when the store is "
                "less busy"
            )
        return ok(f"one winner in each of {n_races} races of {WRITERS} writers")

    def _contended(
        self, pool: ThreadPoolExecutor, key: str, bodies: Sequence[bytes], etag: str | None
    ) -> list[Outcome]:
        def contend(n: int) -> Outcome:
            try:
                self._store.put(key, bodies[n], if_absent=etag is None, if_match=etag)
            except PreconditionFailed as error:
                return Outcome.UNCLEAR if error.ambiguous else Outcome.LOST
            except StoreError as error:
                if error.ambiguous:
                    return Outcome.UNCLEAR
                if not error.retryable:
                    raise
                return Outcome.LOST  # a conflict each time, without effect
            return Outcome.WON

        return together(pool, contend)

    # --- what a lease needs besides ---------------------------------------------------------------

    def conditional_get(self) -> Finding:
        """A read tells whether an object is still the same version."""
        key = self._bench.key("conditional-get")
        self._store.put(key, secrets.token_bytes(8))
        old = self._bench.read(key)
        unchanged = self._store.read(key, unless_etag=old.etag)
        body = secrets.token_bytes(8)
        self._store.put(key, body)
        changed = self._store.read(key, unless_etag=old.etag)
        if changed is None or changed.body != body:
            return failed("a changed object is reported as unchanged (GET with If-None-Match)")
        if unchanged is not None:
            return warning("an unchanged object is sent again: works, and costs traffic")
        return ok("an unchanged object is not sent again (304)")

    def object_age(self) -> Finding:
        """The store's clock and the times of its objects can be compared."""
        key = self._bench.key("age")
        self._store.put(key, b"age")
        version = self._bench.read(key)
        times_ms = [version.modified_ms, *(info.modified_ms for info in self._store.list(key))]
        for modified_ms in times_ms:
            age_ms = version.now_ms - modified_ms
            if abs(age_ms) > _FRESH_MS:
                return failed(
                    f"a new object is {seconds(age_ms)} old by the store's own clock: nobody could "
                    "tell whether another writer is alive"
                )
        return ok("new objects are new by the store's clock")

    # --- uploads in parts -------------------------------------------------------------------------

    def large_object(self) -> Finding:
        """What is written in parts comes back whole."""
        if self._bench.part_size > _LARGEST_PART:
            return skipped(f"part-size is {self._bench.part_size // 1024**2} MiB: too much to try")
        key = self._bench.key("large")
        content = secrets.token_bytes(self._bench.part_size + 100_000)
        self._store.put(key, content)
        how = f"{len(content) / 1e6:.1f} MB" + ("" if self._bench.is_directory else " in two parts")
        if self._store.get(key) != content:
            return failed(f"an object of {how} does not come back as it was written")
        return ok(f"{how} come back as written")

    def large_create(self) -> Finding:
        """Completing an upload in parts over an object fails, if create-only was asked for."""
        body = secrets.token_bytes(self._bench.part_size + 100_000)
        advice = "set part-size above the largest segment (5GiB at most): one PUT each"
        try:
            self._store.put(self._bench.key("large"), body, if_absent=True)
        except PreconditionFailed:
            return ok("an upload in parts replaces nothing (create-only)")
        except StoreError as error:
            if error.code not in NOT_IMPLEMENTED:
                raise
            return failed(f"uploads in parts cannot be create-only (501): {advice}")
        return failed(f"the end of an upload in parts ignores If-None-Match: {advice}")


def judge(
    outcomes: Sequence[Outcome], bodies: Sequence[bytes], content: bytes | None, *, update: bool
) -> str | None:
    """What is wrong with the end of a race, or None.

    Args:
        outcomes, bodies: of each writer.
        content: what is there afterwards, or None for no object.
        update: the writers replaced one version; else they created one key.
    """
    done = "replaced one version" if update else "created one key"
    told = {
        outcome: [body for body, its in zip(bodies, outcomes, strict=True) if its is outcome]
        for outcome in Outcome
    }
    if len(told[Outcome.WON]) > 1:
        return (
            f"{len(told[Outcome.WON])} of {len(bodies)} writers at once were told that they had "
            f"{done}: the store checks, and writes later"
        )
    if content in told[Outcome.LOST]:
        return "a writer that was refused has written all the same"
    # A writer without an answer may have won, if nobody was told so.
    if content in (told[Outcome.WON] or told[Outcome.UNCLEAR]):
        return None
    if told[Outcome.WON]:
        return "what the winner of a race wrote is not there afterwards"
    return f"of {len(bodies)} writers at once none has {done}"


def _not_implemented(error: StoreError) -> Finding:
    if error.code not in NOT_IMPLEMENTED:
        raise error
    return failed("the store has no conditional writes (501 NotImplemented)")
