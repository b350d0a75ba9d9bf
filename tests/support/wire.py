"""S3 stores whose requests are looked at on the wire."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from support.clock import FakeClock
from support.recording import RecordingEndpoint, every_host_is, recording_endpoint
from walship.replica.config.sources import parse_replica
from walship.replica.store.base import ObjectStore
from walship.replica.store.lean import LeanClient
from walship.replica.store.opening import open_store

KEYS = {"AWS_ACCESS_KEY_ID": "tid_x", "AWS_SECRET_ACCESS_KEY": "tsec_y"}


@contextlib.contextmanager
def endpoint_of_every_host() -> Iterator[RecordingEndpoint]:
    """A recording endpoint, and every host name leads to it."""
    with recording_endpoint() as running, every_host_is(running):
        yield running


@contextlib.contextmanager
def opened(
    url: str, environ: dict[str, str] | None = None, **more: object
) -> Iterator[ObjectStore]:
    """A store for a replica URL."""
    settings = parse_replica(url, environ=KEYS if environ is None else environ, **more)
    store = open_store(settings.store, FakeClock())
    try:
        yield store
    finally:
        store.close()


def lean_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operations that go without boto3 from now on, in order."""
    taken: list[str] = []
    original = LeanClient._short

    def counted(self: LeanClient, operation: str, *rest: Any) -> Any:
        taken.append(operation)
        return original(self, operation, *rest)

    monkeypatch.setattr(LeanClient, "_short", counted)
    return taken
