"""The numbers of `measures` for Prometheus: under Litestream's names where they mean the same.

Needs ``prometheus_client``, which is imported when it is first asked for.  Gauges say how a
database stands, and are the same in each process that has it open; counters say what this process
has done.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Final

from walship.replica.config.values import parse_address
from walship.replica.counts import BUCKETS_S, Checkpoints, Operation
from walship.replica.errors import ConfigError, StoreError
from walship.replica.sqlite import FencedError

from .measures import DatabaseMetrics, Metrics, metrics

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["MetricsServer", "register_metrics", "serve_metrics"]

log = logging.getLogger("walship.metrics")

#: How long closing waits for the thread that serves, seconds.
_JOIN_S: Final = 5.0

#: Name, meaning, value; no sample where there is no value.
_Row = tuple[str, str, Callable[[DatabaseMetrics], float | None]]

_GAUGES: Final[tuple[_Row, ...]] = (
    ("litestream_db_size", "Bytes of the database file.", lambda it: it.database_bytes),
    ("litestream_wal_size", "Bytes of the -wal file.", lambda it: it.status.wal_bytes),
    ("litestream_txid", "Highest TXID given to a segment.", lambda it: it.status.txid),
    (
        "litestream_disk_full",
        "Whether commits wait for room on the local disk.",
        lambda it: it.status.disk_full,
    ),
    (
        "walship_replicated_txid",
        "Highest TXID in the replica, with all before it.",
        lambda it: it.status.replicated_txid,
    ),
    (
        "walship_replication_lag_seconds",
        "Age of the oldest commit that is not in the replica; 0 if all are.",
        lambda it: it.status.lag_s,
    ),
    (
        "walship_pending_bytes",
        "Bytes sealed on this disk that are not in the replica.",
        lambda it: it.status.pending_bytes,
    ),
    (
        "walship_last_upload_timestamp_seconds",
        "When a segment arrived last; none before the first.",
        lambda it: _seconds(it.status.last_upload_ms),
    ),
    (
        "walship_last_verified_timestamp_seconds",
        "When the replica was found sound last; none before the first time.",
        lambda it: _seconds(it.status.last_verified_ms),
    ),
    (
        "walship_last_verified_txid",
        "The TXID whose state was found sound last.",
        lambda it: it.status.last_verified_txid,
    ),
    (
        "walship_validation_interval_seconds",
        "How often the replica is to be verified; 0: never.",
        lambda it: it.validation_interval_s,
    ),
    (
        "walship_uploader",
        "Whether it is this process that uploads.",
        lambda it: it.status.uploader,
    ),
)

#: Litestream's counters have no "_total" in their names.
_PLAIN_COUNTERS: Final[tuple[_Row, ...]] = (
    (
        "litestream_total_wal_bytes",
        "Bytes of the WAL made ready for sending.",
        lambda it: it.work.wal_bytes,
    ),
    (
        "litestream_sync_count",
        "How often it was looked for something new to ship.",
        lambda it: it.work.syncs,
    ),
    ("litestream_sync_error_count", "How often that failed.", lambda it: it.work.sync_errors),
    ("litestream_sync_seconds", "Seconds that it took.", lambda it: it.work.sync_s),
    (
        "litestream_compaction_verify_error_count",
        "How often segments that were to be merged turned out to be damaged.",
        lambda it: it.work.damaged_merges,
    ),
)

_COUNTERS: Final[tuple[_Row, ...]] = (
    ("walship_uploads", "Segments sent.", lambda it: it.work.uploads),
    ("walship_upload_bytes", "Bytes of the segments sent.", lambda it: it.work.upload_bytes),
)

#: The same by mode; what the modes mean: `replica.counts.Checkpoints`.
_CHECKPOINTS: Final[tuple[tuple[str, str, Callable[[Checkpoints], float]], ...]] = (
    ("litestream_checkpoint_count", "How often that was done to the WAL.", lambda it: it.attempts),
    ("litestream_checkpoint_error_count", "How often it was refused.", lambda it: it.errors),
    ("litestream_checkpoint_seconds", "Seconds that it took.", lambda it: it.seconds),
)

#: Name, meaning, label, its values, and which of them holds; that one is 1, the others are 0.
_STATES: Final[
    tuple[tuple[str, str, str, tuple[str, ...], Callable[[DatabaseMetrics], str | None]], ...]
] = (
    (
        "walship_state",
        "Whether replication is in this state.",
        "state",
        ("opening", "ok", "retrying", "stopped"),
        lambda it: it.status.state,
    ),
    (
        "walship_fence_state",
        "Whether the fence is in this state: lost means that another writer has the replica.",
        "state",
        ("held", "idle", "lost", "none"),
        lambda it: it.status.fence,
    ),
    (
        "walship_last_verification",
        "Whether the last verification of the replica ended like this.",
        "outcome",
        ("sound", "damaged", "differs", "failed"),
        lambda it: it.status.last_verification,
    ),
)


def register_metrics(registry: CollectorRegistry | None = None) -> None:
    """Have the numbers of this process among those that ``prometheus_client`` gives out.

    Args:
        registry: prometheus_client's own by default; a second call for one changes nothing.

    Raises:
        ConfigError: prometheus_client is not installed.
    """
    _require_client()
    from prometheus_client import REGISTRY

    target = REGISTRY if registry is None else registry
    with _register_lock:
        if target not in _registered:
            target.register(_Collector())
            _registered.add(target)


def serve_metrics(addr: str) -> MetricsServer:
    """Serve the numbers of this process under ``http://ADDR/metrics``, from a thread.

    Those that prometheus_client has about every process are there too.  It asks nobody for a
    password: mind who can reach the address.

    Args:
        addr: ``HOST:PORT``, or ``:PORT`` on all addresses of the machine; port 0 for any.

    Raises:
        ConfigError: prometheus_client is not installed, or the address cannot be had.
    """
    host, _, port = parse_address("addr", addr).rpartition(":")
    _require_client()
    from prometheus_client import (
        CollectorRegistry,
        GCCollector,
        PlatformCollector,
        ProcessCollector,
        start_http_server,
    )

    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    register_metrics(registry)
    try:
        server, thread = start_http_server(int(port), host.strip("[]") or "0.0.0.0", registry)
    except OSError as error:
        raise ConfigError(
            f"addr: metrics cannot be served on {addr}: {error.strerror or error} (choose another "
            "address, or end what has it)"
        ) from error
    served = MetricsServer(server, thread)
    log.info("metrics are served on %s", served.address)
    return served


class MetricsServer:
    """Serves metrics until it is closed, or the process ends.  Thread-safe."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        host = str(server.server_address[0])
        #: Where: ``host:port``, as `serve_metrics` takes it.
        self.address = f"{f'[{host}]' if ':' in host else host}:{server.server_port}"

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and give the address back.  Safe to call twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(_JOIN_S)
        self._server.server_close()

    def close_in_child(self) -> None:
        """After a fork: give the address back; the thread is the parent's."""
        self._server.socket.close()


class _Collector:
    """What prometheus_client calls a collector."""

    def collect(self) -> Iterator[Metric]:
        """The numbers as they are now."""
        return families(metrics())

    def describe(self) -> Iterator[Metric]:
        """Names and types alone, for a registry that looks for duplicates."""
        return families(Metrics(databases=(), operations=(), requests={}))


# Guards `_registered`.
_register_lock: Final = threading.Lock()
_registered: Final[weakref.WeakSet[CollectorRegistry]] = weakref.WeakSet()


def families(found: Metrics) -> Iterator[Metric]:
    """What is exported, with all samples."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

    databases = [(each.status.path, each) for each in found.databases]
    for name, meaning, value in _GAUGES:
        gauge = GaugeMetricFamily(name, meaning, labels=["db"])
        for path, each in databases:
            if (number := value(each)) is not None:
                gauge.add_metric([path], number)
        yield gauge
    for name, meaning, label, values, which in _STATES:
        gauge = GaugeMetricFamily(name, meaning, labels=["db", label])
        holds = {path: which(each) for path, each in databases}
        holds.update(_of_unopened(name, found.unopened))
        for path, held in holds.items():
            for one in values:
                gauge.add_metric([path, one], held == one)
        yield gauge
    level_0 = GaugeMetricFamily(
        "litestream_l0_retention_files_total",
        "Segments of level 0 in the replica, by what keeps them.",
        labels=["db", "status"],
    )
    for path, each in databases:
        if each.l0_files is not None:
            for status, number in asdict(each.l0_files).items():
                level_0.add_metric([path, status], number)
    yield level_0
    where = GaugeMetricFamily(
        "walship_replica_info", "Where a database is shipped to; 1.", labels=["db", "replica"]
    )
    for path, each in databases:
        where.add_metric([path, each.status.replica], 1)
    yield where
    for name, meaning, value in _PLAIN_COUNTERS:
        plain = Metric(name, meaning, "unknown")
        for path, each in databases:
            plain.add_sample(name, {"db": path}, value(each) or 0)
        yield plain
    for name, meaning, of_mode in _CHECKPOINTS:
        plain = Metric(name, meaning, "unknown")
        for path, each in databases:
            for found_of_mode in each.work.checkpoints:
                labels = {"db": path, "mode": found_of_mode.mode}
                plain.add_sample(name, labels, of_mode(found_of_mode))
        yield plain
    for name, meaning, value in _COUNTERS:
        counter = CounterMetricFamily(name, meaning, labels=["db"])
        for path, each in databases:
            counter.add_metric([path], value(each) or 0)
        yield counter
    yield from _operations(found.operations)
    sent = CounterMetricFamily(
        "walship_requests", "Requests sent to S3 stores, by their names there.", labels=["request"]
    )
    for request, number in found.requests.items():
        sent.add_metric([request], number)
    yield sent


def _of_unopened(name: str, unopened: Mapping[str, Exception]) -> dict[str, str]:
    """What `_STATES` say of databases that cannot be opened."""
    if name == "walship_state":
        return {
            path: "retrying" if isinstance(error, StoreError) and error.retryable else "stopped"
            for path, error in unopened.items()
        }
    if name == "walship_fence_state":
        fenced = (path for path, error in unopened.items() if isinstance(error, FencedError))
        return dict.fromkeys(fenced, "lost")
    return {}


def _operations(operations: Iterable[Operation]) -> Iterator[Metric]:
    """Litestream's numbers of what was asked of stores; each attempt counts."""
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

    labels = ["replica_type", "operation"]
    name = "litestream_replica_operation"
    total = CounterMetricFamily(name, "Attempts at operations on replicas.", labels=labels)
    n_bytes = Metric(f"{name}_bytes", "Bytes of content sent and received.", "unknown")
    durations = HistogramMetricFamily(
        f"{name}_duration_seconds", "How long attempts took.", labels=labels
    )
    errors = CounterMetricFamily(
        f"{name}_errors", "Attempts that failed.", labels=[*labels, "code"]
    )
    for each in operations:
        values = [each.replica_type, each.operation]
        total.add_metric(values, each.attempts)
        n_bytes.add_sample(n_bytes.name, dict(zip(labels, values, strict=True)), each.n_bytes)
        buckets, sum_so_far = [], 0
        for bound, number in zip([*map(str, BUCKETS_S), "+Inf"], each.durations, strict=True):
            sum_so_far += number
            buckets.append((bound, float(sum_so_far)))
        durations.add_metric(values, buckets, each.seconds)
        for code, number in sorted(each.errors.items()):
            errors.add_metric([*values, code], number)
    yield from (total, n_bytes, durations, errors)


def _require_client() -> None:
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "metrics for Prometheus need prometheus_client: pip install 'walship[metrics]'"
        ) from error


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000
