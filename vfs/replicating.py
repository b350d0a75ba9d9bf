"""The VFS itself: routes each file that SQLite opens to its shim.

The main file of a database that has a replica becomes a `MainFile`, its ``-wal`` a `WalFile`;
everything else (temporary files, databases nobody configured) passes straight through.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import apsw

from walship.replica.config.sources import database_settings
from walship.replica.engine import Engine
from walship.replica.sqlite import RefusedError

from .files import MainFile, WalFile, latest_main_file
from .registry import VFS_NAME, Registry, registry

__all__ = ["ReplicatingVFS", "install"]

_UNSAFE_PARAMETERS: Final = ("immutable", "nolock")


class ReplicatingVFS(apsw.VFS):
    """The VFS ``walship``: the operating system's default VFS with doorbell and gate.

    Registered under its name for as long as the object lives; `install` keeps one per process.
    """

    main_file = MainFile
    wal_file = WalFile

    def __init__(
        self, name: str = VFS_NAME, base: str = "unix", registry: Registry = registry
    ) -> None:
        self._base = base
        self._registry = registry
        super().__init__(name, base)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        kind = flags[0]
        if name is not None and kind & apsw.SQLITE_OPEN_MAIN_DB:
            path = name.filename() if isinstance(name, apsw.URIFilename) else name
            if isinstance(name, apsw.URIFilename):
                configure_from_uri(self._registry, path, name)
            engine = self._registry.acquire(path)
            if engine is not None:
                return self._open_main(name, path, flags, engine)
        elif name is not None and kind & apsw.SQLITE_OPEN_WAL:
            path = name if isinstance(name, str) else name.filename()
            main = latest_main_file(path.removesuffix("-wal"))
            if main is not None:
                return self.wal_file(self._base, name, flags, main)
        return apsw.VFSFile(self._base, name, flags)

    def _open_main(self, name: Any, path: str, flags: list[int], engine: Engine) -> MainFile:
        try:
            file = self.main_file(
                self._base, name, flags, engine, lambda file: self._registry.remove(path, file)
            )
        except BaseException:
            self._registry.abandon(path, engine)
            raise
        self._registry.add(path, file)
        file.look_at_header()
        return file

    def xDelete(self, name: str, sync_directory: bool) -> None:
        if name.endswith("-wal"):
            main = self._registry.main_file(name.removesuffix("-wal"))
            if main is not None and main.xFileSize() > 0:
                main.drain_before_delete()
        super().xDelete(name, sync_directory)

    def xSleep(self, microseconds: int) -> int:
        # The inherited one would hold the GIL while it waits for a lock.
        self._registry.host.clock.sleep(microseconds / 1e6)
        return microseconds


_installed: ReplicatingVFS | None = None
_install_lock = threading.Lock()


def install() -> None:
    """Register the VFS under its name, once."""
    global _installed
    with _install_lock:
        if _installed is None:
            _installed = ReplicatingVFS()


def configure_from_uri(registry: Registry, path: str, name: apsw.URIFilename) -> None:
    """Take ``?replica=`` from a URI filename, and refuse parameters that would go round us."""
    replica = name.uri_parameter("replica")
    configured = registry.settings_for(path)
    if replica is None and configured is None:
        return
    for parameter in _UNSAFE_PARAMETERS:
        if name.uri_boolean(parameter, False):
            raise RefusedError(f"{path} is replicated and cannot be opened with {parameter}=1")
    if replica is not None:
        registry.configure(database_settings(path, replica))
