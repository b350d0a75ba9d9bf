"""The spool's journal: what is durable comes back, what is torn does not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import walship.replica.spool as spool_module
from walship.replica.clock import SystemClock
from walship.replica.errors import FormatError
from walship.replica.format.types import WalSalts
from walship.replica.spool import (
    INLINE_BYTES,
    Fingerprint,
    Sealed,
    SegmentSink,
    Spool,
    State,
    WalPosition,
    read_state,
)
from walship.replica.sqlite import SpoolError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the spool lies."""
    return tmp_path / "state"


def _position(frame: int) -> WalPosition:
    return WalPosition(WalSalts(7, 8), frame, (frame * 3, frame * 5))


def _sealed(txid: int, body: bytes) -> Sealed:
    return Sealed(txid=txid, size_bytes=len(body), sha256=f"{txid:064x}", timestamp_ms=txid * 10)


def _piece(size_bytes: int) -> Sealed:
    return Sealed(txid=0, size_bytes=size_bytes)


def _content(spool: Spool, sealed: Sealed) -> bytes:
    body = spool.read(sealed)
    return body if isinstance(body, bytes) else body.read_bytes()


def _reopened(spool: Spool) -> Spool:
    spool.close()
    return Spool.open(spool.directory, SystemClock())


def test_everything_comes_back(directory: Path) -> None:
    """Each field of the state, pieces and segments are the same after reopening."""
    spool = Spool.open(directory, SystemClock())
    state = State(
        lineage="ab" * 16,
        replica="file:///r",
        txid=4,
        sha256="cd" * 32,
        acked_txid=3,
        position=_position(9),
        previous=_position(2),
        commit=17,
        page_size=4096,
        fingerprint=Fingerprint(1, 2, 3, 4, 5),
        copying=True,
    )
    spool.record(state)
    spool.add_piece(replace(state, position=_position(10)), _piece(8), [b"one", b"piece"])
    spool.add_segment(replace(state, txid=5), _sealed(5, b"segment"), [b"segment"], keep=1)
    before = spool.state
    spool = _reopened(spool)
    assert spool.state == before
    assert read_state(directory) == before
    assert [_content(spool, piece) for piece in spool.state.pieces] == [b"onepiece"]
    assert [_content(spool, segment) for segment in spool.state.segments] == [b"segment"]
    spool.close()


def test_a_segment_takes_the_pieces_in(directory: Path) -> None:
    """Freezing a segment drops the pieces in it and keeps those sealed later."""
    spool = Spool.open(directory, SystemClock())
    for n in range(4):
        spool.add_piece(State(position=_position(n + 1)), _piece(1), [b"%d" % n])
    spool.add_segment(State(txid=1), _sealed(1, b"merged"), [b"merged"], keep=1)
    assert [_content(spool, piece) for piece in spool.state.pieces] == [b"3"]
    spool = _reopened(spool)
    assert [_content(spool, piece) for piece in spool.state.pieces] == [b"3"]
    assert spool.state.txid == 1
    spool.close()


def test_merged_pieces_replace_their_parts(directory: Path) -> None:
    """The merge of some pieces stands in their place, between those before and after."""
    spool = Spool.open(directory, SystemClock())
    for n in range(4):
        spool.add_piece(State(position=_position(n + 1)), _piece(1), [b"%d" % n])
    spool.replace_pieces(1, 2, [b"12"], 2)
    spool = _reopened(spool)
    assert [_content(spool, piece) for piece in spool.state.pieces] == [b"0", b"12", b"3"]
    assert spool.state.position == _position(4)
    spool.close()


def test_a_full_spool_takes_no_piece_but_a_merge(directory: Path) -> None:
    """What makes room on it must not be kept out because there is none."""
    spool = Spool.open(directory, SystemClock())
    for body in (b"12", b"34", b"56"):
        spool.add_piece(State(lineage="l", position=_position(1)), _piece(2), [body])
    spool.max_bytes = 5
    with pytest.raises(SpoolError, match="full"):
        spool.add_piece(spool.state, _piece(2), [b"78"])
    spool.replace_pieces(0, 3, [b"56"], 2)
    assert [_content(spool, piece) for piece in spool.state.pieces] == [b"56"]
    spool.add_piece(spool.state, _piece(2), [b"78"])
    spool.close()


def test_acknowledged_segments_are_let_go(directory: Path) -> None:
    """Acknowledging drops segments up to the TXID, their files too, and never goes back."""
    spool = Spool.open(directory, SystemClock())
    large = os.urandom(INLINE_BYTES + 1)
    for txid in (1, 2, 3):
        spool.add_segment(State(txid=txid), _sealed(txid, large), [large])
    assert len(list(directory.glob("*.ltx"))) == 3
    spool.acknowledge(2)
    spool.acknowledge(1)
    assert spool.state.acked_txid == 2
    assert [sealed.txid for sealed in spool.state.segments] == [3]
    assert len(list(directory.glob("*.ltx"))) == 1
    spool = _reopened(spool)
    assert _content(spool, spool.state.segments[0]) == large
    spool.close()


def test_bodies_survive_rewriting_the_journal(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment that somebody still holds reads the same after the journal was rewritten."""
    monkeypatch.setattr("walship.replica.spool._REWRITE_BYTES", 2000)
    spool = Spool.open(directory, SystemClock())
    rng = random.Random(1)
    held: dict[int, tuple[Sealed, bytes]] = {}
    for txid in range(1, 60):
        body = rng.randbytes(rng.choice((50, 700, 5000)))
        held[txid] = spool.add_segment(State(txid=txid), _sealed(txid, body), [body]), body
        if txid % 4 == 0:
            spool.acknowledge(txid - 3)
            held = {key: value for key, value in held.items() if key > txid - 3}
        for sealed, expected in held.values():
            assert _content(spool, sealed) == expected
    assert spool._open_journal().end < 100_000
    spool = _reopened(spool)
    assert [sealed.txid for sealed in spool.state.segments] == sorted(held)
    for sealed in spool.state.segments:
        assert _content(spool, sealed) == held[sealed.txid][1]
    spool.close()


def test_the_journal_stays_small(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that are dead do not add up."""
    monkeypatch.setattr("walship.replica.spool._REWRITE_BYTES", 10_000)
    spool = Spool.open(directory, SystemClock())
    for txid in range(1, 300):
        spool.add_segment(State(txid=txid), _sealed(txid, b"x" * 500), [b"x" * 500])
        spool.acknowledge(txid)
        assert spool._open_journal().end < 20_000
    spool.close()


@pytest.mark.parametrize("seed", range(5))
def test_every_prefix_of_the_journal_is_a_state_that_was(directory: Path, seed: int) -> None:
    """A journal torn at any byte reads back as the state after its last whole record."""
    rng = random.Random(seed)
    spool = Spool.open(directory, SystemClock())
    ends = {spool._open_journal().end: spool.state}
    for n in range(1, 12):
        if rng.random() < 0.5:
            spool.add_piece(State(txid=n, position=_position(n)), _piece(30), [rng.randbytes(30)])
        else:
            spool.record(State(txid=n, position=_position(n)), drop_pieces=rng.random() < 0.3)
        ends[spool._open_journal().end] = spool.state
    journal = (directory / "journal").read_bytes()
    spool.close()
    first = min(ends)
    for length in rng.sample(range(first, max(ends) + 1), 60):
        (directory / "journal").write_bytes(journal[:length] + rng.randbytes(rng.randrange(40)))
        expected = ends[max(end for end in ends if end <= length)]
        assert read_state(directory) == expected
        spool = Spool.open(directory, SystemClock())
        assert spool.state == expected
        spool.record(State(txid=99))
        spool = _reopened(spool)
        assert spool.state.txid == 99
        spool.close()


def test_a_journal_of_something_else(directory: Path) -> None:
    """A file that never was a journal is an error for a reader, and never taken for a state."""
    directory.mkdir()
    (directory / "journal").write_bytes(b"something else entirely" * 10)
    with pytest.raises(FormatError, match="journal"):
        read_state(directory)
    (directory / "journal").unlink()
    assert read_state(directory) is None


def test_leftovers_are_removed(directory: Path) -> None:
    """Files that no record names, from a process that died before naming them, are removed."""
    Spool.open(directory, SystemClock()).close()
    (directory / "00000000000000ff.ltx").write_bytes(b"never named")
    (directory / "compare.tmp").write_bytes(b"half")
    spool = Spool.open(directory, SystemClock())
    assert not list(directory.glob("*.ltx")) + list(directory.glob("*.tmp"))
    spool.close()


def test_a_failed_write_changes_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an I/O error the state in memory is what the journal says, and later writes work."""
    spool = Spool.open(directory, SystemClock())
    spool.record(State(txid=1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("walship.replica.files.write_all", full)
        with pytest.raises(SpoolError, match="No space left"):
            spool.record(State(txid=2))
        with pytest.raises(SpoolError, match="No space left"):
            spool.add_piece(State(txid=2), _piece(1), [b"x"])
    assert spool.state.txid == 1
    spool.record(State(txid=3))
    spool = _reopened(spool)
    assert spool.state.txid == 3
    assert spool.state.pieces == ()
    spool.close()


def test_the_directory_is_private(directory: Path) -> None:
    """Directory and files can be read by their owner alone."""
    spool = Spool.open(directory, SystemClock())
    assert directory.stat().st_mode & 0o777 == 0o700
    for entry in directory.iterdir():
        assert entry.stat().st_mode & 0o077 == 0
    spool.close()


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES, INLINE_BYTES + 1, 3 * INLINE_BYTES])
def test_a_sink_of_any_size(directory: Path, size: int) -> None:
    """A sink gives back what was written, in memory or in a file, with its sha256."""
    spool = Spool.open(directory, SystemClock())
    body = random.Random(size).randbytes(size)
    sink = SegmentSink(spool, hashed=True)
    for start in range(0, size, 1000):
        sink.write([body[start : start + 400], body[start + 400 : start + 1000]])
    finished = sink.finish()
    sealed = spool.add_segment(
        State(txid=1),
        Sealed(txid=1, size_bytes=sink.size_bytes, sha256=sink.sha256),
        finished,
    )
    assert _content(spool, sealed) == body
    abandoned = SegmentSink(spool, hashed=False)
    abandoned.write([body])
    abandoned.abandon()
    names = {entry.name for entry in directory.glob("*.ltx")}
    assert names == ({sealed.file} if sealed.file else set())
    spool.close()


def _beside(directory: Path, body: str) -> str:
    """Run statements on ``spool`` in another process beside this one; what they print."""
    program = (
        "import os, sys\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from walship.replica.clock import SystemClock\n"
        "from walship.replica.spool import Sealed, Spool, State\n"
        "spool = Spool.open(Path(sys.argv[1]), SystemClock())\n" + textwrap.dedent(body)
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def test_processes_write_one_journal_in_turn(directory: Path) -> None:
    """Each sees what the others recorded as soon as it has the lock, pieces included."""
    spool = Spool.open(directory, SystemClock())
    spool.record(State(txid=1))
    spool.admit()
    told = _beside(
        directory,
        """
        print(spool.alone, spool.state.txid)
        spool.record(replace(spool.state, txid=2))
        spool.add_piece(spool.state, Sealed(txid=0, size_bytes=5), [b"piece"])
        """,
    )
    assert told == "False 1\n"
    assert spool.lock()
    assert spool.state.txid == 2
    assert _content(spool, spool.state.pieces[0]) == b"piece"
    spool.record(replace(spool.state, txid=3))
    spool.unlock()
    assert _beside(directory, "print(spool.state.txid, len(spool.state.pieces))") == "3 1\n"
    spool.close()


def test_a_journal_rewritten_by_another_process_is_followed(directory: Path) -> None:
    """After another process put a new journal in the old one's place, that one counts."""
    spool = Spool.open(directory, SystemClock())
    spool.record(State(txid=1))
    spool.admit()
    _beside(directory, "spool.record(replace(spool.state, txid=7)); spool._rewrite()")
    assert spool.lock()
    assert spool.state.txid == 7
    spool.record(replace(spool.state, txid=8))
    spool.unlock()
    assert _beside(directory, "print(spool.state.txid)") == "8\n"
    spool.close()


def test_half_a_record_of_a_dead_process_is_written_over(directory: Path) -> None:
    """What a killed process had half written neither counts nor hides what follows."""
    spool = Spool.open(directory, SystemClock())
    spool.record(State(txid=1))
    spool.admit()
    _beside(
        directory,
        """
        journal = spool._journal
        end = journal.end
        spool.record(replace(spool.state, txid=9))
        os.pwrite(journal.fd, b"torn", end + 40)
        os._exit(0)
        """,
    )
    assert spool.lock()
    assert spool.state.txid == 1
    spool.record(replace(spool.state, txid=2))
    spool.unlock()
    assert _beside(directory, "print(spool.state.txid)") == "2\n"
    spool.close()


def test_the_lock_keeps_other_processes_out(directory: Path) -> None:
    """While one process holds the drain lock another does not get it; when it ends, it does."""
    spool = Spool.open(directory, SystemClock())
    spool.admit()
    told = _beside(
        directory,
        """
        spool.admit()
        print(spool.lock(wait=False))
        """,
    )
    assert told == "True\n"
    assert spool.lock()
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from pathlib import Path\n"
            "from walship.replica.election import Locks\n"
            "from walship.replica.files import Files\n"
            "print(Locks(Files(), Path(sys.argv[1])).try_drain())\n",
            str(directory),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.communicate(timeout=60)[0] == "False\n"
    spool.unlock()
    spool.close()


def test_a_state_directory_that_was_removed_is_an_error(directory: Path) -> None:
    """Going on with a journal that no name leads to would lose everything at the next start."""
    spool = Spool.open(directory, SystemClock())
    spool.admit()
    (directory / "journal").unlink()
    with pytest.raises(SpoolError, match="was removed"):
        spool.lock()
    spool.close()


def test_older_journals_are_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records without the later fields mean the same as they did."""
    newer = ("wal_gone", "resync", "suspect", "timestamp_ms")
    scalars = spool_module._scalars

    def first(state: State) -> dict[str, Any]:
        return {name: value for name, value in scalars(state).items() if name not in newer}

    fingerprint = Fingerprint(1, 2, 3, 4, 5)
    position = WalPosition(WalSalts(1, 2), 3, (4, 5))
    for fields, gone, continuous in (
        ({"fingerprint": fingerprint}, True, True),
        ({"position": position}, False, True),
        ({}, False, False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(spool_module, "_scalars", first)
            spool = Spool.open(directory, SystemClock())
            spool.record(State(txid=4, **fields))
        spool = _reopened(spool)
        assert spool.state.txid == 4
        assert spool.state.wal_gone == gone
        assert (spool.state.resync == "") == continuous
        spool.close()
