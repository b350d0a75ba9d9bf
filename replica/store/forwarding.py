"""What stores that stand before another one have in common."""

from __future__ import annotations

from .base import ObjectStore

__all__ = ["ForwardingStore"]


class ForwardingStore:
    """Says of itself what the store behind it says; `close` closes that one.

    Args:
        store: the one behind it.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store!r})"

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def logical_times(self) -> bool:
        return self._store.logical_times

    def level_prefix(self, level: int) -> str:
        return self._store.level_prefix(level)

    def close(self) -> None:
        self._store.close()
