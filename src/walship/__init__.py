"""walship: replicates SQLite to object storage from inside the application.

    import walship

    db = walship.connect("app.db", replica="s3://my-bucket/app")
    db.execute("insert into ...")
    walship.replication(db).sync(timeout=10)

Everything public is listed in ``__all__``; the rest may change.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

if sys.platform == "win32":
    raise ImportError(
        "walship does not run on Windows yet: its locks and durable renames are those of Linux and "
        "macOS. Run it there, or in WSL."
    )

from walship.replica.engine import Status, Work
from walship.replica.errors import (
    ChecksumError,
    ClosedError,
    ConfigError,
    ContinuityError,
    FormatError,
    GapError,
    IntegrityError,
    NoBackupError,
    ObjectNotFound,
    OutputExistsError,
    PreconditionFailed,
    ReplicaError,
    RestoreError,
    StoreError,
    StoreUnavailable,
)
from walship.replica.follow import Step
from walship.replica.marks import Mark
from walship.replica.restore import RestoreResult
from walship.replica.restore_front import follow_from as follow
from walship.replica.restore_front import restore_from as restore
from walship.replica.restore_front import update_from as update
from walship.replica.sqlite import FencedError, NotYetReplicated, RefusedError, SpoolError
from walship.replica.verify import Verification
from walship.vfs.connection import Connection, Replication, configure, connect, replication
from walship.vfs.durable import durable
from walship.vfs.exposition import MetricsServer, register_metrics, serve_metrics
from walship.vfs.measures import DatabaseMetrics, Metrics, metrics
from walship.vfs.replicating import ReplicatingVFS, install

# apsw.Connection("file:app.db?replica=...", vfs="walship") works from here on.
install()

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """``walship.aio`` and ``walship.middleware`` are imported when they are first named."""
    if name in ("aio", "middleware"):
        return importlib.import_module(f"walship.{name}")
    raise AttributeError(f"module 'walship' has no attribute {name!r}")


__all__ = [
    "ChecksumError",
    "ClosedError",
    "ConfigError",
    "Connection",
    "ContinuityError",
    "DatabaseMetrics",
    "FencedError",
    "FormatError",
    "GapError",
    "IntegrityError",
    "Mark",
    "Metrics",
    "MetricsServer",
    "NoBackupError",
    "NotYetReplicated",
    "ObjectNotFound",
    "OutputExistsError",
    "PreconditionFailed",
    "RefusedError",
    "ReplicaError",
    "ReplicatingVFS",
    "Replication",
    "RestoreError",
    "RestoreResult",
    "SpoolError",
    "Status",
    "Step",
    "StoreError",
    "StoreUnavailable",
    "Verification",
    "Work",
    "configure",
    "connect",
    "durable",
    "follow",
    "metrics",
    "register_metrics",
    "replication",
    "restore",
    "serve_metrics",
    "update",
]
