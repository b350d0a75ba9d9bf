"""After a power cut at any moment nothing promised is missing, and replication goes on.

Each test records a short life of a database, operation by operation, and replays it as a power cut
after each of them: see ``support.powercut`` for what is checked and ``support.disk`` for what a
power cut may leave.  An ordinary run plays each life once: what is certain is looked at after every
operation, what is not after every third one.  ``WALSHIP_DEEP=1`` replays more, for hours: other
histories and page sizes, and every kind of rest at each operation.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.disk import Image
from support.memory import Object
from support.powercut import (
    Replay,
    Violation,
    after_a_cut,
    at_the_end,
    cut_off_wal,
    plain_database,
    scratch_directory,
)
from support.recorder import MUTANTS, Script, record

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fdatasync"), reason="syncs are recorded where they are calls of module os"
)

DEEP = os.environ.get("WALSHIP_DEEP", "") not in ("", "0")
#: What every recording and every choice in a replay follow from.
SEEDS = range(12) if DEEP else (int(os.environ.get("WALSHIP_SEED", "0")),)
_DEEP_LIMIT_S = 1800

#: Lives of a database, by what happens in them; the words are explained in ``support.recorder``.
LIVES: dict[str, Script] = {
    "gates": Script(
        steps="commit:2 sync commit:2 checkpoint:PASSIVE commit sync checkpoint:RESTART commit:2 "
        "sync checkpoint:TRUNCATE commit ghosts reopen commit:2 spill commit checkpoint:FULL "
        "commit ghosts checkpoint:RESTART commit sync close"
    ),
    "outage": Script(
        steps="commit:2 sync away commit:2 checkpoint:TRUNCATE commit attempt commit "
        "checkpoint:RESTART commit:3 checkpoint:RESTART commit reopen commit checkpoint:TRUNCATE "
        "back commit sync commit lose:2 sync commit close",
        settings={"shutdown_sync_timeout": "0.05s", "open_timeout": "0.05s"},
    ),
    "full spool": Script(
        steps="commit:2 touch sync away commit:2 checkpoint:TRUNCATE touch checkpoint:RESTART "
        "commit:2 checkpoint:RESTART commit checkpoint:TRUNCATE commit reopen commit "
        "checkpoint:RESTART commit back sync commit sync "
        "checkpoint:TRUNCATE commit sync close",
        settings={
            "max_spool_bytes": "3KB",
            "shutdown_sync_timeout": "0.05s",
            "open_timeout": "0.05s",
        },
    ),
    "full disk": Script(
        steps="commit:2 touch sync checkpoint:TRUNCATE touch full checkpoint:RESTART commit:2 room "
        "sync commit sync checkpoint:TRUNCATE commit:2 full checkpoint:TRUNCATE commit room sync "
        "commit:3 full checkpoint:RESTART commit room reopen commit sync close",
        settings={"shutdown_sync_timeout": "0.05s", "open_timeout": "0.05s"},
    ),
    "closed on a full disk": Script(
        steps="commit:2 sync commit:2 sync touch full commit touch close room open commit "
        "sync close",
        settings={"shutdown_sync_timeout": "0.05s", "open_timeout": "0.05s"},
    ),
    "others": Script(
        steps="commit:2 sync commit other:PASSIVE commit sync commit other:RESTART commit:2 sync "
        "commit other:TRUNCATE commit:2 sync other:TRUNCATE commit reopen commit sync close"
    ),
    "in flight": Script(
        steps="commit:2 sync slow commit:8 sync commit durable commit durable commit:5 "
        "checkpoint:TRUNCATE commit:4 lose:2 sync close",
        settings={"max_sync_wal_bytes": "8KB"},
    ),
    "spills": Script(
        steps="tight commit:3 sync commit vacuum commit sync vacuum checkpoint:RESTART commit "
        "spill commit vacuum reopen commit hold commit checkpoint:PASSIVE commit:2 release sync "
        "close"
    ),
    "directory": Script(
        steps="commit:2 sync commit:2 checkpoint:RESTART commit sync commit:2 reopen durable "
        "commit checkpoint:TRUNCATE commit sync close",
        directory=True,
    ),
    "state elsewhere": Script(
        steps="commit:2 sync commit checkpoint:RESTART commit sync close", elsewhere=True
    ),
}
#: What follows on a beginning that was made first.
GOES_ON = "commit sync commit checkpoint:TRUNCATE commit reopen commit sync close"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of databases are opened: what they log is no news here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory, in memory if possible."""
    with scratch_directory() as name:
        yield Path(name)


@pytest.fixture
def replay(litestream: Path) -> Replay:
    """Replays, with a sample for the real Litestream."""
    return Replay(litestream, every=1 if DEEP else 3)


def _vary(script: Script, synchronous: str, seed: int) -> Script:
    """The script with this setting; page sizes other than the usual one from the second seed on."""
    settings = dict(script.settings)
    if seed:
        settings["page_size"] = random.Random(seed).choice((512, 1024, 4096, 65536))
    return dataclasses.replace(script, synchronous=synchronous, seed=seed, settings=settings)


both = pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
seeds = pytest.mark.parametrize("seed", SEEDS)
deep_limit = pytest.mark.timeout(_DEEP_LIMIT_S if DEEP else 180)


@both
@seeds
@deep_limit
@pytest.mark.parametrize("life", LIVES)
def test_after_any_operation(
    life: str, synchronous: str, seed: int, scratch: Path, replay: Replay
) -> None:
    """Nothing promised is lost, whatever the disk kept of what was not synced."""
    recording = record(_vary(LIVES[life], synchronous, seed), scratch)
    replay.run(recording, seed=seed, deep=DEEP)


def _random_life(seed: int) -> Script:
    """Any of the steps in any order that makes sense."""
    rng = random.Random(f"{seed}/life")
    steps = ["commit:2", "sync"]
    away = held = full = False
    for _ in range(24):
        choices = ["commit", "commit", "commit:3", "checkpoint:PASSIVE", "ghosts", "ghosts commit"]
        choices += ["attempt"] if away or full else ["sync", "spill", "durable"]
        choices += ["back", "back"] if away else ["away"]
        choices += ["lose:1 commit sync"] if not (away or full) else []
        choices += ["touch", "room" if full else "full"] + ["room"] * full
        if held:
            choices += ["release", "release"]
        else:
            choices += ["hold", "vacuum", "foreign", "other:PASSIVE"]
            choices += [] if full else ["reopen"]
            choices += [f"checkpoint:{mode}" for mode in ("FULL", "RESTART", "TRUNCATE")] * 2
            choices += [rng.choice(("other:RESTART", "other:TRUNCATE"))]
        step = rng.choice(choices)
        away = step == "away" or (away and step != "back")
        full = step == "full" or (full and step != "room")
        held = step == "hold" or (held and step != "release")
        steps.append(step)
    steps += ["release"] * held + ["back"] * away + ["room"] * full + ["commit", "sync", "close"]
    settings = {
        "shutdown_sync_timeout": "0.05s",
        "open_timeout": "0.05s",
        "max_sync_wal_bytes": rng.choice(("8KB", "64MB")),
        "max_spool_bytes": rng.choice((0, 0, "3KB")),
    }
    return Script(
        steps=" ".join(steps),
        directory="away" not in steps and not any("lose" in step for step in steps),
        settings=settings,
        sealed_inline_bytes=rng.choice((2_000, 256 * 1024)),
        journal_rewrite_bytes=rng.choice((4_000, 64 * 1024)),
    )


@both
@seeds
@deep_limit
def test_in_a_random_life(synchronous: str, seed: int, scratch: Path, replay: Replay) -> None:
    """The same for steps in a random order."""
    recording = record(_vary(_random_life(seed), synchronous, seed), scratch)
    replay.run(recording, seed=seed, deep=DEEP)


@both
@seeds
@deep_limit
@pytest.mark.parametrize("directory", [False, True], ids=["store", "directory"])
def test_while_a_database_is_taken_in(
    directory: bool, synchronous: str, seed: int, scratch: Path, replay: Replay
) -> None:
    """The same for the first copy of a database that has its last commits in the WAL only."""
    script = Script(
        steps="commit sync commit:2 checkpoint:RESTART commit sync close", directory=directory
    )
    script = dataclasses.replace(script, synchronous=synchronous, seed=seed)
    start = plain_database(script.history(), 4, scratch)
    replay.run(record(script, scratch, start, n=4), seed=seed, deep=DEEP)


@both
@seeds
@deep_limit
def test_while_a_missing_database_is_restored(
    synchronous: str, seed: int, scratch: Path, replay: Replay
) -> None:
    """The same while a lost database comes back from the replica."""
    script = _vary(Script(steps="commit:2 sync commit:3 sync close"), synchronous, seed)
    _, objects = at_the_end(record(script, scratch))
    recording = record(
        dataclasses.replace(script, steps=GOES_ON), scratch, Image(), objects, n=5, synced=5
    )
    replay.run(recording, seed=seed, deep=DEEP)


def _lose_the_tail(script: Script, scratch: Path) -> tuple[Image, dict[str, Object]]:
    """A disk that lied: half of the WAL is gone, although it was synced before it was sealed."""
    image, objects = at_the_end(record(script, scratch))
    return cut_off_wal(image), objects


@both
@seeds
@deep_limit
@pytest.mark.parametrize(
    ("before", "n", "synced"),
    [
        ("commit:2 sync checkpoint:TRUNCATE commit:4 sync", 6, 6),
        ("commit:2 sync checkpoint:TRUNCATE commit:2 sync away commit:3 attempt", 7, 4),
        ("commit:2 sync away commit attempt commit checkpoint:RESTART commit:2 watch leave", 6, 2),
    ],
    ids=["in the replica", "in a segment of the spool", "in pieces of the spool"],
)
def test_while_a_database_is_rolled_forward(
    before: str, n: int, synced: int, synchronous: str, seed: int, scratch: Path, replay: Replay
) -> None:
    """The same while commits that a lying disk lost come back from spool and replica."""
    settings = {"shutdown_sync_timeout": "0.05s", "open_timeout": "0.05s"}
    script = _vary(Script(steps=before, settings=settings), synchronous, seed)
    start, objects = _lose_the_tail(script, scratch)
    script = dataclasses.replace(script, steps=GOES_ON)
    recording = record(script, scratch, start, objects, n=n, synced=synced)
    replay.run(recording, seed=seed, deep=DEEP)


#: An ordinary run takes one setting for each life, in turn.
_SECOND_CUTS = [
    (life, synchronous)
    for at, life in enumerate(LIVES)
    for synchronous in (("FULL", "NORMAL") if DEEP else (("FULL", "NORMAL")[at % 2],))
]


@seeds
@deep_limit
@pytest.mark.parametrize(("life", "synchronous"), _SECOND_CUTS)
def test_after_a_second_power_cut(
    life: str, synchronous: str, seed: int, scratch: Path, replay: Replay
) -> None:
    """The same during what follows a first power cut."""
    script = _vary(LIVES[life], synchronous, seed)
    first = record(script, scratch)
    recording = after_a_cut(first, dataclasses.replace(script, steps=GOES_ON), scratch, seed)
    replay.run(recording, seed=seed, deep=DEEP)


#: Passes through what the mutants break, and is short.
_FOR_MUTANTS = Script(
    steps="commit:2 sync commit:3 checkpoint:RESTART commit sync spill commit sync",
    synchronous="NORMAL",
    sealed_inline_bytes=1 << 20,
    journal_rewrite_bytes=1 << 20,
)


def test_nothing_is_noticed_where_nothing_is_broken(scratch: Path) -> None:
    """What the mutants are measured with passes without them."""
    Replay().run(record(_FOR_MUTANTS, scratch))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_broken_is_noticed(mutant: str, scratch: Path) -> None:
    """A sync left out, an early acknowledgement and an unpublished frame each break a promise."""
    recording = record(dataclasses.replace(_FOR_MUTANTS, mutant=mutant), scratch)
    with pytest.raises(Violation):
        Replay().run(recording)
