"""Which replicated databases were committed to by a piece of work.

The bell tells, in the thread that commits; the piece of work is whatever runs in a context in which
`collect` is in force.  Contexts follow ``await``, ``asyncio.to_thread`` and the thread pools of web
frameworks; a thread that the application starts by itself begins with an empty one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

from walship.replica.engine import Engine

__all__ = ["Commits", "collect", "collecting"]


class Commits:
    """The engines of the databases that were committed to; filled by the bell."""

    def __init__(self) -> None:
        self._engines: set[Engine] = set()

    def add(self, engine: Engine) -> None:
        """Something was committed; also called for what turns out to have changed nothing."""
        self._engines.add(engine)

    def take(self) -> set[Engine]:
        """The engines so far; from here on it counts anew."""
        taken, self._engines = self._engines, set()
        return taken


#: Where the bell notes commits of this context, if anybody wants to know.
collecting: Final[ContextVar[Commits | None]] = ContextVar("walship_commits", default=None)


@contextlib.contextmanager
def collect(commits: Commits | None = None) -> Iterator[Commits]:
    """Note commits of this context, in place of whoever noted them before.

    What is noted inside is passed on at the end, so that an outer piece of work has it too.
    """
    mine = commits if commits is not None else Commits()
    outer = collecting.get()
    token = collecting.set(mine)
    try:
        yield mine
    finally:
        collecting.reset(token)
        if outer is not None:
            for engine in mine.take():
                outer.add(engine)
