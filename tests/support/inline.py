"""Pools of threads that do at once, in the calling thread, what they are given.

Where thousands of small databases are opened, most of the time would be spent in starting threads;
and where everything has to come again exactly, threads of a pool would be in the way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

__all__ = ["InlinePool", "inline_pools"]

#: Modules that have small jobs done in pools of threads.
_MODULES = (
    "walship.replica.restore",
    "walship.replica.apply",
    "walship.replica.catchup",
    "walship.replica.listing",
)


class _Done:
    """A future that is done."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        try:
            self._result = action()
        except Exception as error:
            self._error = error

    def result(self, timeout: float | None = None) -> Any:
        if self._error is not None:
            raise self._error
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._error

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        return False

    def add_done_callback(self, callback: Callable[[_Done], object]) -> None:
        callback(self)


class InlinePool:
    """As ``ThreadPoolExecutor``, without threads."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, action: Callable[..., Any], *arguments: Any, **named: Any) -> _Done:
        return _Done(lambda: action(*arguments, **named))

    def map(self, action: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        return iter([action(*each) for each in zip(*arguments, strict=False)])

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


def inline_pools(patch: pytest.MonkeyPatch) -> None:
    """Have the modules that read replicas do without threads of their own."""
    for name in _MODULES:
        patch.setattr(importlib.import_module(name), "ThreadPoolExecutor", InlinePool)
