"""Restore of a large database after a first day of light writes.

The replica is written by walship with levels, at intervals so short that a day's merging happens
while it is written: one full copy, and the changes in levels 0 to 3.  Both restore that replica;
the floor is how long the bytes of its largest object take by parallel ranged GETs when nothing is
done with them.
"""

from __future__ import annotations

from harness import (
    LITESTREAM,
    WALSHIP,
    Row,
    Sample,
    Setting,
    at_least,
    at_most,
    interleave,
    sample,
)
from restore import FLOOR, build, once

#: 30 s, 5 min and 1 h, made shorter; level 0 is cleaned up as soon as may be.
_SETTINGS = {
    "levels": ["1s", "5s", "20s"],
    "l0_retention": "2s",
    "fence_lease": "2s",
    "l0_retention_check_interval": "1s",
}
#: After the last commit: until that is in the highest level, and level 0 is cleaned up.
_REST_S = 25


def run(setting: Setting) -> list[Row]:
    n_bytes = int(setting.pick(1450, 100)) * 1_000_000
    commits = int(setting.pick(1440, 150))
    with setting.place() as place:
        build(setting, place, n_bytes, commits, rest_s=_REST_S, **_SETTINGS)
        sizes = place.endpoint.keys(place.bucket, "db/")
        largest = max(sizes, key=lambda key: sizes[key])
        results = interleave(
            setting,
            [FLOOR, LITESTREAM, WALSHIP],
            lambda name: once(setting, place, name, largest, sizes[largest]),
        )
    what = f"{n_bytes / 1e9:.2f} GB after {commits} small commits"
    seconds = {name: sample(found, "seconds") for name, found in results.items()}
    ours, theirs, floor = seconds[WALSHIP], seconds[LITESTREAM], seconds[FLOOR]
    faster = theirs / ours if theirs is not None and ours is not None else None
    slower = ours / floor if ours is not None and floor is not None else None
    stored = Sample((sum(sizes.values()) / sizes[largest],))
    note = f"{len(sizes)} objects"
    return [
        Row("day", f"bytes stored of {what}, full copies", {WALSHIP: stored}, note=note),
        Row("day", f"restore of {what}, s", seconds),
        Row("day", "how many times as fast as Litestream", {WALSHIP: faster}, at_least(5)),
        Row("day", "times the floor", {WALSHIP: slower}, at_most(2)),
    ]
