"""Settings of levels, snapshots and retention, in the spellings that Litestream has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from walship.replica.errors import ConfigError
from walship.replica.format.types import LEVEL_SNAPSHOT

from .values import parse_bool, parse_duration

__all__ = ["LEVEL_KEYS", "LevelSettings", "level_settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSettings:
    """How segments are merged and how long they are kept.

    Attributes:
        intervals_s: of levels 1, 2 ..., seconds; up to 8 of them; none: nothing is merged.
        snapshot_interval_s: between snapshots, seconds; 0: none are made.
        snapshot_retention_s: how far back every time can be restored, seconds.
        l0_retention_s: how long a level-0 segment stays although it was merged, seconds.
        l0_retention_check_interval_s: between deletions of such segments, seconds.
        retention: false keeps everything for ever.
    """

    intervals_s: tuple[float, ...] = (30.0, 300.0, 3600.0)
    snapshot_interval_s: float = 24 * 3600.0
    snapshot_retention_s: float = 24 * 3600.0
    l0_retention_s: float = 300.0
    l0_retention_check_interval_s: float = 15.0
    retention: bool = True

    def interval_ms(self, level: int) -> int:
        """Of a level that is merged or of the snapshots, ms; 0 if there is no such."""
        if level == LEVEL_SNAPSHOT:
            return round(self.snapshot_interval_s * 1000)
        return round(self.intervals_s[level - 1] * 1000)

    @property
    def levels(self) -> range:
        """The levels that are merged into, lowest first."""
        return range(1, len(self.intervals_s) + 1)


def parse_levels(name: str, value: object) -> tuple[float, ...]:
    """Intervals in seconds of a list of durations, or of Litestream's ``- interval: 30s``."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name}: a list of intervals is expected (30s, 5m, 1h; [] for none)")
    if len(value) >= LEVEL_SNAPSHOT:
        raise ConfigError(f"{name}: there are {len(value)}, {LEVEL_SNAPSHOT - 1} at most are known")
    intervals: list[float] = []
    for number, entry in enumerate(value, 1):
        if isinstance(entry, Mapping):
            if set(entry) != {"interval"}:
                raise ConfigError(f"{name}[{number}]: `interval`, and nothing else, is expected")
            entry = entry["interval"]
        interval = parse_duration(f"{name}[{number}]", entry)
        if interval < max([*intervals, 1.0]):
            raise ConfigError(
                f"{name}[{number}]: {interval:g} s is too short: 1 s at least, and no less than "
                "the level below"
            )
        intervals.append(interval)
    return tuple(intervals)


def parse_snapshot(name: str, value: object) -> Mapping[str, float]:
    """Litestream's section ``snapshot`` with ``interval`` and ``retention``, in seconds."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: `interval` and `retention` are expected below it")
    found: dict[str, float] = {}
    for key, entry in value.items():
        if key not in ("interval", "retention"):
            raise ConfigError(f"{name}: {key} is unknown (interval and retention are not)")
        found[f"snapshot-{key}"] = parse_duration(f"{name}.{key}", entry)
    return found


def parse_retention(name: str, value: object) -> bool | float:
    """A switch, or Litestream's section with ``enabled``; or seconds, of ``snapshot-retention``,
    whose name this was before Litestream 0.5."""
    if isinstance(value, Mapping):
        if set(value) != {"enabled"}:
            raise ConfigError(f"{name}: `enabled`, and nothing else, is expected below it")
        value = value["enabled"]
    try:
        return parse_bool(name, value)
    except ConfigError as error:
        try:
            return parse_duration(name, value)
        except ConfigError:
            raise error from None


#: The settings and how each is read.
LEVEL_KEYS: Final[Mapping[str, Callable[[str, object], object]]] = {
    "levels": parse_levels,
    "snapshot": parse_snapshot,
    "snapshot-interval": parse_duration,
    "snapshot-retention": parse_duration,
    "l0-retention": parse_duration,
    "l0-retention-check-interval": parse_duration,
    "retention": parse_retention,
}
_FIELDS: Final = {
    "levels": "intervals_s",
    "snapshot-interval": "snapshot_interval_s",
    "snapshot-retention": "snapshot_retention_s",
    "l0-retention": "l0_retention_s",
    "l0-retention-check-interval": "l0_retention_check_interval_s",
    "retention": "retention",
}


def level_settings(values: Mapping[str, object]) -> LevelSettings:
    """The settings that these values, as they were read, make together.

    Raises:
        ConfigError: they do not fit each other.
    """
    given = dict(cast("Mapping[str, object]", values.get("snapshot", {})))
    given.update(values)
    retention = given.get("retention")
    if isinstance(retention, float):
        given = {"snapshot-retention": retention, **given, "retention": True}
    fields = {field: given[key] for key, field in _FIELDS.items() if key in given}
    settings = LevelSettings(**cast("dict[str, Any]", fields))
    if 0 < settings.snapshot_interval_s < 1:
        raise ConfigError("snapshot-interval: must be at least 1s, or 0 for no snapshots")
    if settings.l0_retention_check_interval_s < 1:
        raise ConfigError("l0-retention-check-interval: must be at least 1s")
    lease_s = cast("float", values.get("fence-lease", 30.0))
    if settings.l0_retention_s < lease_s:
        raise ConfigError(
            f"l0-retention: must be at least as long as fence-lease ({lease_s:g} s): a writer that "
            "slept through both could not be told from one that did not"
        )
    return settings
