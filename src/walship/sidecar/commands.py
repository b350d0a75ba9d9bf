"""``walship replicate`` and the commands that speak to it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from walship import __version__
from walship.logs import logging_to
from walship.replica.config.file import SOCKET_PATH, Settings
from walship.replica.config.settings import DatabaseSettings
from walship.replica.errors import ConfigError
from walship.vfs.registry import canonical, registry
from walship.vfs.services import services

from .control import ControlServer, call
from .program import Listing, once, run
from .service import Service

__all__ = ["control", "replicate", "socket_of"]

log = logging.getLogger("walship.sidecar")


def replicate(
    read: Callable[[], Settings],
    *,
    command: str | None,
    only_once: bool,
    snapshot: bool,
    tend: bool,
    restore_missing: bool,
) -> int:
    """Replicate the databases of a configuration.

    Args:
        read: reads it, now and at SIGHUP.
        command: to run beside it, in place of the configuration's ``exec``.
        only_once: ship what is there, and end.
        snapshot, tend: before that, see `program.once`.
        restore_missing: restore databases first whose files are missing.

    Returns:
        The exit code.

    Raises:
        ConfigError: nothing can be replicated so.
    """
    settings = read()
    if not settings.databases and not settings.directories:
        raise ConfigError(
            "there is nothing to replicate: give a database and a replica URL, or `dbs` in the "
            "configuration file"
        )
    if (snapshot or tend) and not only_once:
        raise ConfigError("-force-snapshot and -enforce-retention go with -once")
    service = Service(restore_missing=restore_missing)

    def reload() -> Listing:
        fresh = read()
        listing = _listing(fresh)
        change_logging(fresh.logging)
        services.configure(fresh)
        for name in ("exec", "socket"):
            if getattr(fresh, name) != getattr(settings, name):
                log.warning("%s: what was changed there takes effect at the next start", name)
        return listing

    with logging_to(settings.logging) as change_logging:
        if only_once:
            return once(service, settings.all_databases(), snapshot=snapshot, tend=tend)
        with _observed(service, settings), _controlled(service, settings):
            log.info("walship %s begins: %s", __version__, _in_words(settings))
            return run(service, _listing(settings), reload, command or settings.exec)


def _in_words(settings: Settings) -> str:
    counted = {
        "database(s)": len(settings.databases),
        "directory entry(s)": len(settings.directories),
    }
    return ", ".join(f"{number} {what}" for what, number in counted.items() if number)


@contextmanager
def _observed(service: Service, settings: Settings) -> Iterator[None]:
    """Metrics are served and heartbeats sent meanwhile, if they are asked for."""
    registry.unopened = lambda: _unopened(service)
    services.configure(settings)
    services.start_now()
    try:
        yield
    finally:
        services.close()
        registry.unopened = dict


def _unopened(service: Service) -> dict[str, Exception]:
    """Databases that cannot be replicated, and why."""
    return {
        worker.path: worker.error
        for worker in service.workers()
        if worker.state == "failed" and worker.error is not None
    }


def _listing(settings: Settings) -> Listing:
    """Databases of their own, and those in directories; in the latter new ones if watched."""
    first = settings.all_databases()
    if not any(directory.watch for directory in settings.directories):
        return lambda: first
    known = {canonical(each.path) for each in first}
    return lambda: [
        each
        for each in settings.all_databases()
        if canonical(each.path) in known or _is_watched(settings, each)
    ]


def _is_watched(settings: Settings, database: DatabaseSettings) -> bool:
    for directory in settings.directories:
        if directory.database(database.path) is not None:
            return directory.watch
    return False


@contextmanager
def _controlled(service: Service, settings: Settings) -> Iterator[None]:
    if settings.socket is None:
        yield
        return
    path = settings.socket.path or SOCKET_PATH
    with contextlib.closing(ControlServer(service, path, settings.socket.permissions)):
        yield


def socket_of(path: str | None, settings: Settings | None) -> str:
    """Where the control socket is: as given, else as configured, else at the default place."""
    if path is not None:
        return path
    if settings is not None and settings.socket is not None and settings.socket.path is not None:
        return settings.socket.path
    return SOCKET_PATH


#: More than the other side waits, so that its answer comes first; seconds.
_MARGIN_S: Final = 5.0


def control(socket: str, name: str, timeout: float, **fields: object) -> dict[str, Any]:
    """Ask ``walship replicate`` for something; see `control` (the module) for what there is.

    Raises:
        ControlError: nobody answers, or the answer is an error.
    """
    limit = timeout + _MARGIN_S
    if name in ("list", "info"):
        return call(socket, "GET", f"/{name}", None, limit)
    body = {**fields, "timeout": timeout}
    return call(socket, "POST", f"/{name}", body, limit)
