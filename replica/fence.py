"""The fence: one writer per replica, also when two hosts believe to be it.

Two things keep a second writer out.  Level-0 objects are created, never replaced, so whoever comes
second with a TXID learns it.  And ``lock.json`` beside the levels says who the writer is; it is
taken and renewed by compare-and-swap.  Its schema is the one that Litestream has for such an object
(``generation``, ``owner``, ``expires_at``), with fields of ours added::

    {"generation": 7, "owner": "web-1:7 (/data/app.db)", "expires_at": "2026-01-31T15:54:37Z",
     "nonce": "9f86d081884c7d65", "renewals": 12, "lease_seconds": 30.0,
     "process": "8d7e.../pid:[4026531836]/7/123"}

An object that is created under our lease shows that we are alive as well as a renewal does, where
the store says when objects were stored: so a busy database seldom renews, and an idle one sends
nothing at all.  Its lease runs out then, and the next commit renews it before it is acknowledged.

**When may a segment be acknowledged?**  While the last proof of being the writer is younger than
two thirds of the lease.  Proofs are a renewal, and a created object that was acknowledged itself;
what counts is when the request was *begun*, by a clock that counts suspended time.  Whoever takes
the lease over waits until the youngest sign of life is older than the whole lease, by the store's
own clock, looks again after the swap, and only then decides where the history ends.  So a writer
that slept finds its proofs too old, and its renewal fails: what it sent meanwhile was never
acknowledged.  Where it rests on what the replica holds it stays, whoever sees it first goes on from
it, and so does the new writer if it comes between two of its own: with all pages of which it says
something else (`uploader`).  Where it does not, nobody ever counts it (`listing`), and the new
writer's takes its place.  Nor is anything sent on a proof older than the lease.

The state directory that took a lease takes it again at once, for instance after SIGKILL: the record
lock on it tells that nobody else uses it.  So does anybody who can see that the process which held
it is gone.  A *copy* of the directory on another machine can do so
too; then the two fence each other, and neither touches what the other wrote.

Nothing here relies on the clocks of two hosts agreeing; they only have to run equally fast to
within a third of a lease.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol

from .clock import Clock
from .errors import ClosedError, ObjectNotFound, PreconditionFailed, StoreError
from .sqlite import FencedError, RefusedError
from .store.base import (
    IN_FLIGHT_MAX,
    ObjectStore,
    SegmentInfo,
    Version,
    list_segments,
)

__all__ = ["LEASE_KEY", "Fence", "Lease", "Memory", "owner_name", "parse_lease"]

log = logging.getLogger("walship.fence")

LEASE_KEY: Final = "lock.json"

#: Lease of a writer that does not say how long it is (Litestream's default), seconds.
_DEFAULT_LEASE_S: Final = 30.0
#: Times of objects are in whole seconds: two of them may be off by this much together, seconds.
_ROUNDING_S: Final = 2.0
#: Pause between looks at a lease that is waited for, seconds.
_POLL_S: Final = 0.25
#: Races for the lease that are lost in a row before somebody else is believed to win for good.
_RACES: Final = 5
#: Nonces of earlier processes' attempts that are remembered, besides the one that holds.
_NONCES: Final = 3
#: A tag that no object has.
_NO_ETAG: Final = "00000000000000000000000000000000"


@dataclass(frozen=True, slots=True)
class Lease:
    """What ``lock.json`` says.

    Attributes:
        generation: grows by one whenever the lease passes to somebody; never repeats.
        owner: for people; empty once the writer has given the lease up.
        expires_at_ms: by the owner's clock, ms since the epoch; for readers that know no better.
        nonce: random for each time that the lease was taken; names the holder.
        renewals: makes each version of the object another one.
        lease_s: how long after the last sign of life it lasts, seconds.
        process: which one holds it (`process.this_process`); empty if unknown.
    """

    generation: int
    owner: str
    expires_at_ms: int
    nonce: str = ""
    renewals: int = 0
    lease_s: float = _DEFAULT_LEASE_S
    process: str = ""

    def to_json(self) -> bytes:
        moment = datetime.fromtimestamp(self.expires_at_ms // 1000, tz=UTC)
        content = {
            "generation": self.generation,
            "owner": self.owner,
            "expires_at": f"{moment:%Y-%m-%dT%H:%M:%SZ}",
            "nonce": self.nonce,
            "renewals": self.renewals,
            "lease_seconds": self.lease_s,
            "process": self.process,
        }
        return json.dumps(content).encode() + b"\n"


def parse_lease(body: bytes) -> Lease | None:
    """The lease in a ``lock.json``, whoever wrote it; None if it is none."""
    try:
        content: Any = json.loads(body)
        expires = datetime.fromisoformat(str(content["expires_at"]))
        lease_s = float(content.get("lease_seconds", _DEFAULT_LEASE_S))
        if not math.isfinite(lease_s):
            return None
        return Lease(
            generation=int(content["generation"]),
            owner=str(content.get("owner", "")),
            expires_at_ms=int(expires.timestamp() * 1000),
            nonce=str(content.get("nonce", "")),
            renewals=int(content.get("renewals", 0)),
            lease_s=min(max(lease_s, 1.0), 600.0),
            process=str(content.get("process", "")),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def owner_name(path: str) -> str:
    """How this database calls itself in a lease: host, process and file."""
    return f"{socket.gethostname()}:{os.getpid()} ({path})"


@dataclass(frozen=True, slots=True)
class _Tail:
    """The end of level 0, whose objects are signs of life of whoever put them there.

    Attributes:
        max_txid: the highest that is there; 0 without any.
        newest_ms: when the youngest object was stored; one sent again may lie before the last.
        segments: the last ones, among which there may be gaps that are filled later.
    """

    max_txid: int
    newest_ms: int
    segments: tuple[SegmentInfo, ...]


class Memory(Protocol):
    """What the fence keeps beside the database, for the time after a crash."""

    def nonces(self) -> tuple[str, ...]:
        """Of the leases that this state directory may hold."""

    def keep_nonces(self, nonces: tuple[str, ...]) -> None:
        """Remember them; before they are used."""

    def is_tested(self) -> bool:
        """Whether conditional writes of this replica were seen to work."""

    def keep_tested(self) -> None:
        """Remember that they do."""


class Fence:
    """The lease of one replica, as one writer holds it.  Thread-safe; one attempt per request.

    Args:
        store: the replica.
        memory: the state directory's.
        policy: "auto", "required" or "off"; see the setting ``fence``.
        lease_s: how long a crashed writer keeps others out, seconds.
        wait_s: how long `acquire` waits for another one to go, seconds.
        owner: for people, in the lease.
        process: names this process to `is_gone`.
        is_gone: whether a process that held the lease is sure not to exist any more.
        ended: true once nobody is interested in `acquire` any more.
    """

    def __init__(
        self,
        store: ObjectStore,
        clock: Clock,
        memory: Memory,
        *,
        policy: Literal["auto", "required", "off"],
        lease_s: float,
        wait_s: float,
        owner: str,
        process: str = "",
        is_gone: Callable[[str], bool] = lambda process: False,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._clock = clock
        self._memory = memory
        self._policy = policy
        self._lease_s = lease_s
        self._wait_s = wait_s
        self._owner = owner
        self._process = process
        self._is_gone = is_gone
        self._ended = ended
        self._works = policy != "off"
        # Guards what follows; held during the requests of `acquire`, `renew` and `release`.
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._etag = ""
        self._proof = float("-inf")
        self._outlasted = False
        # Of attempts at the lease that may still succeed; only the thread that acquires uses it.
        self._drawn = ""

    # -- what holds now -----------------------------------------------------------------------

    @property
    def works(self) -> bool:
        """Whether there is a fence: it is wanted, and the store can."""
        return self._works

    def holds(self) -> bool:
        """Whether a segment may be acknowledged now."""
        return not self._works or self._age() < self._lease_s * 2 / 3

    def wants_renewal(self) -> bool:
        """Whether it is time to renew, so that acknowledgements need not wait for it."""
        return self._works and self._age() >= self._lease_s / 2

    def _age(self) -> float:
        return self._clock.monotonic() - self._proof

    def created(self, began: float) -> None:
        """An object created by a request begun then was acknowledged: a sign of life for others."""
        if not self._store.logical_times and self._lease is not None:
            self._proof = max(self._proof, began)

    # -- taking it ----------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Become the writer; returns when this process is it.  Nothing may be sent before.

        Returns:
            False if there was no lease: nobody has written to the replica before, or it was lost.

        Raises:
            FencedError: another writer is alive; it is named.
            RefusedError: the fence is required and the store cannot.
            ClosedError: nobody is interested any more.
            StoreError: try again.
        """
        if not self._works:
            return True
        deadline = self._clock.monotonic() + self._wait_s
        existed = True
        told = False
        races = 0
        tail: _Tail | None = None
        while True:
            version = self._read()
            existed = existed and version is not None
            held = parse_lease(version.body) if version is not None else None
            owner, silent_s, left_s = "", 0.0, 0.0
            is_held = version is not None and not self._is_free(held)
            if is_held:
                assert version is not None
                # Whatever it is that cannot be read: somebody wrote it.
                owner = held.owner if held is not None else "another writer"
                if not self._store.logical_times:
                    tail = self._look_at_tail(tail)
                silent_s = self._silent(version, tail)
                left_s = self._lease_of(held) + _ROUNDING_S - silent_s
            if left_s <= 0:
                if self._take(version, held, tail, outlasted=is_held and held is not None):
                    return existed
                races += 1
                if races < _RACES:
                    continue
            if self._ended():
                raise ClosedError(f"{self._store.url} is not waited for any more")
            if self._clock.monotonic() >= deadline:
                raise FencedError(
                    f"{self._store.url} belongs to {owner or 'another writer'}, last seen alive "
                    f"{silent_s:.0f} s ago: close it there first, or set fence-wait to wait for it "
                    "(rolling deploys), or use a replica of its own"
                )
            if not told:
                told = True
                log.info("waiting for %s to give up %s", owner, self._store.url)
            self._clock.sleep(min(_POLL_S, max(0.01, left_s)))

    def _is_free(self, held: Lease | None) -> bool:
        """Given up; or taken by this very state directory, whose lock this process has; or by a
        process that is gone."""
        return held is not None and (
            not held.owner or held.nonce in self._memory.nonces() or self._is_gone(held.process)
        )

    def _lease_of(self, held: Lease | None) -> float:
        return held.lease_s if held is not None else _DEFAULT_LEASE_S

    def _silent(self, version: Version, tail: _Tail | None) -> float:
        """For how long nothing has been heard of whoever holds the lease, seconds."""
        alive_ms = version.modified_ms
        if tail is not None:
            alive_ms = max(alive_ms, tail.newest_ms)
        return max(0.0, (version.now_ms - alive_ms) / 1000)

    def _read(self) -> Version | None:
        try:
            return self._store.read(LEASE_KEY)
        except ObjectNotFound:
            return None

    def _look_at_tail(self, known: _Tail | None) -> _Tail:
        """What level 0 tells of its writer.

        Args:
            known: what was seen a while ago; only what may have changed since is listed.
        """
        after = max(0, known.max_txid - IN_FLIGHT_MAX) if known is not None else None
        newest_ms = known.newest_ms if known is not None else 0
        last: deque[SegmentInfo] = deque(maxlen=IN_FLIGHT_MAX)
        for segment in list_segments(self._store, 0, after_txid=after):
            newest_ms = max(newest_ms, segment.created_ms)
            last.append(segment)
        max_txid = last[-1].max_txid if last else 0
        first = max_txid - IN_FLIGHT_MAX
        return _Tail(max_txid, newest_ms, tuple(s for s in last if s.max_txid > first))

    def _take(
        self, version: Version | None, held: Lease | None, tail: _Tail | None, *, outlasted: bool
    ) -> bool:
        """Swap the lease for one of ours; False if somebody else was faster.

        Args:
            outlasted: whether it has run out, and is not taken before its time.
        """
        generation = (held.generation if held is not None else 0) + 1
        known = self._memory.nonces()
        ours = held is not None and held.nonce in known
        # One for all attempts of this process, each of which may land late.
        self._drawn = self._drawn or secrets.token_hex(8)
        lease = Lease(
            generation=generation,
            owner=self._owner,
            expires_at_ms=self._expiry(),
            nonce=self._drawn,
            lease_s=self._lease_s,
            process=self._process,
        )
        # The swap may fail, or its answer be lost, or it may land late.
        named = (lease.nonce, held.nonce if held is not None else "")
        others = [nonce for nonce in known[-_NONCES:] if nonce not in named]
        kept = (held.nonce,) if held is not None and ours and held.nonce != lease.nonce else ()
        self._memory.keep_nonces((*kept, *others, lease.nonce))
        if not self._memory.is_tested():
            if not self._test(lease, version is not None):
                return True
            if version is None:
                return False  # there is one now: once more from the beginning
        began = self._clock.monotonic()
        try:
            if version is None:
                info = self._store.put(LEASE_KEY, lease.to_json(), if_absent=True)
            else:
                info = self._store.put(LEASE_KEY, lease.to_json(), if_match=version.etag)
        except PreconditionFailed:
            return False
        except StoreError as error:
            if error.code != "NotImplemented":
                raise
            self._unfit("it has no conditional writes")
            return True
        with self._lock:
            self._hold(lease, info.etag or "", began)
            self._outlasted = outlasted
        self._drawn = ""
        if held is not None and not self._is_free(held):
            log.warning(
                "%s taken over from %s, whose lease had run out", self._store.url, held.owner
            )
            self._wait_for_the_last(tail, held)
        return True

    def _hold(self, lease: Lease, etag: str, began: float) -> None:
        self._lease, self._etag, self._proof = lease, etag, began

    def _expiry(self) -> int:
        return self._clock.now_ms() + int(self._lease_s * 1000)

    def _wait_for_the_last(self, before: _Tail | None, former: Lease) -> None:
        """Something that the former writer got through between our look and our swap is a sign of
        life, on which it may acknowledge what it sends until that is too old: let it end."""
        if self._store.logical_times:
            return  # the swap itself compared the only sign of life there is
        after = self._look_at_tail(before)
        if before is not None and after.segments != before.segments:
            self._clock.sleep(former.lease_s)
            self.renew()

    def _test(self, lease: Lease, exists: bool) -> bool:
        """Whether the store honours conditions that cannot hold; at the first use of a replica.

        A store that does not is left with a lease that nobody holds.
        """
        body = replace(lease, owner="", renewals=-1).to_json()
        try:
            if not exists:
                # Nobody else can be hurt by an object that was not there.
                self._store.put(LEASE_KEY, replace(lease, owner="").to_json(), if_absent=True)
            for condition in ({"if_absent": True}, {"if_match": _NO_ETAG}):
                try:
                    self._store.put(LEASE_KEY, body, **condition)
                except PreconditionFailed:
                    continue
                self._unfit("it ignores the conditions of conditional writes")
                return False
        except PreconditionFailed:
            return True  # somebody else created it in this moment: conditions hold
        except StoreError as error:
            if error.code != "NotImplemented":
                raise
            self._unfit("it has no conditional writes")
            return False
        self._memory.keep_tested()
        if self._policy == "required":
            log.info(
                "%s refused two conditional writes that must fail, so it has a fence; `walship "
                "doctor` also races for one object",
                self._store.url,
            )
        return True

    def _unfit(self, reason: str) -> None:
        if self._policy == "required":
            raise RefusedError(
                f"fence: required, but {self._store.url} cannot keep a second writer out: {reason} "
                "(`walship doctor` shows what it can)"
            )
        self._works = False
        log.warning(
            "%s cannot keep a second writer out (%s): see to it that there is only one",
            self._store.url,
            reason,
        )

    # -- keeping it, giving it up ------------------------------------------------------------

    def renew(self) -> None:
        """Prove that this process is still the writer.

        Raises:
            FencedError: it is not; the other is named.
            ObjectNotFound: nobody is, for the lease is gone: `acquire` it.
            StoreError: not known; try again.
        """
        if not self._works:
            return
        with self._lock:
            self._renew_in_turn()

    def ensure(self) -> None:
        """Renew if the lease may have run out: before anything is sent, for it could land behind
        what another writer has put there by now.

        Raises:
            FencedError, StoreError: as `renew`.
        """
        if not self._works or self._age() < self._lease_s:
            return
        with self._lock:
            if self._age() >= self._lease_s:
                self._renew_in_turn()

    def prove(self) -> None:
        """Be the writer, beyond doubt, or raise: before anything of the replica is removed.

        Raises:
            FencedError, StoreError: as `renew`.
        """
        if not self.holds():
            self.renew()

    def has_outlasted(self) -> bool:
        """Whether no other writer can acknowledge anything any more that arrives from now on.

        That holds while the lease is ours, if we waited until it had run out: then nobody's proof
        was young enough when we took it, and nobody's renewal can succeed.  Not if it was taken
        before its time, for instance by a copy of the state directory that held it.

        Raises:
            FencedError, StoreError: as `renew`.
        """
        if not self._works or not self._outlasted:
            return False
        self.renew()
        return True

    def _renew_in_turn(self) -> None:
        for _ in range(_RACES):
            if self._renew():
                return
        raise StoreError(f"the lease on {self._store.url} changes all the time", retryable=True)

    def _renew(self) -> bool:
        lease = self._lease
        if lease is None:
            raise FencedError(f"the lease on {self._store.url} was never taken")
        fresh = replace(
            lease,
            renewals=lease.renewals + 1,
            owner=self._owner,
            expires_at_ms=self._expiry(),
        )
        began = self._clock.monotonic()
        try:
            info = self._store.put(LEASE_KEY, fresh.to_json(), if_match=self._etag)
        except PreconditionFailed as error:
            version = self._read()
            if version is None:
                # No rival: that would have left a lease of its own.
                raise ObjectNotFound(f"{LEASE_KEY} is gone from {self._store.url}") from error
            held = parse_lease(version.body)
            if held is None or held.nonce != lease.nonce:
                raise FencedError(self._taken(held)) from error
            # The answer to an earlier renewal was lost.
            self._lease, self._etag = held, version.etag
            return False
        self._hold(fresh, info.etag or "", began)
        return True

    def _taken(self, held: Lease | None) -> str:
        owner = held.owner if held is not None and held.owner else "another writer"
        return (
            f"{self._store.url} was taken over by {owner}: this database is not shipped any more; "
            "stop one of the two writers, then restore this side, or `walship reset` it to make it "
            "the replica's next state"
        )

    def rival(self) -> str | None:
        """Who holds the lease, if not this process; None if it is this one or nobody knows."""
        version = self._read()
        held = parse_lease(version.body) if version is not None else None
        if held is None or not held.owner or held.nonce in self._memory.nonces():
            return None
        return held.owner

    def release(self) -> None:
        """Give the lease up, so that the next writer need not wait.  Best effort, never raises."""
        with self._lock:
            lease, self._proof = self._lease, float("-inf")
            if lease is None:
                return
            given = replace(
                lease,
                owner="",
                renewals=lease.renewals + 1,
                expires_at_ms=self._clock.now_ms(),
            )
            try:
                info = self._store.put(LEASE_KEY, given.to_json(), if_match=self._etag)
            except StoreError as error:
                log.info("the lease on %s stays until it runs out: %s", self._store.url, error)
                return
            self._lease, self._etag = given, info.etag or ""
