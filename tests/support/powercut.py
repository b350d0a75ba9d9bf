"""Replays a recording as power cuts: after any of its operations the disk is what it may be then.

`Replay` walks through a `Recording`.  At each operation it makes one or more images of the disk
(`Disk.cut`), opens the database in each, and holds what it finds against what was promised:

* SQLite finds nothing wrong, and the database is a prefix of the history;
* with ``synchronous=FULL`` every acknowledged commit is there; with NORMAL every one before the
  last whole checkpoint; with both, whatever is in the replica;
* the replica alone has everything that `sync` or a durable commit returned for;
* the database goes on: commits, sync, close; the replica then restores to its very bytes, also with
  the real Litestream for a sample; and no object that was there has changed or gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import apsw
import pytest

import walship
from support.databases import assert_same_bytes
from support.disk import Disk, Identities, Image, Left, Operation, Stored
from support.history import History, NotAPrefix
from support.inline import inline_pools
from support.memory import MemoryStore, Object
from support.recorder import (
    DATABASE,
    REPLICA,
    Event,
    Landed,
    Mark,
    PutBegun,
    Recording,
    Script,
    record,
    simulate,
)
from walship.replica import host, spool
from walship.replica import record as record_module
from walship.replica.clock import SystemClock
from walship.replica.fence import LEASE_KEY
from walship.replica.format.types import parse_segment_name
from walship.replica.restore import restore
from walship.vfs.registry import canonical, registry

__all__ = [
    "Replay",
    "Violation",
    "after_a_cut",
    "at_the_end",
    "cut_off_wal",
    "plain_database",
    "scratch_directory",
]

#: Longest wait for the replica, seconds; nothing is measured with it.
_WAIT_S: Final = 20.0
#: Transactions that are committed after each power cut.
_MORE: Final = 2


class Violation(AssertionError):
    """A power cut broke a promise."""


@dataclass(slots=True)
class _Moment:
    """What was there and what was promised when the power went.

    Attributes:
        disk, objects: as they are.
        begun: uploads under way.
        committed, synced, checkpointed: transactions acknowledged by SQLite, in the replica, in the
            main file.
    """

    disk: Disk
    objects: dict[str, Object]
    begun: dict[str, Object | None] = field(default_factory=dict)
    committed: int = 0
    synced: int = 0
    checkpointed: int = 0

    def least(self, script: Script, held: int) -> int:
        """How much of the history the database may not lose; ``held`` is in the replica."""
        kept = self.committed if script.synchronous == "FULL" else self.checkpointed
        return max(held, kept)


def _moments(recording: Recording) -> Iterator[_Moment]:
    """Before the first event and after each; always the same object, which changes."""
    moment = _Moment(Disk(recording.start), dict(recording.objects))
    moment.committed = moment.checkpointed = recording.n
    moment.synced = recording.synced
    yield moment
    for event in recording.events:
        match event:
            case Operation():
                moment.disk.apply(event)
            case PutBegun(key, made):
                moment.begun[key] = made
            case Landed(key, made):
                moment.begun.pop(key, None)
                if made is None:
                    moment.objects.pop(key, None)
                else:
                    moment.objects[key] = made
            case Mark(word, n):
                setattr(moment, word, n)
        yield moment


@dataclass(frozen=True, slots=True)
class _Whole:
    """What a recording came to.

    Attributes:
        objects: in the replica at the end.
        lengths: for each TXID, how much of the history it restores to.
    """

    objects: dict[str, Object]
    lengths: dict[int, int]

    @classmethod
    def of(cls, recording: Recording) -> _Whole:
        image, objects = at_the_end(recording)
        if recording.script.directory:
            objects = _objects_in(image)
        return cls(objects, _lengths(recording, objects))

    def held(self, objects: dict[str, Object]) -> int:
        """How much of the history a replica with these objects has."""
        for key, found in objects.items():
            if key != LEASE_KEY:  # which is replaced all the time
                assert found.body == self.objects[key].body, f"{key} is not whole in the replica"
        txids = _txids(objects)
        return self.lengths[txids[-1]] if txids else 0


@dataclass(slots=True)
class Replay:
    """Replays recordings, each where it was made.

    Attributes:
        litestream: the real program, to restore with too.
        litestream_every: after how many images it is run.
        every: what is not certain is looked at after each so-manieth operation; what is certain
            after each.
        images: disks that were opened so far.
    """

    litestream: Path | None = None
    litestream_every: int = 100
    every: int = 1
    images: int = 0

    def run(self, recording: Recording, *, seed: int = 0, deep: bool = False) -> None:
        """Cut the power after every operation.

        Args:
            seed: chooses what is left where there is a choice.
            deep: every kind of rest at each operation, not two.

        Raises:
            Violation: of any promise; says how to see it again.
        """
        whole = _Whole.of(recording)
        seen: set[tuple[object, ...]] = set()
        for index, moment in enumerate(_moments(recording)):
            for left in self._choices(index, seed, deep):
                self._cut(recording, whole, moment, index, left, seed, seen)

    def again(self, recording: Recording, index: int, left: Left, seed: int) -> None:
        """Cut the power at one moment only."""
        whole = _Whole.of(recording)
        for at, moment in enumerate(_moments(recording)):
            if at == index:
                self._cut(recording, whole, moment, index, left, seed, set())
                return

    def _choices(self, index: int, seed: int, deep: bool) -> list[Left]:
        others = [left for left in Left if left is not Left.NOTHING]
        if index % self.every != seed % self.every:
            return [Left.NOTHING]
        if deep:
            return [Left.NOTHING, *others]
        return [Left.NOTHING, random.Random(f"{seed}/{index}").choice(others)]

    def _cut(
        self,
        recording: Recording,
        whole: _Whole,
        moment: _Moment,
        index: int,
        left: Left,
        seed: int,
        seen: set[tuple[object, ...]],
    ) -> None:
        rng = random.Random(f"{seed}/{index}/{left.name}")
        image, objects = _left(recording, moment, left, rng)
        # Most operations change nothing of what is certain: each case is looked at once.
        case = (image.digest(), *sorted(objects), moment.committed, moment.synced)
        if case in seen:
            return
        seen.add(case)
        self.images += 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                inline_pools(patch)
                self._check(recording, whole, moment, image, objects)
        except Exception as error:
            last = _tell(recording.events[index - 1]) if index else "the start"
            raise Violation(
                f"{error!r} after operation {index} of {len(recording.events)}, {last}; left: "
                f"{left.value}; seed {seed}, script: {recording.script}; again with\n"
                f"    PYTHONPATH={Path(__file__).parents[1]} {sys.executable} {__file__} "
                f"{_keep(recording)} {index} {left.name} {seed}"
            ) from error

    def _check(
        self,
        recording: Recording,
        whole: _Whole,
        moment: _Moment,
        image: Image,
        objects: dict[str, Object],
    ) -> None:
        script, history, root = recording.script, recording.script.history(), recording.root
        held = whole.held(objects)
        assert held >= moment.synced, f"the replica has {held} transactions, not {moment.synced}"
        least, most = moment.least(script, held), max(moment.committed + 1, recording.most)
        try:
            identities = image.write_to(root)
            store = MemoryStore(dict(objects))
            with _engine_on(script, identities, store):
                _go_on(script, history, root, least, most)
            after = _objects_in(Image.of(root)) if script.directory else store.objects
            for key, found in objects.items():
                assert key in after, f"{key} has gone from the replica"
                if key != LEASE_KEY:
                    assert after[key].body == found.body, f"{key} has changed in the replica"
            restored = root / "restored"
            restore(MemoryStore(after), restored, clock=SystemClock())
            assert_same_bytes(restored, root / DATABASE)
            history.length_of(restored)
            if self.litestream is not None and self.images % self.litestream_every == 1:
                _compare_litestream(self.litestream, after, root)
        finally:
            shutil.rmtree(root, ignore_errors=True)


# -- where recordings begin -----------------------------------------------------------------------


def plain_database(history: History, n: int, directory: Path) -> Image:
    """A database in WAL mode that walship has never seen; its last commits are in the WAL only."""
    connection = apsw.Connection(str(directory / DATABASE), vfs="unix")
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.execute("PRAGMA journal_mode = wal")
    for step in range(n):
        history.apply(connection, step)
    connection.close(True)
    image = Image.of(directory)
    assert f"{DATABASE}-wal" in image.files
    for name in os.listdir(directory):
        os.unlink(directory / name)
    return image


def cut_off_wal(image: Image) -> Image:
    """The same without the second half of the WAL."""
    name = f"{DATABASE}-wal"
    wal = image.files[name]
    half = Stored(wal.content[: len(wal.content) // 2], wal.status)
    return Image({**image.files, name: half}, image.directories)


def at_the_end(recording: Recording) -> tuple[Image, dict[str, Object]]:
    """Disk and store without a power cut."""
    *_, moment = _moments(recording)
    return moment.disk.now(), moment.objects


def after_a_cut(recording: Recording, script: Script, root: Path, seed: int) -> Recording:
    """Record what follows a power cut somewhere in a recording."""
    rng = random.Random(f"{seed}/after")
    index = rng.randrange(len(recording.events) // 4, len(recording.events))
    moment = next(m for at, m in enumerate(_moments(recording)) if at == index)
    image, objects = _left(recording, moment, Left.SOME, rng)
    least = moment.least(recording.script, _Whole.of(recording).held(objects))
    most = max(moment.committed + 1, recording.most)
    if script.directory:
        objects = {}
    return record(script, root, image, objects, n=least, synced=moment.synced, most=most)


def scratch_directory() -> contextlib.AbstractContextManager[str]:
    """A directory that is removed at the end, in memory if there is such a file system."""
    memory = "/dev/shm"
    return tempfile.TemporaryDirectory(
        prefix="walship-powercut-", dir=memory if os.access(memory, os.W_OK) else None
    )


# -- choices, and what is told of them ------------------------------------------------------------


def _left(
    recording: Recording, moment: _Moment, left: Left, rng: random.Random
) -> tuple[Image, dict[str, Object]]:
    """What a power cut leaves of disk and replica."""
    image = moment.disk.cut(left, rng)
    if recording.script.directory:
        return image, _objects_in(image)
    objects = dict(moment.objects)
    arrives = rng.random() < 0.5 if left is Left.SOME else left is not Left.NOTHING
    if arrives:
        objects.update({key: made for key, made in moment.begun.items() if made is not None})
    return image, objects


def _tell(event: Event) -> str:
    text = repr(event)
    return text if len(text) < 160 else f"{text[:120]} ..."


def _keep(recording: Recording) -> Path:
    fd, name = tempfile.mkstemp(prefix="walship-recording-")
    with os.fdopen(fd, "wb") as file:
        pickle.dump(recording, file)
    return Path(name)


# -- what the replica holds -----------------------------------------------------------------------


def _objects_in(image: Image) -> dict[str, Object]:
    """A directory replica's objects, under the keys of the store in memory."""
    prefix = f"{REPLICA}/ltx/0/"
    return {
        f"0000/{path[len(prefix) :]}": Object(stored.content, 0)
        for path, stored in image.files.items()
        if path.startswith(prefix) and path.endswith(".ltx")
    }


def _txids(objects: dict[str, Object]) -> list[int]:
    """TXIDs at level 0 up to the first gap."""
    found = {parse_segment_name(key.rpartition("/")[2]) for key in objects if key[:5] == "0000/"}
    txids = sorted(txids[1] for txids in found if txids is not None)
    return [txid for n, txid in enumerate(txids) if txid == txids[0] + n]


def _lengths(recording: Recording, objects: dict[str, Object]) -> dict[int, int]:
    history = recording.script.history()
    lengths: dict[int, int] = {}
    before = 0
    for txid in _txids(objects):
        target = recording.root.parent / "restored"
        restore(MemoryStore(objects), target, clock=SystemClock(), txid=txid, overwrite=True)
        try:
            lengths[txid] = history.length_of(target)
        except NotAPrefix as error:
            raise Violation(f"txid {txid}, without any power cut: {error}") from error
        if lengths[txid] < before:
            raise Violation(f"txid {txid} goes back from {before} to {lengths[txid]}")
        before = lengths[txid]
    return lengths


# -- after a power cut ----------------------------------------------------------------------------


@contextlib.contextmanager
def _engine_on(script: Script, identities: Identities, store: MemoryStore) -> Iterator[None]:
    """An engine that sees these files, and this store unless it replicates to a directory."""
    end = simulate(identities)
    kept = (host.open_store, record_module._SETTLE_NS, spool._GROWTH_BYTES)
    if not script.directory:
        host.open_store = lambda *_: store  # type: ignore[attr-defined]
    # Waiting for time stamps to differ is for the recording.
    record_module._SETTLE_NS = 0  # type: ignore[misc]
    spool._GROWTH_BYTES = script.journal_growth_bytes  # type: ignore[misc]
    try:
        yield
    finally:
        end()
        host.open_store, record_module._SETTLE_NS, spool._GROWTH_BYTES = kept  # type: ignore[attr-defined,misc]


def _go_on(script: Script, history: History, root: Path, least: int, most: int) -> None:
    """Open what the power cut left, look, commit, sync, close."""
    path = root / DATABASE
    connection = walship.connect(path, **script.keywords(root))
    try:
        connection.execute(f"PRAGMA synchronous = {script.synchronous}")
        n = history.length(connection)
        assert least <= n <= most, f"{n} transactions are left, not {least} to {most}"
        findings = connection.execute("PRAGMA integrity_check").fetchall()
        assert findings == [("ok",)], findings
        for step in range(n, n + _MORE):
            history.apply(connection, step)
        walship.replication(connection).sync(_WAIT_S)
    finally:
        connection.close(True)
    assert registry.engine(canonical(path)) is None
    assert not os.path.exists(f"{path}-wal")


def _compare_litestream(program: Path, objects: dict[str, Object], root: Path) -> None:
    """The real Litestream restores the same bytes."""
    replica = root / "litestream"
    for key, found in objects.items():
        name = key.rpartition("/")[2]
        if key != f"0000/{name}" or parse_segment_name(name) is None:
            continue
        target = replica / "ltx" / "0" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(found.body)
    output = root / "litestream.db"
    done = subprocess.run(
        [program, "restore", "-o", output, f"file://{replica}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert_same_bytes(output, root / DATABASE)


def _main() -> None:
    recording: Recording = pickle.loads(Path(sys.argv[1]).read_bytes())
    try:
        Replay().again(recording, int(sys.argv[2]), Left[sys.argv[3]], int(sys.argv[4]))
    finally:
        shutil.rmtree(recording.root.parent, ignore_errors=True)
    print("no violation")


if __name__ == "__main__":
    _main()
