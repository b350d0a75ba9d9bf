"""Who waits for the replica, and who is told what."""

from __future__ import annotations

import pytest

from walship.replica.errors import ReplicaError
from walship.replica.waits import Waits


def test_a_wait_ends_when_what_covers_it_is_acknowledged() -> None:
    """A ticket stands for what was committed before it, whatever was frozen later."""
    waits = Waits()
    first = waits.draw()
    seen = waits.ticket
    second = waits.draw()
    waits.cover(seen, 7)
    waits.acknowledge(6)
    assert not first.done()
    waits.acknowledge(7)
    assert first.result(0) == 7
    assert not second.done()
    assert waits.pending
    waits.cover(waits.ticket, 9)
    waits.cover(waits.ticket, 12)  # the first to cover it counts
    waits.acknowledge(9)
    assert second.result(0) == 9
    assert not waits.pending


def test_one_that_is_not_covered_is_not_acknowledged() -> None:
    """However far the replica is: nobody knows yet where the commit went."""
    waits = Waits()
    future = waits.draw()
    waits.acknowledge(1_000)
    assert not future.done()


def test_the_first_end_is_told_to_all_and_to_those_that_come_later() -> None:
    """Nothing can be shipped any more: why, is what was said first."""
    waits = Waits()
    waiting = waits.draw()
    waits.end(ReplicaError("the first reason"))
    waits.end(ReplicaError("another"))
    for future in (waiting, waits.draw()):
        with pytest.raises(ReplicaError, match="the first reason"):
            future.result(0)
    assert not waits.pending


def test_who_has_lost_interest_is_passed_over() -> None:
    """A cancelled wait is in nobody's way."""
    waits = Waits()
    gone, staying = waits.draw(), waits.draw()
    assert gone.cancel()
    waits.cover(waits.ticket, 3)
    waits.acknowledge(3)
    assert gone.cancelled()
    assert staying.result(0) == 3


def test_callbacks_may_wait_again() -> None:
    """No lock is held while futures are resolved."""
    waits = Waits()
    again = []
    waits.draw().add_done_callback(lambda _: again.append(waits.draw()))
    waits.cover(waits.ticket, 1)
    waits.acknowledge(1)
    assert [future.done() for future in again] == [False]
    assert waits.pending
