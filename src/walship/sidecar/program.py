"""The program around a `Service`: signals, reloading, the command that runs beside it.

SIGTERM and SIGINT ship what is there and end; a second one ends at once.  SIGHUP reads the
configuration again.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from walship.replica.clock import SystemClock
from walship.replica.config.settings import DatabaseSettings
from walship.replica.errors import ConfigError, ReplicaError
from walship.replica.sqlite import NotYetReplicated

from .database import Sidecar
from .service import Service
from .worker import Worker

__all__ = ["Listing", "once", "run"]

log = logging.getLogger("walship.sidecar")

#: How often directories are looked through for databases, seconds.
_SCAN_S: Final = 5.0
#: How long `once` waits for each step of one database, seconds; for the sync, how long there may be
#: nothing but trouble, and how often that is looked at.
_ONCE_S: Final = 300.0
_TROUBLE_S: Final = 30.0
_LOOK_S: Final = 0.5

_clock: Final = SystemClock()

#: Which databases there are now; read again for each call.
Listing = Callable[[], list[DatabaseSettings]]


class _Signals:
    """What the process was told, for the main thread."""

    def __init__(self) -> None:
        self.told = threading.Event()
        self.ending: int | None = None
        self.reload = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Signals are taken note of here."""
        previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self.reload = True
        elif self.ending is None:
            self.ending = number
        else:
            # Only what a signal handler may do: no log, no lock, no exit handler.
            os.write(2, b"walship: told to end twice: ending at once\n")
            os._exit(128 + number)
        self.told.set()


def run(
    service: Service, listing: Listing, reload: Callable[[], Listing], command: str | None
) -> int:
    """Replicate until told to end, or until a command has ended.

    Args:
        listing: the databases; directories are looked through again every few seconds.
        reload: reads the configuration again, for SIGHUP.
        command: runs beside it, split like a shell does; gets the signals that end this program.

    Returns:
        The exit code: the command's, else 0; 1 if something stayed behind.

    Raises:
        ConfigError: the configuration, or the command, cannot be used.
    """
    signals = _Signals()
    with signals.handled():
        service.set(listing())
        child = None
        if command is not None:
            _wait_opened(service)
            child = _Child(command, signals.told)
        while signals.ending is None and (child is None or child.code is None):
            signals.told.wait(_SCAN_S)
            signals.told.clear()
            if signals.reload:
                signals.reload = False
                listing = _reloaded(reload, listing)
            if signals.ending is None:
                _scan(service, listing)
        if child is not None and signals.ending is not None:
            child.end(signals.ending)
        log.info("ending: shipping what is there")
        drained = service.close()
    if drained:
        log.info("ended: everything is in its replica")
    else:
        log.error("ended before everything was in its replica; the rest goes out after a new start")
    code = child.code if child is not None and child.code is not None else 0
    return code or (0 if drained else 1)


def once(service: Service, databases: list[DatabaseSettings], *, snapshot: bool, tend: bool) -> int:
    """Ship everything that is there, and end.

    Args:
        snapshot: then have a snapshot made of each.
        tend: then have merged and removed what may be.

    Returns:
        The exit code: 0 if every database is in its replica.
    """
    service.set(databases)
    _wait_opened(service)
    failed = [
        worker.path
        for worker in service.workers()
        if not _sync(worker, tend=tend or snapshot, snapshot=snapshot)
    ]
    return 0 if service.close() and not failed else 1


def _sync(worker: Worker, *, tend: bool, snapshot: bool) -> bool:
    try:
        sidecar = worker.sidecar()
        txid = _sync_patiently(sidecar)
        if tend:
            newest = sidecar.engine.tend(snapshot=snapshot, timeout=_ONCE_S)
            log.info("%s: newest snapshot: txid %016x", worker.path, newest)
    except ReplicaError as error:
        log.error("%s: %s", worker.path, error)
        return False
    log.info("%s: in its replica, txid %016x", worker.path, txid)
    return True


def _sync_patiently(sidecar: Sidecar) -> int:
    """Have everything shipped; as long as it takes, but not if there is only trouble.

    Raises:
        ReplicaError: it cannot be done.
    """
    since = _clock.monotonic()
    while True:
        try:
            return sidecar.sync(_LOOK_S)
        except NotYetReplicated as error:
            now = _clock.monotonic()
            if sidecar.engine.uploader.progress.last_error is None:
                since = now
            elif now - since >= _TROUBLE_S:
                raise sidecar.engine.not_yet(now - since) from error


def _wait_opened(service: Service) -> None:
    for worker in service.workers():
        worker.wait_opened(_ONCE_S)


def _scan(service: Service, listing: Listing) -> None:
    try:
        service.set(listing())
    except ReplicaError as error:  # two files that would share a replica
        log.error("%s", error)


def _reloaded(reload: Callable[[], Listing], listing: Listing) -> Listing:
    try:
        fresh = reload()
    except ReplicaError as error:
        log.error("the configuration cannot be read again, the old one stays: %s", error)
        return listing
    log.info("the configuration was read again")
    return fresh


class _Child:
    """The command that runs beside replication.

    Args:
        ended: is set when it has ended.

    Raises:
        ConfigError: it cannot be started.
    """

    def __init__(self, command: str, ended: threading.Event) -> None:
        try:
            words = shlex.split(command)
            self._process = subprocess.Popen(words)
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"exec: {command!r} cannot be run: {error}") from error
        log.info("started %s, pid %d", words[0], self._process.pid)
        self.code: int | None = None
        self._ended = ended
        self._thread = threading.Thread(target=self._wait, name="walship:exec", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        code = self._process.wait()
        self.code = code if code >= 0 else 128 - code
        self._ended.set()

    def end(self, number: int) -> None:
        """Pass a signal on, and wait."""
        log.info("ending: waiting for the command, pid %d", self._process.pid)
        # Ctrl-C at a terminal has gone to both.
        if number != signal.SIGINT or not sys.stdin.isatty():
            self._process.send_signal(number)
        self._thread.join()
