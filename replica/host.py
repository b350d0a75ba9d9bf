"""What engines take from the machine and the process they run in, in one place.

A test puts another host there: with a clock of its own, files that stop anywhere, a store that
answers late, several processes in one.
"""

from __future__ import annotations

import random
from typing import Final

from .child import Slots
from .clock import Clock, SystemClock
from .counts import RequestCounts
from .fence import owner_name
from .files import OS_FILES, Files
from .process import is_gone, this_process
from .store.base import ObjectStore
from .store.counting import CountingStore
from .store.opening import open_store
from .store.settings import LocalSettings, StoreSettings

__all__ = ["Host"]

#: Children at once, however many databases this process has: each takes some 100 MB.
_SLOTS: Final = 2


class Host:
    """The real machine and this process.  Thread-safe.

    Attributes:
        clock: tells the time, and sleeps.
        files: the state directory, and the database's files as far as SQLite is not asked.
        requests: counts what this process asks of stores, whatever database it is for.
        slots: for children that merge; None if this process does that itself.
    """

    def __init__(self) -> None:
        self.clock: Clock = SystemClock()
        self.files: Files = OS_FILES
        self.requests = RequestCounts()
        self.slots: Slots | None = Slots(_SLOTS)

    def open_store(self, settings: StoreSettings) -> ObjectStore:
        """As `store.opening.open_store`, counted."""
        store = open_store(settings, self.clock, self.requests.sent)
        kind = "file" if isinstance(settings, LocalSettings) else "s3"
        return CountingStore(store, kind, self.requests, self.clock)

    def forget(self) -> None:
        """In a forked child: nothing was counted in it, and it has no children."""
        self.requests.forget()
        if self.slots is not None:
            self.slots.forget()

    def process(self) -> str:
        """The name of this process, for `is_gone` in another one."""
        return this_process()

    def is_gone(self, process: str) -> bool:
        """Whether the process with this name is sure not to exist any more."""
        return is_gone(process)

    def owner(self, path: str) -> str:
        """How the database at ``path`` calls itself in a lease, for people."""
        return owner_name(path)

    def rng(self) -> random.Random:
        """Randomness for the jitter of pauses."""
        return random.Random()
