"""Exceptions as other processes get them."""

from __future__ import annotations

import pickle

import pytest

import walship


@pytest.mark.parametrize(
    "error",
    [
        walship.ConfigError("m"),
        walship.ContinuityError("m", local_txid=1, replica_txid=2),
        walship.StoreUnavailable("m", code="SlowDown", ambiguous=False),
        walship.GapError("m", reachable_txid=1, next_txid=3),
        walship.IntegrityError("m", ["a", "b"]),
        walship.NotYetReplicated("m", txid=2, replicated_txid=1),
        walship.FencedError("m"),
        walship.SpoolError("m"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_pickled(error: walship.ReplicaError) -> None:
    """Raised in a worker of `multiprocessing` it arrives whole: else the pool itself breaks."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))
