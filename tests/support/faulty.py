"""A store that fails on purpose: before the effect, after it, or by never answering."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from walship.replica.errors import StoreError, StoreUnavailable
from walship.replica.store.base import Body, ObjectInfo, ObjectStore, Version
from walship.replica.store.forwarding import ForwardingStore

Fault = str  # "ok", "before" or "after"


class FaultyStore(ForwardingStore):
    """Wraps a store; each call takes the next fault of the script, then chance decides.

    ``before``: the inner store is not asked; ``after``: it is, and its answer is lost.  Both raise
    ``StoreUnavailable`` unless ``error`` makes something else.  While blocked, calls wait inside.

    Args:
        store: does the work.
        seed: of the random faults.
        before, after: chance of each fault, 0.0 to 1.0.
        script: faults for the first calls, in order.
        operations: names of the methods that may fail; all by default.
        error: makes the exception from the name of the method.

    Attributes:
        calls: how often each method was called.
        faults: how often each fault happened.
        waiting: calls that are blocked now.
    """

    def __init__(
        self,
        store: ObjectStore,
        seed: int = 0,
        *,
        before: float = 0.0,
        after: float = 0.0,
        script: Iterable[Fault] = (),
        operations: Sequence[str] = ("put", "copy", "get", "read", "head", "list", "delete"),
        error: Callable[[str], StoreError] | None = None,
    ) -> None:
        super().__init__(store)
        self._lock = threading.Lock()
        self._rng = random.Random(seed)
        self._script = iter(list(script))
        self._operations = frozenset(operations)
        self._error = error
        self._open = threading.Event()
        self._open.set()
        self._blocked_operations: frozenset[str] = frozenset()
        self.before = before
        self.after = after
        self.calls: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.waiting = 0

    def block(self, operations: Sequence[str] | None = None) -> None:
        """From now on calls (of these methods) do not return until ``release``."""
        self._blocked_operations = self._operations if operations is None else frozenset(operations)
        self._open.clear()

    def release(self) -> None:
        """Let blocked calls and all later ones go on."""
        self._open.set()

    def put(
        self,
        key: str,
        body: Body,
        *,
        timestamp_ms: int | None = None,
        metadata: Mapping[str, str] | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
    ) -> ObjectInfo:
        fault = self._enter("put")
        info = self._store.put(
            key,
            body,
            timestamp_ms=timestamp_ms,
            metadata=metadata,
            if_absent=if_absent,
            if_match=if_match,
        )
        self._leave("put", fault)
        return info

    def copy(self, source: str, target: str) -> ObjectInfo:
        fault = self._enter("copy")
        info = self._store.copy(source, target)
        self._leave("copy", fault)
        return info

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        fault = self._enter("get")
        content = self._store.get(key, start, length)
        self._leave("get", fault)
        return content

    def read(self, key: str, *, unless_etag: str | None = None) -> Version | None:
        fault = self._enter("read")
        version = self._store.read(key, unless_etag=unless_etag)
        self._leave("read", fault)
        return version

    def head(self, key: str) -> ObjectInfo:
        fault = self._enter("head")
        info = self._store.head(key)
        self._leave("head", fault)
        return info

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        """Here ``after`` means: the listing breaks off behind its first entry."""
        fault = self._enter("list")
        for info in self._store.list(prefix, start_after):
            yield info
            self._leave("list", fault)
        self._leave("list", fault)

    def delete(self, keys: Sequence[str]) -> None:
        fault = self._enter("delete")
        self._store.delete(keys)
        self._leave("delete", fault)

    def close(self) -> None:
        self.release()
        super().close()

    def _enter(self, operation: str) -> Fault:
        with self._lock:
            self.calls[operation] += 1
            fault = "ok"
            if operation in self._operations:
                scripted = next(self._script, None)
                if scripted is not None:
                    fault = scripted
                else:
                    drawn = self._rng.random()
                    if drawn < self.before:
                        fault = "before"
                    elif drawn < self.before + self.after:
                        fault = "after"
            self.faults[fault] += 1
            blocked = not self._open.is_set() and operation in self._blocked_operations
            if blocked:
                self.waiting += 1
        if blocked:
            self._open.wait()
            with self._lock:
                self.waiting -= 1
        if fault == "before":
            raise self._make(operation, "before it began")
        return fault

    def _leave(self, operation: str, fault: Fault) -> None:
        if fault == "after":
            raise self._make(operation, "after it was done")

    def _make(self, operation: str, when: str) -> StoreError:
        if self._error is not None:
            return self._error(operation)
        return StoreUnavailable(f"{operation} failed on purpose, {when}")
