"""Checks of the rest that walship needs: permissions, listings, ranges, metadata, clocks."""

from __future__ import annotations

import secrets
from typing import Final

from walship.replica.errors import ObjectNotFound, StoreError
from walship.replica.store.base import SHA256_METADATA
from walship.replica.store.timestamps import TIMESTAMP_METADATA, parse_timestamp

from .bench import DENIED, Bench, Finding, failed, ok, seconds, warning

__all__ = ["Reads"]

_ROUNDS: Final = 3
_LISTED_KEYS: Final = 1001  # one more than a page of S3
_LISTED_FILES: Final = 20  # a directory has no pages; a few keys show the order

_SKEW_WARNING_MS: Final = 60_000
_SKEW_FAILURE_MS: Final = 15 * 60_000  # S3 refuses signatures that are older
_DAY_MS: Final = 86_400_000


class Reads:
    """The checks; those that build on others come behind them."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._store = bench.store
        self._listed: list[str] = []  # keys below "page-", in order

    # --- access -----------------------------------------------------------------------------------

    def reach(self) -> Finding:
        """Somebody answers for the bucket.

        Raises:
            StoreError: nobody does, or it refuses everything.
        """
        try:
            self._bench.listed("")
        except StoreError as error:
            if error.code not in DENIED:
                raise
            try:  # perhaps only listing is forbidden
                self._store.put(self._bench.key("access"), b"reach")
            except StoreError:
                raise error from None
        return ok("the store answers")

    def may_list(self) -> Finding:
        self._bench.listed("")
        return ok("may list")

    def may_put(self) -> Finding:
        self._store.put(self._bench.key("access"), b"doctor")
        return ok("may write")

    def may_get(self) -> Finding:
        if self._store.get(self._bench.key("access")) != b"doctor":
            return failed("what was read is not what was written just before")
        return ok("may read, and reads what was written")

    def may_head(self) -> Finding:
        size = self._store.head(self._bench.key("access")).size_bytes
        if size != len(b"doctor"):
            return failed(f"says {size} bytes of an object of {len(b'doctor')}")
        return ok("may ask for size and metadata")

    def may_delete(self) -> Finding:
        try:
            self._store.delete([self._bench.key("access")])
        except StoreError as error:
            return failed(f"{self._bench.text(error)}; nothing else is tried, it would stay")
        return ok("may delete")

    # --- nothing is seen too late -----------------------------------------------------------------

    def list_after_put(self) -> Finding:
        for n_round in range(_ROUNDS):
            key = self._bench.key(f"listed-{n_round}")
            self._store.put(key, b"listed")
            if key not in self._bench.listed("listed-"):
                return failed("an object that was just written is not in a listing")
            if n_round:
                self._store.delete([key])
                if key in self._bench.listed("listed-"):
                    return failed("an object that was just deleted is still in a listing")
        return ok("listings show at once what was written and deleted")

    def head_after_delete(self) -> Finding:
        key = self._bench.key("deleted")
        for _ in range(_ROUNDS):
            self._store.put(key, b"deleted")
            self._store.delete([key])
            for ask in (self._store.head, self._store.read):
                try:
                    ask(key)
                except ObjectNotFound:
                    continue
                return failed("an object that was just deleted is still there")
        return ok("a deleted object is gone at once")

    # --- long listings ----------------------------------------------------------------------------

    def list_pages(self) -> Finding:
        count = _LISTED_FILES if self._bench.is_directory else _LISTED_KEYS
        self._listed = [self._bench.key(f"page-{n:04}") for n in range(count)]
        with self._bench.threads() as pool:
            for future in [pool.submit(self._store.put, key, b"page") for key in self._listed]:
                future.result()
        found = self._bench.listed("page-")
        if found != self._listed:
            problem = (
                "is out of order" if sorted(found) == self._listed else f"shows {len(found):,}"
            )
            return failed(f"a listing of {count:,} objects {problem}")
        return ok(f"all {count:,} objects are listed, in order")

    def list_from_key(self) -> Finding:
        middle = len(self._listed) // 2
        after = self._listed[middle]
        # The second is a name that no object has, as there is behind the newest segment.
        for start_after in (after, f"{after}-"):
            if self._bench.listed("page-", start_after) != self._listed[middle + 1 :]:
                return failed("a listing does not begin behind the key that was asked for")
        return ok("a listing can begin in the middle")

    # --- objects ----------------------------------------------------------------------------------

    def ranges(self) -> Finding:
        key = self._bench.key("ranges")
        content = secrets.token_bytes(10_000)
        self._store.put(key, content)
        for start, length in ((0, 100), (4_000, 100), (9_900, None), (9_900, 500), (10_000, 100)):
            end = None if length is None else start + length
            if self._store.get(key, start, length) != content[start:end]:
                return failed(f"wrong bytes from {start} of an object of {len(content):,}")
        return ok("start, middle, end, and past the end")

    def metadata(self) -> Finding:
        key = self._bench.key("metadata")
        timestamp_ms = self._bench.clock.now_ms() // 1000 * 1000 - _DAY_MS + 123
        sent = {SHA256_METADATA: secrets.token_hex(32), "walship-doctor": "7"}
        self._store.put(key, b"metadata", timestamp_ms=timestamp_ms, metadata=sent)
        info = self._store.head(key)
        if self._bench.is_directory:
            if info.modified_ms != timestamp_ms:
                return failed("the times of files are not kept: restores to a time would go wrong")
            return ok("the times of files are kept (there is no other metadata)")
        lost = [name for name in sent if info.metadata.get(name) != sent[name]]
        if parse_timestamp(info.metadata.get(TIMESTAMP_METADATA, "")) != timestamp_ms:
            lost.append(TIMESTAMP_METADATA)
        if lost:
            return failed(
                f"{', '.join(lost)} {'does' if len(lost) == 1 else 'do'} not come back: restores "
                "to a time would go by upload times"
            )
        return ok(f"all {len(sent) + 1} entries come back")

    # --- time -------------------------------------------------------------------------------------

    def clock(self) -> Finding:
        key = self._bench.key("clock")
        self._store.put(key, b"clock")
        before_ms = self._bench.clock.now_ms()
        store_ms = self._bench.read(key).now_ms
        after_ms = self._bench.clock.now_ms()
        ahead_ms = store_ms - (before_ms + after_ms) // 2
        where = "behind" if ahead_ms > 0 else "ahead"
        text = f"this machine is {seconds(abs(ahead_ms))} {where} of the store"
        if abs(ahead_ms) > _SKEW_FAILURE_MS:
            return failed(f"{text}: set its clock (NTP), or signatures are refused")
        if abs(ahead_ms) > _SKEW_WARNING_MS:
            return warning(f"{text}: set its clock (NTP)")
        # The store tells whole seconds only.
        return ok("same time as the store" if abs(ahead_ms) < 2_000 else text)
