"""What a configuration file asks for in a process that has a database open: metrics, a heartbeat.

Begun with the first database that is opened, and anew in a forked child that opens one: a process
that only forks others has nothing to report, and must not hold the address.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from walship.replica.config import Settings
from walship.replica.engine import Status
from walship.replica.errors import ConfigError
from walship.replica.heartbeat import Heartbeat

from .exposition import MetricsServer, serve_metrics
from .registry import Registry, registry

__all__ = ["Services", "services", "trouble_of"]

log = logging.getLogger("walship")


class Services:
    """The metrics server and the heartbeat of this process.  Thread-safe.

    Args:
        registry: the databases they are about.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # Guards the fields below.
        self._lock = threading.Lock()
        self._settings = Settings()
        self._begun = False
        self._server: MetricsServer | None = None
        self._heartbeat: Heartbeat | None = None
        registry.services = self

    def configure(self, settings: Settings) -> None:
        """What is asked for from now on; a file that asks for nothing changes nothing."""
        if settings.addr is None and settings.heartbeat_url is None:
            return
        with self._lock:
            self._close()
            self._settings = settings
            if self._begun:
                self._start()

    def start(self) -> None:
        """A database is open; what cannot be begun is said in the log, and keeps nobody up."""
        with self._lock:
            self._begun = True
            if self._server is None and self._heartbeat is None:
                self._start()

    def close(self) -> None:
        """End what runs, until the next `start`."""
        with self._lock:
            self._begun = False
            self._close()

    def close_in_child(self) -> None:
        """After a fork: the threads are the parent's."""
        self._lock = threading.Lock()
        self._begun = False
        if self._server is not None:
            self._server.close_in_child()
        self._server = self._heartbeat = None

    def _start(self) -> None:
        settings = self._settings
        if settings.addr is not None:
            try:
                self._server = serve_metrics(settings.addr)
            except ConfigError as error:
                log.warning("this process serves no metrics: %s", error)
        if settings.heartbeat_url is not None:
            interval_s = settings.heartbeat_interval_s
            self._heartbeat = Heartbeat(
                settings.heartbeat_url,
                interval_s,
                lambda: self._trouble(interval_s),
                self._registry.host.clock,
            )
            self._heartbeat.start()

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._heartbeat is not None:
            self._heartbeat.close()
        self._server = self._heartbeat = None

    def _trouble(self, limit_s: float) -> str | None:
        engines = self._registry.engines()
        if not engines:
            return "no database is open"
        found = [engine.status() for engine in engines]
        for status in found:
            if trouble := trouble_of(status, limit_s):
                return trouble
        # Of several processes those that upload have their say.
        return None if any(status.uploader for status in found) else ""


def trouble_of(status: Status, limit_s: float) -> str | None:
    """Why a database does not count as replicated recently, in one line; None if it does.

    Args:
        limit_s: how old a commit may be that is not in the replica, seconds.
    """
    if status.state not in ("ok", "retrying"):
        return f"{status.path}: {status.last_error or status.state}"
    if status.lag_s > limit_s:
        why = f" ({status.last_error})" if status.last_error else ""
        return f"{status.path}: commits of {status.lag_s:.0f} s are not in the replica{why}"
    if status.last_verification in ("damaged", "differs"):
        return f"{status.path}: {status.verification_problem}"
    return None


#: Those of this process.
services: Final = Services(registry)
