"""Messages between the processes of one state directory, through real pipes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from walship.replica.files import OS_FILES
from walship.replica.peers import Message, Peers, Pipe, ask_leader, read_leader

WAIT_S = 20.0


class Process:
    """One of the processes: what it was told, and what it answers."""

    def __init__(self, directory: Path) -> None:
        self.told: list[Message] = []
        self.news = threading.Condition()
        self.peers = Peers(OS_FILES, directory, Pipe(OS_FILES, directory), self._handle)
        self.peers.start()

    def _handle(self, message: Message) -> None:
        with self.news:
            self.told.append(message)
            self.news.notify_all()
        if message.get("op") == "fail":
            raise RuntimeError("on purpose")
        if message.get("op") == "status":
            self.peers.answer(str(message["from"]), {"id": message["id"], "status": {"txid": 5}})

    def wait_told(self, n: int) -> list[Message]:
        with self.news:
            assert self.news.wait_for(lambda: len(self.told) >= n, WAIT_S), self.told
            return list(self.told)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[Process]]:
    with contextlib.ExitStack() as stack:
        made = [Process(tmp_path) for _ in range(3)]
        for process in made:
            stack.callback(process.peers.close)
        yield made


def test_the_leader_is_told(processes: list[Process], tmp_path: Path) -> None:
    """Everybody reaches whoever leads, and the next leader once that is another one."""
    first, second, third = processes
    assert not second.peers.tell_leader({"op": "bell"})
    first.peers.lead()
    assert read_leader(OS_FILES, tmp_path) == first.peers.name
    assert second.peers.tell_leader({"op": "bell"})
    assert third.peers.tell_leader({"op": "bell"})
    assert first.wait_told(2) == [{"op": "bell"}] * 2
    assert not first.peers.tell_leader({"op": "bell"})  # it is the one
    first.peers.close()
    second.peers.lead()
    assert third.peers.tell_leader({"op": "sync"})
    assert second.wait_told(1) == [{"op": "sync"}]


def test_a_question_is_answered(processes: list[Process], tmp_path: Path) -> None:
    """By a process, and from outside; None when nobody leads or nobody answers in time."""
    first, second, _ = processes
    assert second.peers.ask({"op": "status"}, 0.1) is None
    first.peers.lead()
    answer = second.peers.ask({"op": "status"}, WAIT_S)
    assert answer is not None
    assert answer["status"] == {"txid": 5}
    answer = ask_leader(OS_FILES, tmp_path, {"op": "status"}, WAIT_S)
    assert answer is not None
    assert answer["status"] == {"txid": 5}
    assert second.peers.ask({"op": "silence"}, 0.1) is None
    first.peers.close()
    assert ask_leader(OS_FILES, tmp_path, {"op": "status"}, 0.1) is None


def test_what_makes_no_sense_is_passed_over(processes: list[Process], tmp_path: Path) -> None:
    """Rubbish in a pipe, and a message that cannot be handled, stop nobody."""
    first, second, _ = processes
    first.peers.lead()
    with open(tmp_path / first.peers.name, "wb", buffering=0) as pipe:
        pipe.write(b'\xff\xfe no json\n[1, 2]\n\n{"op":')
        pipe.write(b' "fail"}\n')
    assert second.peers.tell_leader({"op": "bell"})
    assert first.wait_told(2) == [{"op": "fail"}, {"op": "bell"}]


def test_pipes_of_the_dead_are_removed(processes: list[Process], tmp_path: Path) -> None:
    """Who begins to lead removes pipes that nobody reads, and no others."""
    first, second, _ = processes
    dead = Pipe(OS_FILES, tmp_path)
    dead.close(unlink=False)
    assert (tmp_path / dead.name).exists()
    first.peers.lead()
    assert not (tmp_path / dead.name).exists()
    assert (tmp_path / second.peers.name).exists()


@pytest.mark.parametrize("name", ["../elsewhere.fifo", "journal", "/etc/passwd", "x.fifo/y.fifo"])
def test_nothing_but_a_pipe_is_written_to(
    name: str, processes: list[Process], tmp_path: Path
) -> None:
    """A name that comes in a message cannot lead out of the directory."""
    assert not processes[0].peers._pipe.send(name, {"op": "bell"})
    assert not (tmp_path.parent / "elsewhere.fifo").exists()
