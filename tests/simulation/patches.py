"""Puts the simulation's stand-ins into the modules under test, and takes them out again."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.inline import inline_pools
from walship.replica import catchup, continuity, engine
from walship.replica.sqlite import SqlitePort

from . import runtime as rt
from .machine import Process

__all__ = ["installed"]

_THREADING = (
    "walship.replica.uploader",
    "walship.replica.sender",
    "walship.replica.compaction",
    "walship.replica.peers",
    "walship.replica.waits",
    "walship.replica.fence",
    "walship.replica.spool",
    "walship.replica.capture",
    "walship.replica.sqlite",
    "walship.replica.engine",
    "walship.vfs.registry",
    "concurrent.futures._base",
)
_QUEUE = ("walship.replica.uploader", "walship.replica.sender", "walship.replica.compaction")
_SECRETS = ("walship.replica.fence", "walship.replica.peers", "walship.replica.restore")


class _Tokens:
    """As ``secrets`` and ``uuid``, from the seed."""

    def token_hex(self, n_bytes: int) -> str:
        if rt.active is None:
            return "0" * 2 * n_bytes
        return rt.active.tokens.randbytes(n_bytes).hex()

    def uuid4(self) -> Any:
        class Uuid:
            hex = self.token_hex(16)

        return Uuid


class _Port(SqlitePort):
    """Known to its process, which closes it when it is killed."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        process = current_process()
        if process is not None:
            process.ports.append(self)


def current_process() -> Process | None:
    """The process whose task is running."""
    task = rt.active.current if rt.active is not None else None
    return task.owner if task is not None and isinstance(task.owner, Process) else None


def _catch_up(store: Any, path: Path, txid: int, begin: Callable[[], None]) -> Any:
    """The real one; the file that it changes in place has been changed."""
    caught_up = catchup.catch_up(store, path, txid, begin)
    process = current_process()
    if process is not None:
        process.machine.touch(path.stat().st_ino)
    return caught_up


@contextlib.contextmanager
def installed() -> Iterator[pytest.MonkeyPatch]:
    """The modules under test run in the simulation as long as this is in force."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _THREADING:
            patch.setattr(importlib.import_module(name), "threading", rt.stand_in)
        for name in _QUEUE:
            patch.setattr(importlib.import_module(name), "queue", rt.stand_in)
        inline_pools(patch)
        tokens = _Tokens()
        for name in _SECRETS:
            patch.setattr(importlib.import_module(name), "secrets", tokens)
        patch.setattr("walship.replica.spool.uuid", tokens)
        patch.setattr(engine, "SqlitePort", _Port)
        # A process that waits for another one to open the database would look 200 times a second.
        patch.setattr("walship.replica.spool._LOCK_PAUSE_LONGEST_S", 0.1)
        patch.setattr(continuity, "catch_up", _catch_up)
        yield patch
