"""``walship.configure`` with a file: connections find their replica by path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import WAIT_S
from walship.vfs import connection as front
from walship.vfs.registry import registry


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test configures ends with it; nothing comes from the environment."""
    for name in ("WALSHIP_CONFIG", "LITESTREAM_CONFIG", "WALSHIP_REPLICA"):
        monkeypatch.delenv(name, raising=False)
    settings, directories = dict(registry._settings), dict(registry._directories)
    yield
    registry._settings, registry._directories = settings, directories


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file for one database and a directory of others."""
    file = tmp_path / "walship.yml"
    file.write_text(
        f"sync-interval: 0s\n"
        f"dbs:\n"
        f"  - path: {tmp_path}/app.db\n"
        f"    replica: file://{tmp_path}/replica/app\n"
        f"  - dir: {tmp_path}/tenants\n"
        f"    pattern: '*.db'\n"
        f"    recursive: true\n"
        f"    replica: file://{tmp_path}/replica/tenants\n"
    )
    (tmp_path / "tenants" / "eu").mkdir(parents=True)
    return file


def commit(path: Path, row: int) -> None:
    """Commit a row through the VFS and wait for the replica to have it."""
    with walship.connect(path) as db:
        db.execute("create table if not exists t(x)")
        db.execute("insert into t values(?)", (row,))
    walship.replication(db).sync(WAIT_S)
    db.close()


def rows(replica: Path, output: Path) -> list[int]:
    """What a restore of the replica holds."""
    walship.restore(replica, output, overwrite=True)
    db = apsw.Connection(str(output))
    found = [x for (x,) in db.execute("select x from t order by x")]
    db.close()
    return found


def test_connections_find_their_replica_by_path(config: Path, tmp_path: Path) -> None:
    """A database with an entry, and new ones in a directory, without a word about replicas."""
    walship.configure(config)
    for number, name in enumerate(("app.db", "tenants/a.db", "tenants/eu/b.db")):
        commit(tmp_path / name, number)
    out = tmp_path / "out.db"
    assert rows(tmp_path / "replica/app", out) == [0]
    assert rows(tmp_path / "replica/tenants/a.db", out) == [1]
    assert rows(tmp_path / "replica/tenants/eu/b.db", out) == [2]


def test_a_plain_connection_through_the_vfs(config: Path, tmp_path: Path) -> None:
    """``apsw.Connection(path, vfs="walship")`` replicates a database of a directory too, but no
    other file in it."""
    walship.configure(config)
    db = apsw.Connection(str(tmp_path / "tenants" / "a.db"), vfs="walship")
    db.pragma("journal_mode", "wal")
    db.execute("create table t(x); insert into t values(7)")
    walship.replication(db).sync(WAIT_S)
    db.execute("attach ? as other", (str(tmp_path / "tenants" / "b.txt"),))
    db.execute("create table other.t(x)")
    db.close()
    assert rows(tmp_path / "replica/tenants/a.db", tmp_path / "out.db") == [7]
    assert [path.name for path in (tmp_path / "replica/tenants").iterdir()] == ["a.db"]


def test_a_database_of_a_directory_comes_back(config: Path, tmp_path: Path) -> None:
    """A file that is missing is restored from its own replica when it is opened."""
    walship.configure(config)
    path = tmp_path / "tenants" / "a.db"
    commit(path, 1)
    path.unlink()
    for left in path.parent.glob(".a.db-walship/*"):
        left.unlink()
    commit(path, 2)
    assert rows(tmp_path / "replica/tenants/a.db", tmp_path / "out.db") == [1, 2]


def test_without_arguments(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the one of the variable, else the one in the working directory."""
    monkeypatch.chdir(tmp_path)
    walship.configure()
    assert registry.settings_for(str(tmp_path / "app.db")) is not None
    registry._settings.clear()
    monkeypatch.chdir("/")
    monkeypatch.setenv("WALSHIP_CONFIG", str(config))
    walship.configure()
    assert registry.settings_for(str(tmp_path / "app.db")) is not None


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none the error says where it was looked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(front, "find_config", lambda: None)
    with pytest.raises(walship.ConfigError, match=r"looked for: walship.yml, /etc/walship.yml"):
        walship.configure()


def test_what_does_not_go_with_a_file(config: Path, tmp_path: Path) -> None:
    """Settings of a database beside a file would have no effect: an error."""
    with pytest.raises(walship.ConfigError, match="sync_interval: settings of databases belong"):
        walship.configure(config, sync_interval=1)
    with pytest.raises(walship.ConfigError, match="which database"):
        walship.configure(replica="file:///r")
    config.write_text(config.read_text() + "nonsense: 1\n")
    walship.configure(config)
    with pytest.raises(walship.ConfigError, match="unknown setting 'nonsense'"):
        walship.configure(config, strict=True)


def test_all_or_none(config: Path, tmp_path: Path) -> None:
    """A file that does not fit what is open changes nothing."""
    db = walship.connect(tmp_path / "late.db", tmp_path / "replica" / "late")
    config.write_text(
        config.read_text() + f"  - {{path: {tmp_path}/late.db, replica: {tmp_path}/other}}\n"
    )
    with pytest.raises(walship.ConfigError, match="close it before"):
        walship.configure(config)
    assert registry.settings_for(str(tmp_path / "app.db")) is None
    assert registry.settings_for(str(tmp_path / "tenants" / "a.db")) is None
    db.close()


def test_a_file_read_again(config: Path, tmp_path: Path) -> None:
    """What changed in it holds for connections that are opened from then on."""
    walship.configure(config)
    config.write_text(config.read_text().replace("replica/tenants", "replica/moved"))
    walship.configure(config)
    commit(tmp_path / "tenants" / "a.db", 3)
    assert rows(tmp_path / "replica/moved/a.db", tmp_path / "out.db") == [3]
    assert not (tmp_path / "replica/tenants").exists()
