"""``walship replicate`` beside programs that know nothing of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import Stores, dump
from support.sidecars import create, execute, replicating, wait_until, writer
from walship.cli import main
from walship.replica.config.sources import database_settings
from walship.replica.engine import Engine
from walship.replica.errors import ContinuityError
from walship.sidecar.control import ControlError, call
from walship.sidecar.database import Sidecar
from walship.sidecar.program import once
from walship.sidecar.service import Service
from walship.sidecar.worker import Worker

#: What is said when a full copy, or a comparison of all pages, was needed.
_BROKEN = ("full copy", "resync", "changed while", "lost", "foreign")


def _sidecar(path: Path, replica: Path) -> Sidecar:
    return Sidecar(database_settings(path, {"path": str(replica), "sync_interval": 0.0}))


def _restored(replica: Path, output: Path) -> Path:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{output}{suffix}").unlink(missing_ok=True)
    walship.restore(str(replica), output)
    return output


def _assert_same(path: Path, replica: Path) -> None:
    assert dump(_restored(replica, path.with_suffix(".restored"))) == dump(path)


@pytest.mark.parametrize("checkpoints", ["-", "PASSIVE", "RESTART", "TRUNCATE"])
def test_writers_and_checkpointers(checkpoints: str, tmp_path: Path) -> None:
    """Whatever others write, open, close and checkpoint: nothing is missed or copied anew."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    with replicating(path, replica, log=log) as running:
        running.wait_for("full copy as txid")
        writers = [writer(path, who, 2.5, checkpoints) for who in ("a", "b", "c")]
        assert [each.wait(60) for each in writers] == [0, 0, 0]
        assert running.end() == 0
        said = running.said()
    assert said.count("full copy") == 1, said
    assert not any(word in said.replace("full copy", "", 1) for word in _BROKEN), said
    _assert_same(path, replica)


def test_the_wal_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The WAL is begun anew although nobody but the sidecar checkpoints."""
    monkeypatch.setattr("walship.sidecar.database._HOLD_S", 0.0)
    path = tmp_path / "app.db"
    create(path)
    sidecar = _sidecar(path, tmp_path / "replica")
    try:
        plain = apsw.Connection(str(path), vfs="unix")
        plain.wal_autocheckpoint(0)
        plain.set_busy_timeout(5000)
        longest = 0
        for n in range(6000):
            plain.execute("INSERT INTO rows VALUES ('a', ?, randomblob(500))", (n,))
            if n % 50 == 0:
                sidecar.poll()
                longest = max(longest, os.stat(f"{path}-wal").st_size)
        plain.close()
        assert sidecar.drain(20)
        status = sidecar.engine.status()
        assert status.replicated_txid == status.txid
    finally:
        sidecar.close()
    # 6,000 commits are 6,000 frames or more: 24 MB.
    assert longest < 8_000_000
    _assert_same(path, tmp_path / "replica")


def test_nobody_else_can_restart_the_wal(tmp_path: Path) -> None:
    """Between two looks: commits, a checkpoint that would restart the WAL, and commits again."""
    path = tmp_path / "app.db"
    create(path)
    sidecar = _sidecar(path, tmp_path / "replica")
    try:
        sidecar.sync(10)
        plain = apsw.Connection(str(path), vfs="unix")
        for mode in (apsw.SQLITE_CHECKPOINT_RESTART, apsw.SQLITE_CHECKPOINT_TRUNCATE):
            for n in range(3):
                plain.execute("INSERT INTO rows VALUES (?, ?, randomblob(5000))", (mode, n))
                before = Path(f"{path}-wal").read_bytes()[16:24]
                for _ in range(2):
                    with pytest.raises(apsw.BusyError):
                        plain.wal_checkpoint(mode=mode)
                    plain.execute("INSERT INTO rows VALUES (?, ?, NULL)", (mode, -n))
                assert Path(f"{path}-wal").read_bytes()[16:24] == before
                if n == 1:
                    sidecar.poll()
        plain.close()
        assert sidecar.drain(20)
    finally:
        sidecar.close()
    _assert_same(path, tmp_path / "replica")


_CHECKPOINTER = """
import sqlite3, sys
path, who, mode, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
db = sqlite3.connect(path, timeout=30, isolation_level=None)
for n in range(rounds):
    for _ in range(1 + n % 3):
        db.execute("INSERT INTO rows VALUES (?, ?, randomblob(9000))", (who, n))
    busy, frames, copied = db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
    assert not busy, (n, busy, frames, copied)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="who holds a lock is not to be found out")
@pytest.mark.parametrize("mode", ["FULL", "RESTART", "TRUNCATE"])
def test_checkpoints_of_others_pass(mode: str, tmp_path: Path) -> None:
    """A program that wants the WAL restarted gets that, also beside writers, and history goes on
    with increments."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    with replicating(path, replica, log=log) as running:
        running.wait_for("full copy as txid")
        for rounds, seconds in ((4, 0.0), (5, 1.5)):
            words = [sys.executable, "-c", _CHECKPOINTER, str(path), mode, mode, str(rounds)]
            others = [writer(path, who, seconds) for who in "ab"]
            subprocess.run(words, check=True, timeout=120)
            assert [each.wait(60) for each in others] == [0, 0]
        assert running.end() == 0
        said = running.said()
    assert said.count("full copy") == 1, said
    assert not any(word in said.replace("full copy", "", 1) for word in (*_BROKEN, "compared")), (
        said
    )
    _assert_same(path, replica)


@pytest.mark.skipif(sys.platform != "linux", reason="who holds a lock is not to be found out")
def test_checkpoints_of_both_kinds_of_programs(tmp_path: Path) -> None:
    """One restarts the WAL through its own gate, and others write to it that have none."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    with replicating(path, replica, log=log) as running:
        running.wait_for("full copy as txid")
        db = walship.connect(path, str(replica), busy_timeout=30)
        for n in range(6):
            db.execute("INSERT INTO rows VALUES ('vfs', ?, randomblob(5000))", (n,))
            mode = apsw.SQLITE_CHECKPOINT_TRUNCATE if n % 2 else apsw.SQLITE_CHECKPOINT_RESTART
            db.wal_checkpoint(mode=mode)
            execute(path, "INSERT INTO rows VALUES ('plain', ?, randomblob(5000))", n)
        walship.replication(db).sync(20)
        db.close()
        assert running.end() == 0
        said = running.said()
    assert said.count("full copy") == 1, said
    assert "compared" not in said, said
    _assert_same(path, replica)


#: What happens to the WAL while nothing replicates, and how: each "write" is a commit that changes
#: so many pages, "restart" a checkpoint after which the next commit begins the WAL anew.
_HOLES = {
    # What was not seen lies behind the last frame that was, in the part that stays as it is.
    "one restart": ["write 6", "restart", "write 1"],
    # Nothing is left of the WAL in which it was.
    "two restarts": ["restart", "write 3", "restart", "write 9"],
    "a rewritten WAL": ["restart", "write 2", "restart", "write 2"],
}
_AWAY = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA wal_autocheckpoint = 0")
n = 0
for step in sys.argv[2:]:
    if step == "restart":
        assert db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
    else:
        count = int(step.split()[1])
        where = "n >= ? AND n < ?"
        db.execute(f"UPDATE rows SET b = randomblob(3900) WHERE {where}", (n, n + count))
        n += count
os._exit(0)  # a close would remove the WAL
"""


@pytest.mark.parametrize("steps", _HOLES.values(), ids=_HOLES)
def test_what_happens_while_nothing_replicates(steps: list[str], tmp_path: Path) -> None:
    """Killed, and the WAL restarted meanwhile: the two ways in which Litestream loses commits.

    It goes on with increments then, and its replica lacks what came in between.
    """
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    with replicating(path, replica, log=log) as running:
        running.wait_for("full copy as txid")
        many = "WITH RECURSIVE m (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM m WHERE n < 30)"
        execute(path, f"INSERT INTO rows {many} SELECT 'seen', n, randomblob(3900) FROM m")
        wait_until(lambda: len(list((replica / "ltx" / "0").glob("*.ltx"))) >= 2, running.said)
        running.kill()
    subprocess.run([sys.executable, "-c", _AWAY, path, *steps], check=True, timeout=60)
    with replicating(path, replica, log=log) as running:
        running.wait_for("at txid", 2)
        execute(path, "INSERT INTO rows VALUES ('later', 1, NULL)")
        assert running.end() == 0
    _assert_same(path, replica)


def test_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL under load, and checkpoints by others meanwhile: the replica is whole again."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    writers = [writer(path, who, 8, mode) for who, mode in (("a", "-"), ("b", "TRUNCATE"))]
    for count in range(1, 5):
        with replicating(path, replica, log=log) as running:
            running.wait_for("at txid", count)
            execute(path, "INSERT INTO rows VALUES ('kill', ?, NULL)", count)
            running.kill()
        execute(path, "INSERT INTO rows VALUES ('away', ?, NULL)", count)
    assert [each.wait(60) for each in writers] == [0, 0]
    with replicating(path, replica, log=log) as running:
        running.wait_for("at txid", 5)
        assert running.end() == 0
    _assert_same(path, replica)


def test_beside_an_application_that_uses_walship(tmp_path: Path) -> None:
    """Both have the database open: one of them uploads, and what others commit is seen at once."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    with replicating(path, replica, log=log) as running:
        running.wait_for("full copy as txid")
        db = walship.connect(path, str(replica))
        db.execute("INSERT INTO rows VALUES ('vfs', 1, NULL)")
        execute(path, "INSERT INTO rows VALUES ('plain', 1, NULL)")
        walship.replication(db).sync(20)
        assert not walship.replication(db).status().uploader or running.said()
        running.kill()
        execute(path, "INSERT INTO rows VALUES ('plain', 2, NULL)")
        db.execute("INSERT INTO rows VALUES ('vfs', 2, NULL)")
        walship.replication(db).sync(20)
        db.close()
    _assert_same(path, replica)


def test_once(tmp_path: Path) -> None:
    """-once ships what is there and ends; what cannot be shipped is an exit code and a sentence."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    for n in range(2):
        execute(path, "INSERT INTO rows VALUES ('a', ?, NULL)", n)
        with replicating("-once", path, replica, log=log) as running:
            assert running.wait() == 0, running.said()
        _assert_same(path, replica)
    with replicating("-once", "-force-snapshot", path, replica, log=log) as running:
        assert running.wait() == 0, running.said()
    snapshots = sorted((replica / "ltx" / "9").iterdir())
    assert int(snapshots[-1].name[17:33], 16) >= 2
    _assert_same(path, replica)
    with replicating("-force-snapshot", path, replica, log=log) as running:
        assert running.wait() == 1
        assert "-once" in running.said()
    with replicating("-once", tmp_path / "no.db", tmp_path / "other", log=log) as running:
        assert running.wait() == 1
        assert "no.db" in running.said()
        assert "Traceback" not in running.said()
    assert not (tmp_path / "no.db").exists()


def test_restore_if_the_database_is_missing(tmp_path: Path) -> None:
    """A missing database is restored first, before the command beside it starts."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    execute(path, "INSERT INTO rows VALUES ('a', 1, NULL)")
    with replicating("-once", path, replica, log=log) as running:
        assert running.wait() == 0
    path.unlink()
    program = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], timeout=9);"
        "db.execute('INSERT INTO rows SELECT ?, count(*), NULL FROM rows', ['exec']); db.commit()"
    )
    command = shlex.join([sys.executable, "-c", program, str(path)])
    words = ("-restore-if-db-not-exists", "-exec", command, path, replica)
    with replicating(*words, log=log) as running:
        assert running.wait() == 0, running.said()
    assert execute(path, "SELECT who, n FROM rows ORDER BY who") == [("a", 1), ("exec", 1)]
    _assert_same(path, replica)


def test_a_database_that_appears_later(tmp_path: Path) -> None:
    """A database that is not there yet is waited for."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    with replicating(path, replica, log=log) as running:
        running.wait_for("waiting for it")
        create(path)
        running.wait_for("full copy as txid")
        assert running.end(signal.SIGINT) == 0
    _assert_same(path, replica)


def test_the_command_beside_it(tmp_path: Path) -> None:
    """-exec: its exit code is passed on, and so is the signal that ends both."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    failing = f"{sys.executable} -c 'raise SystemExit(7)'"
    with replicating("-exec", failing, path, replica, log=log) as running:
        assert running.wait() == 7
    waiting = (
        f"{sys.executable} -c 'import signal, sys, time;"
        ' signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("child: ended", flush=True)));'
        ' print("child: ready", flush=True); time.sleep(60)\''
    )
    with replicating("-exec", waiting, path, replica, log=log) as running:
        running.wait_for("child: ready")
        execute(path, "INSERT INTO rows VALUES ('late', 1, NULL)")
        assert running.end() == 0
        assert "child: ended" in running.said()
    with replicating("-exec", "no-such-program-anywhere", path, replica, log=log) as running:
        assert running.wait() == 1
        assert "no-such-program-anywhere" in running.said()
        assert "Traceback" not in running.said()
    _assert_same(path, replica)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """The first signal waits for the command; the second waits for nothing."""
    path, log = tmp_path / "app.db", tmp_path / "log"
    create(path)
    stubborn = (
        f"{sys.executable} -c 'import os, signal, time;"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        ' print("child:", os.getpid(), flush=True); time.sleep(60)\''
    )
    with replicating("-exec", stubborn, path, tmp_path / "replica", log=log) as running:
        running.wait_for("child:")
        os.kill(running.pid, signal.SIGTERM)
        running.wait_for("waiting for the command")
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait() == 128 + signal.SIGTERM
        child = int(running.said().partition("child: ")[2].split()[0])
        os.kill(child, signal.SIGKILL)


def test_directories_and_reloading(tmp_path: Path) -> None:
    """New databases in a watched directory are taken up; SIGHUP reads the file again."""
    directory, log = tmp_path / "tenants", tmp_path / "log"
    directory.mkdir()
    create(directory / "one.db")
    create(tmp_path / "alone.db")
    config = tmp_path / "walship.yml"
    entry = f"dbs:\n  - dir: {directory}\n    pattern: '*.db'\n    watch: true\n"
    entry += f"    replica: {{type: file, path: {tmp_path}/replicas}}\n"
    config.write_text(entry)
    with replicating("-config", config, log=log) as running:
        running.wait_for("full copy as txid")
        create(directory / "two.db")
        running.wait_for("full copy as txid", 2)
        alone = f"  - path: {tmp_path}/alone.db\n    replica: {{path: {tmp_path}/alone-replica}}\n"
        config.write_text("logging: {type: json}\nexec: date\ndbs:\n" + alone)
        os.kill(running.pid, signal.SIGHUP)
        running.wait_for('"msg": "the configuration was read again"')
        assert "exec: what was changed there takes effect at the next start" in running.said()
        running.wait_for("full copy as txid", 3)
        running.wait_for("not replicated any more", 2)
        config.write_text("dbs: 5\n")
        os.kill(running.pid, signal.SIGHUP)
        running.wait_for("the old one stays")
        assert running.end() == 0
    _assert_same(directory / "two.db", tmp_path / "replicas" / "two.db")
    _assert_same(tmp_path / "alone.db", tmp_path / "alone-replica")


def test_the_control_socket(tmp_path: Path) -> None:
    """Litestream's requests and answers, and the commands that send them."""
    path, other, log = tmp_path / "app.db", tmp_path / "other.db", tmp_path / "log"
    socket = str(tmp_path / "s")
    create(path)
    create(other)

    def walship_command(*words: object) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "walship.cli", *map(str, words), "-socket", socket],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout or done.stderr

    code, said = walship_command("stop", path)
    assert code == 1
    assert "is `walship replicate` running" in said
    with replicating("-socket", socket, path, tmp_path / "replica", log=log) as running:
        running.wait_for("full copy as txid")
        assert os.stat(socket).st_mode & 0o777 == 0o600
        execute(path, "INSERT INTO rows VALUES ('a', 1, NULL)")
        code, said = walship_command("sync", "-wait", "-json", path)
        answer = json.loads(said)
        assert (code, answer["path"]) == (0, str(path))
        assert answer["txid"] == answer["replicated_txid"] >= 2
        assert call(socket, "GET", f"/txid?path={path}", None, 9)["txid"] == answer["txid"]
        waited = call(socket, "POST", "/wait", {"path": str(path), "txid": answer["txid"]}, 9)
        assert waited["replicated_txid"] == answer["txid"]
        with pytest.raises(ControlError, match="not in") as late:
            body = {"path": str(path), "txid": 10_000, "timeout": 0.1}
            call(socket, "POST", "/wait", body, 9)
        assert late.value.status == 504

        assert "registered" in walship_command("register", "-replica", tmp_path / "r2", other)[1]
        assert "already" in walship_command("register", "-replica", tmp_path / "r2", other)[1]
        running.wait_for("full copy as txid", 2)
        listed = call(socket, "GET", "/list", None, 9)["databases"]
        assert [row["path"] for row in listed] == [str(path), str(other)]
        wait_until(
            lambda: (
                {row["status"] for row in call(socket, "GET", "/list", None, 9)["databases"]}
                == {"replicating"}
            ),
            running.said,
        )
        assert "stopped" in walship_command("stop", other)[1]
        assert "already_stopped" in walship_command("stop", other)[1]
        code, said = walship_command("sync", "-wait", other)
        assert (code, "stopped" in said) == (1, True)
        assert "started" in walship_command("start", other)[1]
        assert "would_be_unregistered" in walship_command("unregister", "-dry-run", other)[1]
        code, said = walship_command("unregister", "-dry-run", "-json", tmp_path / "no.db")
        assert json.loads(said)["status"] == "already_unregistered"
        assert len(call(socket, "GET", "/list", None, 9)["databases"]) == 2
        assert "unregistered" in walship_command("unregister", other)[1]
        assert "already_unregistered" in walship_command("unregister", other)[1]
        assert "[replicating]" in walship_command("list")[1]
        assert f"pid: {running.pid}" in walship_command("info")[1]
        info = call(socket, "GET", "/info", None, 9)
        assert (info["pid"], info["database_count"]) == (running.pid, 1)
        for method, target, body, status in (
            ("POST", "/sync", {"path": "/no/such.db"}, 404),
            ("POST", "/sync", {}, 400),
            ("POST", "/wait", {"path": str(path), "txid": "7"}, 400),
            ("POST", "/register", {"path": "/x.db", "replica_url": "ftp://x"}, 400),
            ("GET", "/nothing", None, 404),
            ("POST", "/list", {}, 404),
        ):
            with pytest.raises(ControlError) as refused:
                call(socket, method, target, body, 9)
            assert refused.value.status == status, (target, str(refused.value))
        with replicating("-socket", socket, other, tmp_path / "r3", log=tmp_path / "l2") as second:
            assert second.wait() == 1
            assert "another process answers" in second.said()
        assert running.end() == 0
    assert not os.path.exists(socket)


def test_trouble_ends_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with one database, it is tried again."""
    path, replica = tmp_path / "app.db", tmp_path / "replica"
    create(path)
    real, calls = Sidecar.poll, []

    def poll(self: Sidecar) -> bool:
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError("on purpose")
        return real(self)

    monkeypatch.setattr(Sidecar, "poll", poll)
    monkeypatch.setattr("walship.sidecar.worker._REFUSED_S", 0.05)
    service = Service()
    service.set([database_settings(path, {"path": str(replica), "sync_interval": 0.0})])
    (worker,) = service.workers()
    wait_until(lambda: len(calls) > 1, lambda: worker.state)
    execute(path, "INSERT INTO rows VALUES ('a', 1, NULL)")
    assert worker.sidecar().sync(20) >= 1
    assert (worker.state, worker.error) == ("replicating", None)
    assert service.close()
    _assert_same(path, replica)


def _one(path: Path, replica: Path, **settings: object) -> Service:
    """A service for one database, whose first copy has arrived."""
    service = Service()
    service.set([database_settings(path, str(replica), sync_interval=0.0, **settings)])
    (worker,) = service.workers()
    assert worker.wait_opened(30)
    worker.sidecar().sync(20)
    return service


def test_the_last_uploads_have_one_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """shutdown-sync-timeout is for all that is waited for, or whoever stops it would kill it."""
    stores = Stores(monkeypatch)
    path = tmp_path / "app.db"
    create(path)
    service = _one(path, tmp_path / "replica", shutdown_sync_timeout=0.5)
    stores.block()
    execute(path, "INSERT INTO rows VALUES ('a', 1, NULL)")
    limits: list[float] = []
    drain = Engine.drain
    monkeypatch.setattr(
        Engine, "drain", lambda self, timeout: (limits.append(timeout), drain(self, timeout))[1]
    )
    assert not service.close()
    stores.release()
    assert 0.0 < limits[0] <= 0.5
    assert sum(limits) <= 0.5
    assert len(limits) == 2


def test_the_last_uploads_in_one_attempt(tmp_path: Path) -> None:
    """shutdown-sync-timeout: 0 is one attempt, as with Litestream, and not none."""
    path = tmp_path / "app.db"
    create(path)
    service = _one(path, tmp_path / "replica", shutdown_sync_timeout=0)
    execute(path, "INSERT INTO rows VALUES ('a', 1, NULL)")
    assert service.close()
    _assert_same(path, tmp_path / "replica")


def test_once_does_not_wait_for_a_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-once, with nothing but trouble, ends with it, and does not take five minutes."""
    monkeypatch.setattr("walship.sidecar.program._TROUBLE_S", 0.5)
    path, replica = tmp_path / "app.db", tmp_path / "replica"
    create(path)
    replica.write_text("a file where the directory should be")
    database = database_settings(path, str(replica), open_timeout=0, shutdown_sync_timeout=0)
    assert once(Service(), [database], snapshot=False, tend=False) == 1


def test_refusals_are_tried_again_less_and_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes a person to mend costs few requests meanwhile, and goes on once it is mended."""
    path, other, replica = tmp_path / "app.db", tmp_path / "other.db", tmp_path / "replica"
    for each in (path, other):
        create(each)
    assert _one(path, replica).close()
    execute(other, "INSERT INTO rows VALUES ('other', 1, NULL)")
    pauses: list[float] = []
    refused_s = Worker._refused_s
    monkeypatch.setattr(
        Worker, "_refused_s", lambda self: (pauses.append(refused_s(self)), 0.05)[1]
    )
    service = Service()
    service.set([database_settings(other, str(replica), sync_interval=0.0)])
    (worker,) = service.workers()
    wait_until(lambda: len(pauses) >= 5, lambda: worker.state)
    assert pauses[:5] == [10, 20, 40, 60, 60]
    assert isinstance(worker.error, ContinuityError)
    wait_until(lambda: main(["reset", str(other)]) == 0, lambda: worker.state)
    wait_until(lambda: worker.state == "replicating", lambda: str(worker.error))
    assert worker.sidecar().sync(20) > 1
    assert service.close()
    _assert_same(other, replica)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("app.db",), "where to?"),
        (("app.db", "s3://bucket/x", "-config", "w.yml"), "exclude each other"),
        (("app.db", "ftp://x/y"), "ftp"),
        ((), "which databases?"),
    ],
)
def test_wrong_arguments(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    """One clear error, and no traceback."""
    with replicating(*words, log=tmp_path / "log") as running:
        assert running.wait() == 1
        assert says in running.said()
        assert "Traceback" not in running.said()


def test_litestream_restores_it(litestream: Path, tmp_path: Path) -> None:
    """The real Litestream reads what the sidecar wrote."""
    path, replica, log = tmp_path / "app.db", tmp_path / "replica", tmp_path / "log"
    create(path)
    with replicating(path, replica, log=log) as running:
        running.wait_for("full copy as txid")
        writer(path, "a", 1.0, "PASSIVE").wait(60)
        assert running.end() == 0
    output = tmp_path / "litestream.db"
    subprocess.run(
        [str(litestream), "restore", "-o", str(output), f"file://{replica}"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert dump(output) == dump(path)
