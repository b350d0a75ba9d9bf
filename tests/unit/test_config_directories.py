"""Entries of a configuration file for whole directories."""

from __future__ import annotations

import contextlib
from pathlib import Path

import apsw
import pytest

from walship.replica.config.sources import DatabaseSettings, Settings, load_config
from walship.replica.errors import ConfigError
from walship.replica.store.settings import LocalSettings, S3Settings

TENANTS = """
busy-timeout: 2s
dbs:
  - dir: ROOT/tenants
    pattern: "*.db"
    recursive: true
    replica: s3://bucket/backup?region=eu
"""


def load(root: Path, text: str) -> Settings:
    """The settings of a file with this text; ROOT in it is the test's directory."""
    file = root / "walship.yml"
    file.write_text(text.replace("ROOT", str(root)))
    return load_config(file, environ={})


def make_database(path: Path) -> Path:
    """A small database."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.execute("create table t(x)")
    return path


def key_prefix(database: DatabaseSettings | None) -> str:
    """Where in the bucket its replica lies."""
    assert database is not None
    assert database.replica is not None
    assert isinstance(database.replica.store, S3Settings)
    return database.replica.store.path


def test_the_databases_that_are_there(tmp_path: Path) -> None:
    """Found are SQLite's files whose names fit; each has its own place below the replica's."""
    for name in ("b.db", "a.db", "x/y/c.db"):
        make_database(tmp_path / "tenants" / name)
    make_database(tmp_path / "tenants" / "other.sqlite")
    make_database(tmp_path / "tenants" / ".a.db-walship" / "d.db")
    make_database(tmp_path / "tenants" / ".a.db-litestream" / "e.db")
    (tmp_path / "tenants" / "text.db").write_text("SQLite format 3, not")
    (tmp_path / "tenants" / "empty.db").touch()
    (tmp_path / "tenants" / "link.db").symlink_to(make_database(tmp_path / "elsewhere.db"))
    found = load(tmp_path, TENANTS).all_databases()
    assert [str(each.path.relative_to(tmp_path)) for each in found] == [
        "tenants/a.db",
        "tenants/b.db",
        "tenants/x/y/c.db",
    ]
    assert [key_prefix(each) for each in found] == ["backup/a.db", "backup/b.db", "backup/x/y/c.db"]
    assert found[2].meta_path == tmp_path / "tenants/x/y/.c.db-walship"
    assert found[0].busy_timeout_s == 2.0
    assert found[0].replica is not None
    assert isinstance(found[0].replica.store, S3Settings)
    assert found[0].replica.store.region == "eu"


def test_the_root_directory(tmp_path: Path) -> None:
    """``dir: /`` is a directory like others."""
    settings = load(tmp_path, TENANTS.replace("ROOT/tenants", "/"))
    found = settings.database(tmp_path / "new" / "a.db")
    assert key_prefix(found) == f"backup{tmp_path}/new/a.db"


def test_without_recursion(tmp_path: Path) -> None:
    """Only what lies directly in the directory is meant, unless it says recursive."""
    make_database(tmp_path / "tenants" / "a.db")
    make_database(tmp_path / "tenants" / "x" / "b.db")
    settings = load(tmp_path, TENANTS.replace("recursive: true", "recursive: false"))
    assert [each.path.name for each in settings.all_databases()] == ["a.db"]
    assert settings.database(tmp_path / "tenants" / "x" / "b.db") is None


def test_a_path_that_does_not_exist_yet(tmp_path: Path) -> None:
    """Asked about a path, the entry answers before there is a file, or even the directory."""
    settings = load(tmp_path, TENANTS)
    assert key_prefix(settings.database(tmp_path / "tenants" / "new" / "n.db")) == "backup/new/n.db"
    for other in ("tenants/new.db-wal", "tenants/new.sqlite", "new.db", "tenants", "tenants.db"):
        assert settings.database(tmp_path / other) is None
    assert settings.all_databases() == []


def test_a_path_through_a_link(tmp_path: Path) -> None:
    """A database is the same by each of its names, and so is a directory."""
    (tmp_path / "real").mkdir()
    (tmp_path / "tenants").symlink_to("real")
    make_database(tmp_path / "real" / "a.db")
    settings = load(tmp_path, TENANTS)
    for name in ("real/a.db", "tenants/a.db", "tenants/../real/a.db"):
        assert key_prefix(settings.database(tmp_path / name)) == "backup/a.db"
    assert [each.path for each in settings.all_databases()] == [tmp_path / "real" / "a.db"]


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [
        ("*", ["a", "a.db", ".b"], []),
        ("*.db", ["a.db", ".db"], ["a.db-wal", "a.DB"]),
        ("tenant-?.db", ["tenant-1.db"], ["tenant-10.db"]),
        ("[a-c]*.db", ["a.db", "bb.db"], ["d.db"]),
        ("[^a-c]*.db", ["d.db", "^.db"], ["a.db"]),
        ("a+(b).db", ["a+(b).db"], ["aa.db"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, fits: list[str], does_not: list[str]) -> None:
    """Patterns are those of Litestream, for the name alone."""
    settings = load(tmp_path, TENANTS.replace('"*.db"', f"'{pattern}'"))
    for name in fits:
        assert settings.database(tmp_path / "tenants" / name) is not None, name
    for name in does_not:
        assert settings.database(tmp_path / "tenants" / name) is None, name


def test_local_state_elsewhere(tmp_path: Path) -> None:
    """meta-dir (or meta-path) holds the state of all, in directories like theirs."""
    for key in ("meta-dir", "meta-path"):
        settings = load(tmp_path, TENANTS + f"    {key}: /state\n")
        database = settings.database(tmp_path / "tenants" / "x" / "a.db")
        assert database is not None
        assert database.meta_path == Path("/state/x/.a.db-walship")


def test_at_the_top_of_a_bucket_and_in_a_directory(tmp_path: Path) -> None:
    """A replica without a path holds them at its top; one in a directory, in directories."""
    top = load(tmp_path, TENANTS.replace("bucket/backup", "bucket"))
    assert key_prefix(top.database(tmp_path / "tenants" / "x" / "a.db")) == "x/a.db"
    local = load(tmp_path, TENANTS.replace("s3://bucket/backup?region=eu", "file:///r"))
    database = local.database(tmp_path / "tenants" / "x" / "a.db")
    assert database is not None
    assert database.replica is not None
    assert database.replica.store == LocalSettings(path=Path("/r/x/a.db"))


def test_an_entry_of_its_own_wins(tmp_path: Path) -> None:
    """A database that is named is not also one of its directory's."""
    special = make_database(tmp_path / "tenants" / "special.db")
    text = TENANTS + "  - {path: ROOT/tenants/special.db, replica: s3://other/place}\n"
    settings = load(tmp_path, text)
    assert key_prefix(settings.database(special)) == "place"
    assert [key_prefix(each) for each in settings.all_databases()] == ["place"]


def test_two_patterns_for_one_directory(tmp_path: Path) -> None:
    """A database that fits two entries is one database, by the first."""
    make_database(tmp_path / "tenants" / "a.db")
    text = TENANTS + "  - {dir: ROOT/tenants, pattern: 'a*', replica: s3://bucket/second}\n"
    assert [key_prefix(each) for each in load(tmp_path, text).all_databases()] == ["backup/a.db"]


def test_two_databases_with_one_replica(tmp_path: Path) -> None:
    """Directories may share a replica as long as no two databases in them do."""
    make_database(tmp_path / "tenants" / "a.db")
    text = (
        TENANTS + "  - {dir: ROOT/more, pattern: '*.db', replica: 's3://bucket/backup?region=eu'}\n"
    )
    settings = load(tmp_path, text)
    make_database(tmp_path / "more" / "b.db")
    assert len(settings.all_databases()) == 2
    make_database(tmp_path / "more" / "a.db")
    with pytest.raises(ConfigError, match="have the same replica"):
        settings.all_databases()
