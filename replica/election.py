"""Who may do what among the processes that share one state directory: record locks on one file.

======  =========  ===============================================================================
byte    lock       held
======  =========  ===============================================================================
0       drain      while the journal is read or written: for microseconds to milliseconds
1       presence   shared by every process that has the database open
2       uploader   by the one process that uploads, for as long as it lives
======  =========  ===============================================================================

The kernel frees them when their process ends, however it ends, so there is nothing to clean up and
no daemon.  They belong to the process: one descriptor on the file per process and directory, never
a second one, for closing that would drop all three.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from .errors import ReplicaError
from .files import Files

__all__ = ["InUseError", "Locks"]

_DRAIN: Final = 0
_PRESENCE: Final = 1
_UPLOADER: Final = 2

# Guards `Files.locked_directories`.
_open_lock = threading.Lock()


class InUseError(ReplicaError):
    """This process has the state directory open already."""


class Locks:
    """The locks of one process on one state directory.

    `lead` and `resign` are for the uploader's thread, the others for whoever holds the in-process
    drain mutex.

    Raises:
        InUseError: this process has the directory open already.
        OSError: the lock file cannot be opened.
    """

    def __init__(self, files: Files, directory: Path) -> None:
        self._files = files
        self._key = os.path.realpath(directory)
        with _open_lock:
            if self._key in files.locked_directories:
                raise InUseError(f"{directory} is in use in this process already")
            files.locked_directories.add(self._key)
        try:
            self._fd = files.open(directory / "lock", os.O_RDWR | os.O_CREAT)
        except BaseException:
            self._forget()
            raise
        #: Whether this process is the one that uploads.
        self.leads = False

    def try_drain(self) -> bool:
        """Take the drain lock; False if another process has it."""
        return self._files.lock(self._fd, _DRAIN)

    def end_drain(self) -> None:
        """Give the drain lock back."""
        self._files.unlock(self._fd, _DRAIN)

    def is_alone(self) -> bool:
        """Whether no other process has the database open.  Call with the drain lock.

        If so, nobody else can come in until `attend` or the drain lock's end.
        """
        return self._files.lock(self._fd, _PRESENCE)

    def attend(self) -> None:
        """Be present, beside others."""
        self._files.lock(self._fd, _PRESENCE, shared=True)

    def be_absent(self) -> None:
        """Count as one that does not have the database open."""
        self._files.unlock(self._fd, _PRESENCE)

    def lead(self) -> bool:
        """Become the process that uploads, if there is none; True if this one is it."""
        if not self.leads:
            self.leads = self._files.lock(self._fd, _UPLOADER)
        return self.leads

    def resign(self) -> None:
        """Let another process upload."""
        if self.leads:
            self.leads = False
            self._files.unlock(self._fd, _UPLOADER)

    def close(self) -> None:
        """Give everything up.  Safe to call twice, and in a forked child, which has no locks."""
        if self._fd >= 0:
            self.leads = False
            self._files.close(self._fd)
            self._fd = -1
            self._forget()

    def _forget(self) -> None:
        with _open_lock:
            self._files.locked_directories.discard(self._key)
