"""How replication stands and what was done, as numbers: of all databases open in this process.

Everything is read when somebody asks; a commit pays nothing for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from walship.replica.counts import Operation
from walship.replica.engine import Engine, Status, Work
from walship.replica.levels import L0Files

from .registry import registry

__all__ = ["DatabaseMetrics", "Metrics", "metrics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseMetrics:
    """One database.

    Attributes:
        status: how it stands: the same in each process that has the database open, because the one
            that uploads is asked.
        work: what this process has done for it since it opened it.
        l0_files: segments of level 0 in the replica when they were merged or removed last; None
            where another process does that, or nobody has yet.
        database_bytes: size of the database file.
        validation_interval_s: how often its replica is to be verified, seconds; 0: never.
    """

    status: Status
    work: Work
    l0_files: L0Files | None
    database_bytes: int
    validation_interval_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """All numbers of this process.

    Attributes:
        databases: those that are open here and have a replica, by path.
        unopened: those that ``walship replicate`` is to replicate and cannot open, with the reason,
            by path; it tries again all the time.
        operations: what was asked of stores, for all databases together, since the process began;
            each attempt counts.
        requests: requests that went to S3 stores, by their names in S3's API ("PutObject"): what
            is paid for.  One operation may take several: the parts of a large upload, the pages of
            a listing.
    """

    databases: tuple[DatabaseMetrics, ...]
    unopened: Mapping[str, Exception] = field(default_factory=dict)
    operations: tuple[Operation, ...]
    requests: Mapping[str, int]


def metrics() -> Metrics:
    """The numbers as they are now; makes no request and never raises.

    Where another process uploads it is asked how a database stands; that takes a moment, or up to a
    second for each database while that process is stopped.
    """
    requests = registry.host.requests
    unopened = registry.unopened()
    found = [engine for engine in registry.engines() if engine.path not in unopened]
    found.sort(key=lambda engine: engine.path)
    return Metrics(
        databases=tuple(_of(engine) for engine in found),
        unopened=unopened,
        operations=requests.operations(),
        requests=requests.requests(),
    )


def _of(engine: Engine) -> DatabaseMetrics:
    try:
        n_bytes = os.stat(engine.path).st_size
    except OSError:
        n_bytes = 0
    return DatabaseMetrics(
        status=engine.status(),
        work=engine.work(),
        l0_files=engine.l0_files(),
        database_bytes=n_bytes,
        validation_interval_s=engine.settings.validation_interval_s,
    )
