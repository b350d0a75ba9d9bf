"""A replica as both programs want to hear it, and the real Litestream."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support.servers import S3Endpoint
from walship.replica.clock import SystemClock
from walship.replica.config.sources import parse_replica
from walship.replica.restore import list_replica
from walship.replica.store.base import ObjectStore
from walship.replica.store.opening import open_store


@dataclass
class Place:
    """Where a replica is, as either program wants to hear it."""

    ours: str | dict[str, object]
    url: str
    environ: Mapping[str, str] = field(default_factory=dict)

    def store(self) -> ObjectStore:
        """The replica as a store."""
        return open_store(parse_replica(self.ours).store, SystemClock())

    def txids(self) -> list[int]:
        """Every TXID at which a segment ends, ascending."""
        with contextlib.closing(self.store()) as store:
            return sorted({segment.max_txid for segment in list_replica(store)})


def in_bucket(server: S3Endpoint) -> Place:
    """A path in a new bucket of a server."""
    bucket = server.make_bucket()
    return Place(
        server.replica(bucket, "backups/app.db"),
        server.replica_url(bucket, "backups/app.db"),
        server.environ,
    )


def in_directory(root: Path) -> Place:
    """A directory."""
    return Place(str(root), f"file://{root}")


class Litestream:
    """The real program, for one database and one replica."""

    def __init__(self, program: Path, directory: Path, database: Path, place: Place) -> None:
        self.program = program
        self.log = directory / "litestream.log"
        self.config = directory / "litestream.yml"
        self.database = database
        # Litestream 0.5.17 opens no S3 replica while AWS_CA_BUNDLE is set.
        kept = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}
        self.environ = {**kept, **place.environ}
        self.config.write_text(
            f"levels:\n  - interval: 1s\n"
            f"dbs:\n  - path: {database}\n    monitor-interval: 20ms\n"
            f"    replica:\n      url: {place.url}\n      sync-interval: 20ms\n"
        )

    def restore(self, output: Path, txid: int | None = None) -> Path:
        """Restore with Litestream."""
        flags = [] if txid is None else ["-txid", f"{txid:016x}"]
        done = subprocess.run(
            [self.program, "restore", *flags, "-config", self.config, "-o", output, self.database],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return output

    @contextlib.contextmanager
    def replicating(self, end: signal.Signals = signal.SIGTERM) -> Iterator[None]:
        """Replicate while the block runs; then end it with a signal."""
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [self.program, "replicate", "-config", self.config],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield
            assert process.poll() is None, self.log.read_text()
            process.send_signal(end)
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
