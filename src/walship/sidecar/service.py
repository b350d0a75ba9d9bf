"""What ``walship replicate`` runs: a worker for each database, until it is told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Final

from walship.replica.config.settings import DatabaseSettings
from walship.replica.errors import ConfigError
from walship.vfs.registry import canonical

from .worker import Worker

__all__ = ["Service"]

log = logging.getLogger("walship.sidecar")

#: More than a worker needs to end after its last upload, seconds.
_JOIN_S: Final = 15.0


class Service:
    """Replicates a set of databases.  Thread-safe.

    Args:
        restore_missing: restore a database first whose file is missing, if its replica has data.
    """

    def __init__(self, *, restore_missing: bool = False) -> None:
        self._restore_missing = restore_missing
        # Guards the dictionaries; never held while a worker ends.
        self._lock = threading.Lock()
        self._workers: dict[str, Worker] = {}
        self._settings: dict[str, DatabaseSettings] = {}
        # Those that came by `add`, which a new list of databases does not concern.
        self._added: set[str] = set()
        self._closed = False

    def set(self, databases: Iterable[DatabaseSettings]) -> None:
        """Replicate these, and what was added; whose settings changed begins anew.

        Waits for those that have to end, up to their ``shutdown-sync-timeout``.
        """
        wanted = {canonical(each.path): each for each in databases}
        with self._lock:
            known = {path: it for path, it in self._settings.items() if path not in self._added}
        ending = [path for path, it in known.items() if wanted.get(path) != it]
        for path in ending:
            log.info("%s: not replicated any more, or with other settings", path)
        self._remove(ending)
        for path, settings in wanted.items():
            if path not in known or path in ending:
                self._start(path, settings)

    def add(self, settings: DatabaseSettings) -> bool:
        """Replicate one more; False if it is already.

        Raises:
            ConfigError: it is, to another place.
        """
        path = canonical(settings.path)
        with self._lock:
            known = self._settings.get(path)
            if known is not None:
                if known.replica != settings.replica:
                    raise ConfigError(f"{path} is replicated to another place: unregister it first")
                return False
            self._added.add(path)
        self._start(path, settings)
        return True

    def remove(self, path: str) -> bool:
        """Replicate a database no more, after what is there was shipped; False if it is unknown."""
        path = canonical(path)
        is_known = path in self.paths()
        self._remove([path])
        return is_known

    def stop(self, path: str) -> bool:
        """Pause one, after what is there was shipped; False if it was not running.

        Raises:
            KeyError: it is unknown.
        """
        path = canonical(path)
        with self._lock:
            self._settings[path]
            worker = self._workers.pop(path, None)
        if worker is None:
            return False
        worker.stop()
        worker.join(_limit_s(worker))
        return True

    def start(self, path: str) -> bool:
        """Go on with one; False if it was running.

        Raises:
            KeyError: it is unknown.
        """
        path = canonical(path)
        with self._lock:
            settings = self._settings[path]
            if path in self._workers:
                return False
        self._start(path, settings)
        return True

    def worker(self, path: str) -> Worker | None:
        """The one of a database, or None."""
        with self._lock:
            return self._workers.get(canonical(path))

    def workers(self) -> list[Worker]:
        """All that are at work, in the order in which they began."""
        with self._lock:
            return list(self._workers.values())

    def paths(self) -> list[str]:
        """All databases, whether they are at work or not."""
        with self._lock:
            return list(self._settings)

    def close(self) -> bool:
        """Ship what is there and end.

        Returns:
            Whether everything is in the replicas.
        """
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.stop()
        return False not in [worker.join(_limit_s(worker)) for worker in workers]

    def _start(self, path: str, settings: DatabaseSettings) -> None:
        worker = Worker(settings, restore_missing=self._restore_missing)
        with self._lock:
            if self._closed:
                return
            self._settings[path] = settings
            self._workers[path] = worker
        worker.start()

    def _remove(self, paths: list[str]) -> None:
        with self._lock:
            ending = [worker for path in paths if (worker := self._workers.pop(path, None))]
            for path in paths:
                self._settings.pop(path, None)
                self._added.discard(path)
        for worker in ending:
            worker.stop()
        for worker in ending:
            worker.join(_limit_s(worker))


def _limit_s(worker: Worker) -> float:
    return worker.settings.shutdown_sync_timeout_s + _JOIN_S
