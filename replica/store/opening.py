"""From settings to a store.  The S3 SDK is imported here, when the first S3 store is opened."""

from __future__ import annotations

from collections.abc import Callable

from walship.replica.clock import Clock

from .base import ObjectStore
from .settings import S3Settings, StoreSettings

__all__ = ["open_store"]


def open_store(
    settings: StoreSettings, clock: Clock, sent: Callable[[str], None] | None = None
) -> ObjectStore:
    """Make the store that ``settings`` describe; no request is sent yet, nothing is wrapped.

    Args:
        sent: called with the name of each request that goes out, in S3's API; a directory has none.

    Raises:
        ConfigError: settings that only the SDK can refuse (an unknown profile, say).
    """
    if isinstance(settings, S3Settings):
        from .s3 import S3Store

        return S3Store(settings, clock, sent)
    from .local import LocalStore

    return LocalStore(settings.path, clock)
