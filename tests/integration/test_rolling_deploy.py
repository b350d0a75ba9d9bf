"""Rolling deploys: the new instance starts while the old one still writes, on a disk of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.litestream import Place, in_bucket, in_directory
from support.servers import S3Endpoint
from support.workers import Row, Worker, WorkerError, Workers, rows_of, workers
from walship.replica.clock import SystemClock
from walship.replica.restore import restore


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty replica: a directory, where a test does not say otherwise."""
    where = getattr(request, "param", "directory")
    if where == "directory":
        return in_directory(tmp_path / "replica")
    server: S3Endpoint = request.getfixturevalue(f"{where}_server")
    return in_bucket(server)


BOTH = pytest.mark.parametrize("place", ["directory", "minio"], indirect=True)


class Deploy:
    """Instances of one application, each on a disk of its own."""

    def __init__(self, fleet: Workers, directory: Path, place: Place) -> None:
        self.fleet = fleet
        self.directory = directory
        self.place = place

    def path(self, name: str) -> Path:
        disk = self.directory / name
        disk.mkdir(exist_ok=True)
        return disk / "app.db"

    def instance(self, name: str, *, opened: bool = True, **settings: Any) -> Worker:
        given = {"fence_lease": 60.0, **settings}
        return self.fleet(self.path(name), self.place.ours, host=name, opened=opened, **given)

    def successor(self, name: str, **settings: Any) -> Worker:
        """An instance that is opening, and has found that it has to wait."""
        worker = self.instance(name, opened=False, fence_wait=60.0, **settings)
        worker.begin("open()")
        while "waiting for " not in worker.log():
            assert not worker.has_answered(0.02), worker.log()
        return worker

    def restored(self) -> set[Row]:
        output = self.directory / "restored.db"
        with contextlib.closing(self.place.store()) as store:
            restore(store, output, clock=SystemClock(), overwrite=True, integrity_check="full")
        return rows_of(output)


@pytest.fixture
def deploy(fleet: Workers, tmp_path: Path, place: Place) -> Deploy:
    return Deploy(fleet, tmp_path, place)


@BOTH
@pytest.mark.parametrize("end", ["close", "SIGTERM"])
def test_the_old_instance_hands_over(deploy: Deploy, end: str) -> None:
    """The new one restores beforehand, waits, catches up with what the old one wrote meanwhile, and
    goes on: not one commit is lost, and nothing is sent twice."""
    old = deploy.instance("old")
    old.run("insert(20, 3000); sync()")
    new = deploy.successor("new")
    assert "restored from" in new.log()
    prefetched = rows_of(deploy.path("new"))
    old.run("write(0.002)")
    old.wait_committed(60)
    if end == "close":
        old.run("stop()")
        old.run("close()")
    else:
        old.run("stop()")
        old.begin("insert(20)")
        old.terminate()
        assert old.wait() == 0
    new.end()
    written = set(old.committed)
    assert len(written) > len(prefetched) > 0
    assert rows_of(deploy.path("new")) == written
    assert "caught up with the replica" in new.log()
    new.run("insert(3); sync()")
    assert deploy.restored() == rows_of(deploy.path("new")) == deploy.fleet.committed()
    assert "full copy" not in new.log()


def test_one_after_the_other(deploy: Deploy) -> None:
    """Several deploys in a row, each on an empty disk, under writing."""
    serving = deploy.instance("first")
    serving.run("write(0.002)")
    for number in range(3):
        serving.wait_committed(20)
        new = deploy.successor(f"next-{number}")
        serving.run("stop()")
        serving.run("close()")
        new.end()
        new.run("write(0.002)")
        serving = new
    serving.wait_committed(20)
    serving.run("stop()")
    serving.run("close()")
    assert deploy.restored() == rows_of(serving.path) == deploy.fleet.committed()


def test_a_new_instance_with_several_workers(deploy: Deploy) -> None:
    """All workers of the new instance wait, and none reads the file while it is brought up to date;
    those of the old one close one by one."""
    old = [deploy.instance("old") for _ in range(2)]
    for worker in old:
        worker.run("insert(10, 3000); sync()")
    new = [deploy.instance("new", opened=False, fence_wait=60.0) for _ in range(3)]
    for worker in new:
        worker.begin("open(); db.execute('SELECT count(*) FROM rows').fetchall()[0][0]")
    while not any("waiting for " in worker.log() for worker in new):
        time.sleep(0.02)
    for worker in old:
        worker.run("insert(10, 3000); close()")
        worker.finish()
    assert [worker.end() for worker in new] == [40, 40, 40]
    for worker in new:
        worker.run("insert()")
    new[0].run("sync()")
    assert deploy.restored() == deploy.fleet.committed()


@BOTH
def test_a_hanging_old_instance(deploy: Deploy) -> None:
    """It neither ends nor writes: the lease's end decides, and later it finds itself fenced."""
    old = deploy.instance("old", fence_lease=2.0, durability="replica")
    old.run("insert(5)")
    new = deploy.successor("new", fence_lease=2.0)
    old.run("insert(5)")
    old.pause()
    new.end()
    assert rows_of(deploy.path("new")) == set(old.committed)
    new.run("insert(); sync()")
    old.resume()
    with pytest.raises(WorkerError) as caught:
        old.run("insert()")
    assert caught.value.kind == "FencedError"
    assert str(deploy.path("new")) in caught.value.text
    new.run("insert(); sync()")
    assert deploy.restored() == rows_of(deploy.path("new")) == deploy.fleet.committed()


def test_the_new_instance_gives_up(deploy: Deploy) -> None:
    """The old one goes on for longer than fence-wait: the new one is told, and harms nothing."""
    old = deploy.instance("old")
    old.run("insert(5); sync()")
    new = deploy.instance("new", opened=False, fence_wait=0.5)
    with pytest.raises(WorkerError) as caught:
        new.run("open()")
    assert caught.value.kind == "FencedError"
    old.run("insert(5); sync()")
    with pytest.raises(WorkerError):
        new.run("open()")
    old.run("insert(5); close()")
    new.run("open(); insert(); sync()")  # the same process may try again
    assert deploy.restored() == rows_of(deploy.path("new")) == deploy.fleet.committed()


def test_the_new_instance_dies_while_it_waits(deploy: Deploy) -> None:
    """Killed before it had the lease, then started again on the same disk."""
    old = deploy.instance("old")
    old.run("insert(5); sync()")
    deploy.successor("new").kill()
    old.run("insert(5); sync()")
    new = deploy.successor("new")
    old.run("insert(5); close()")
    new.end()
    new.run("insert(); sync()")
    assert deploy.restored() == rows_of(deploy.path("new")) == deploy.fleet.committed()


def test_killed_while_it_catches_up(deploy: Deploy) -> None:
    """A half-written file is never opened as it is: the next start restores it."""
    old = deploy.instance("old")
    old.run("insert(5, 3000); sync()")
    new = deploy.instance("new", opened=False, fence_wait=60.0)
    new.run(
        "import walship.replica.catchup as catchup; real = catchup._apply; calls = []\n"
        "def apply(*arguments):\n"
        "    if len(calls) == 3:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    calls.append(0)\n"
        "    return real(*arguments)\n"
        "catchup._apply = apply\n"
    )
    new.begin("open()")
    while "waiting for " not in new.log():
        time.sleep(0.02)
    for _ in range(6):
        old.run("insert(1, 9000); sync()")
    old.run("close()")
    new.wait()
    assert "caught up" not in new.log()
    again = deploy.instance("new")
    assert rows_of(deploy.path("new")) == set(old.committed)
    again.run("insert(); sync()")
    assert deploy.restored() == rows_of(deploy.path("new")) == deploy.fleet.committed()
