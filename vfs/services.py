"""What a configuration file asks for in a process that has a database open: metrics, a heartbeat.

Begun with the first database that is opened, and anew in a forked child that opens one: a process
that only forks others has nothing to report, and must not hold the address.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from walship.replica.config.sources import Settings
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
        """What is asked for from now on, in place of what was asked for before."""
        with self._lock:
            before, self._settings = self._settings, settings
            if self._begun and _asked(before) != _asked(settings):
                self._close()
                self._start()

    def start(self) -> None:
        """A database is open; what cannot be begun is said in the log, and keeps nobody up."""
        with self._lock:
            if not self._begun:
                self._begun = True
                self._start()

    def start_now(self) -> None:
        """Begin before any database is open.

        Raises:
            ConfigError: metrics cannot be served.
        """
        with self._lock:
            self._start_server()
            self._start_heartbeat()
            self._begun = True

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
        try:
            self._start_server()
        except ConfigError as error:
            log.warning("this process serves no metrics: %s", error)
        self._start_heartbeat()

    def _start_server(self) -> None:
        if self._settings.addr is not None:
            self._server = serve_metrics(self._settings.addr)

    def _start_heartbeat(self) -> None:
        settings = self._settings
        if settings.heartbeat_url is not None:
            interval_s = settings.heartbeat_interval_s
            self._heartbeat = Heartbeat(
                settings.heartbeat_url,
                interval_s,
                lambda: self._what_is_wrong(interval_s),
                self._registry.host.clock,
            )
            self._heartbeat.start()

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._heartbeat is not None:
            self._heartbeat.close()
        self._server = self._heartbeat = None

    def _what_is_wrong(self, limit_s: float) -> str | None:
        for path, error in self._registry.unopened().items():
            return f"{path}: {error}"
        engines = self._registry.engines()
        if not engines:
            return "no database is open"
        found = [engine.status() for engine in engines]
        bad = [trouble for status in found if (trouble := trouble_of(status, limit_s))]
        if bad:
            return bad[0]
        # Of several processes those that upload have their say.
        return None if any(status.uploader for status in found) else ""


def _asked(settings: Settings) -> tuple[object, ...]:
    return settings.addr, settings.heartbeat_url, settings.heartbeat_interval_s


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
