"""The command line: what it prints where, what it returns, and what its errors say."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.clock import FakeClock
from support.replicas import GOLDEN, golden_copy, manifest, sha256, write_pages
from walship import __version__, cli
from walship.commands import exits
from walship.replica.config import sources as configuration
from walship.replica.errors import ConfigError
from walship.replica.restore_front import parse_time
from walship.replica.verify import Verification, remember

REPOSITORY = Path(__file__).resolve().parents[2]
NOW_MS = 1_800_000_000_000

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's environment decides a test."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "LITESTREAM_", "WALSHIP_", "BUCKET_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(configuration, "CONFIG_PLACES", ("walship.yml",))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def replica(tmp_path: Path) -> str:
    """URL of a directory replica with TXIDs 1 to 19 in several levels."""
    return f"file://{golden_copy('a-4096-levels', tmp_path)}"


def test_a_restore_loads_no_more_than_it_needs(replica: str, tmp_path: Path) -> None:
    """From a directory: no SDK, no YAML, no server, no other command."""
    program = (
        "import sys; from walship.cli import main\n"
        f"code = main(['restore', '-o', {str(tmp_path / 'out.db')!r}, {replica!r}])\n"
        "heavy = {'boto3', 'botocore', 'urllib3', 'yaml', 'http', 'ssl', 'asyncio', 'email',\n"
        "         'tqdm', 'walship.sidecar', 'walship.commands.beside', 'walship.replica.doctor'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "0 []\n", done.stderr


def is_one_line(text: str) -> bool:
    return text.startswith("walship: ") and text.count("\n") == 1


# --- restore -------------------------------------------------------------------------------------


def test_restore_prints_json_only_on_stdout(run: Run, replica: str, tmp_path: Path) -> None:
    """-json gives Litestream's fields (and more) as the only thing on standard output."""
    output = tmp_path / "out.db"
    code, out, _ = run("restore", "-json", "-integrity-check", "full", "-o", output, replica)
    assert code == 0
    result = json.loads(out)
    assert result["db_path"] == str(output)
    assert result["replica"] == "file"
    assert result["txid"] == "0000000000000013"
    assert isinstance(result["duration_ms"], int)
    assert result["integrity_check"] == "full"
    assert sha256(output) == manifest("a-4096-levels")["latest"]["sha256"]


def test_restore_without_json_leaves_stdout_empty(run: Run, replica: str, tmp_path: Path) -> None:
    """The report of a restore is a message, not a result."""
    code, out, err = run("restore", "-o", tmp_path / "out.db", replica)
    assert (code, out) == (0, "")
    assert is_one_line(err)
    assert "TXID 0000000000000013" in err


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_restore_takes_one_dash_or_two(run: Run, replica: str, dashes: str, tmp_path: Path) -> None:
    """Litestream's single-dash flags and the usual spelling mean the same."""
    output = tmp_path / "out.db"
    code, _, _ = run("restore", f"{dashes}txid", "0000000000000007", f"{dashes}o", output, replica)
    assert code == 0
    facts = manifest("a-4096-levels")
    assert sha256(output) == facts["txids"]["0000000000000007"]["sha256"]


def test_restore_by_timestamp(run: Run, replica: str, tmp_path: Path) -> None:
    """A timestamp restores the newest state strictly before it."""
    facts = manifest("a-4096-levels")
    case = next(case for case in facts["timestamp_cases"] if case.get("txid", "").endswith("c"))
    output = tmp_path / "out.db"
    code, _, _ = run("restore", "-timestamp", case["timestamp"], "-o", output, replica)
    assert code == 0
    assert sha256(output) == facts["txids"][case["txid"]]["sha256"]


def test_relative_timestamp_may_begin_with_a_dash(run: Run, replica: str, tmp_path: Path) -> None:
    """ "-15m" is a value, although it looks like an option; nothing is that old here."""
    code, _, err = run("restore", "-timestamp", "-876000h", "-o", tmp_path / "x.db", replica)
    assert code == 3
    assert "holds no state before" in err


def test_restore_from_a_directory(run: Run, replica: str, tmp_path: Path) -> None:
    """The directory of a replica may be named without file://."""
    directory = replica.removeprefix("file://")
    code, _, _ = run("restore", "-o", tmp_path / "out.db", directory)
    assert code == 0


def test_restore_with_a_configuration_file(run: Run, replica: str, tmp_path: Path) -> None:
    """A database of the configuration file is restored to its own path."""
    database = tmp_path / "data" / "app.db"
    config = tmp_path / "walship.yml"
    config.write_text(f"dbs:\n  - path: {database}\n    replica:\n      url: {replica}\n")
    assert run("restore", "-config", config, database)[0] == 0
    assert sha256(database) == manifest("a-4096-levels")["latest"]["sha256"]
    code, _, err = run("restore", "-config", config, tmp_path / "other.db")
    assert code == 1
    assert str(database) in err, "the databases that there are"


def test_the_configuration_file_is_looked_for(
    run: Run, replica: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without -config every command takes the file of the environment or of the directory."""
    database = tmp_path / "app.db"
    config = tmp_path / "walship.yml"
    config.write_text(f"dbs:\n  - path: {database}\n    replica: {replica}\n")
    monkeypatch.chdir(tmp_path)
    assert run("restore", "app.db")[0] == 0
    assert database.exists()
    assert json.loads(run("databases", "-json")[1])[0]["path"] == str(database)
    assert json.loads(run("status", "-json")[1])[0]["replica_txid"] == "0000000000000013"
    assert json.loads(run("status", "-json", database)[1])[0]["replica_txid"] != "-"
    assert json.loads(run("ltx", "-json", database)[1])
    monkeypatch.chdir("/")
    for variable in ("WALSHIP_CONFIG", "LITESTREAM_CONFIG"):
        monkeypatch.setenv(variable, str(config))
        assert run("ltx", database)[0] == 0
        monkeypatch.setenv(variable, str(tmp_path / "none.yml"))
        code, _, err = run("ltx", database)
        assert code == 1
        assert "none.yml: No such file" in err
        monkeypatch.delenv(variable)


def test_a_file_that_was_not_named_is_no_obstacle(
    run: Run, replica: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WALSHIP_REPLICA, a directory and a URL work beside a file that has nothing on them."""
    config = tmp_path / "walship.yml"
    config.write_text(f"dbs:\n  - path: /other.db\n    replica: file://{tmp_path}/r\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = run("restore", "app.db")
    assert code == 1
    assert "is not in walship.yml; it has: /other.db" in err
    assert run("status", "app.db")[0] == 0
    monkeypatch.setenv("WALSHIP_REPLICA", replica)
    assert run("restore", "app.db")[0] == 0
    config.write_text("dbs: [nonsense")
    directory = replica.removeprefix("file://")
    for target in (replica, directory):
        assert run("ltx", target)[0] == 0
    assert run("restore", "-force", "app.db")[0] == 1, "here it may be what is meant"


def test_strict(run: Run, tmp_path: Path) -> None:
    """An unknown key is a warning; -strict makes it an error."""
    config = tmp_path / "walship.yml"
    config.write_text("regoin: eu\ndbs: []\n")
    code, out, err = run("databases", "-json", "-config", config)
    assert (code, json.loads(out)) == (0, [])
    assert "did you mean region?" in err
    code, out, err = run("databases", "-json", "-strict", "-config", config)
    assert (code, out) == (1, "")
    assert "did you mean region?" in err


def test_restore_from_the_environments_replica(
    run: Run, replica: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WALSHIP_REPLICA stands in for a configuration file."""
    monkeypatch.setenv("WALSHIP_REPLICA", replica)
    assert run("restore", tmp_path / "app.db")[0] == 0
    assert (tmp_path / "app.db").exists()


def test_dry_run_prints_litestreams_plan(run: Run, replica: str, tmp_path: Path) -> None:
    """-dry-run names the segments, as text and as JSON, and writes nothing."""
    output = tmp_path / "out.db"
    words = ("restore", "-dry-run", "-txid", "0000000000000011", "-o", output)
    code, out, err = run(*words, "-json", replica)
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert list(plan) == ["source", "target_path", "replica", "min_txid", "max_txid", "files"]
    expected = manifest("a-4096-levels")["plan_for_txid"]["0000000000000011"]
    assert [(f["level"], f["name"]) for f in plan["files"]] == [
        (each["level"], each["name"]) for each in expected
    ]
    assert list(plan["files"][0]) == ["level", "name", "min_txid", "max_txid", "size", "timestamp"]
    code, out, _ = run(*words, replica)
    assert code == 0
    assert "txid range: 0000000000000001 - 0000000000000011" in out
    assert all(each["name"] in out for each in expected)
    assert not output.exists()


def test_if_db_not_exists(run: Run, replica: str, tmp_path: Path) -> None:
    """An existing database is success with -if-db-not-exists, and is left alone."""
    output = tmp_path / "out.db"
    output.write_bytes(b"mine")
    assert run("restore", "-if-db-not-exists", "-o", output, replica)[0] == 0
    assert output.read_bytes() == b"mine"


def test_if_replica_exists(run: Run, tmp_path: Path) -> None:
    """No backup is success with -if-replica-exists, and nothing appears."""
    url = f"file://{tmp_path}/nothing"
    output = tmp_path / "out.db"
    assert run("restore", "-o", output, url)[0] == 3
    code, out, err = run("restore", "-if-replica-exists", "-o", output, url)
    assert (code, out) == (0, "")
    assert is_one_line(err)
    assert not output.exists()


def test_force_replaces(run: Run, replica: str, tmp_path: Path) -> None:
    """-force replaces an existing database; without it that is an error of its own."""
    output = tmp_path / "out.db"
    output.write_bytes(b"mine")
    assert run("restore", "-o", output, replica)[0] == 7
    assert output.read_bytes() == b"mine"
    assert run("restore", "-force", "-o", output, replica)[0] == 0
    assert sha256(output) == manifest("a-4096-levels")["latest"]["sha256"]


# --- exit codes ----------------------------------------------------------------------------------


def damaged(tmp_path: Path) -> list[object]:
    root = GOLDEN / "x-corrupt" / "01-bitflip-page-data" / "replica"
    return ["-o", tmp_path / "out.db", f"file://{root}"]


def unsound(tmp_path: Path) -> list[object]:
    write_pages(tmp_path / "r", 0, 1, 1, 4, range(1, 5))
    return ["-integrity-check", "quick", "-o", tmp_path / "out.db", f"file://{tmp_path}/r"]


def gap(tmp_path: Path) -> list[object]:
    write_pages(tmp_path / "r", 0, 1, 1, 4, range(1, 5))
    write_pages(tmp_path / "r", 1, 3, 9, 4, range(1, 5))
    return ["-o", tmp_path / "out.db", f"file://{tmp_path}/r"]


def unreadable(tmp_path: Path) -> list[object]:
    (tmp_path / "r").symlink_to("r")  # a loop: not absent, but not to be had either
    return ["-o", tmp_path / "out.db", f"file://{tmp_path}/r"]


def existing(tmp_path: Path) -> list[object]:
    (tmp_path / "out.db").write_bytes(b"mine")
    return ["-o", tmp_path / "out.db", f"file://{GOLDEN}/b-512/replica"]


def missing_txid(tmp_path: Path) -> list[object]:
    flags = ["-txid", "00000000000000ff"]
    return [*flags, "-o", tmp_path / "out.db", f"file://{GOLDEN}/b-512/replica"]


def both_targets(tmp_path: Path) -> list[object]:
    flags = ["-txid", "0000000000000001", "-timestamp", "1 hour ago"]
    return [*flags, "-o", tmp_path / "out.db", f"file://{GOLDEN}/b-512/replica"]


def a_pipe(tmp_path: Path) -> list[object]:
    os.mkfifo(tmp_path / "out.db")
    return ["-force", "-o", tmp_path / "out.db", f"file://{GOLDEN}/b-512/replica"]


def a_url(tmp_path: Path) -> list[object]:
    return ["-o", "s3://bucket/app.db", f"file://{GOLDEN}/b-512/replica"]


def too_long(tmp_path: Path) -> list[object]:
    return ["-delta", "-o", tmp_path / ("x" * 300), f"file://{GOLDEN}/b-512/replica"]


def a_loop(tmp_path: Path) -> list[object]:
    (tmp_path / "out.db").symlink_to("out.db")
    return ["-delta", "-o", tmp_path / "out.db", f"file://{GOLDEN}/b-512/replica"]


def no_output(tmp_path: Path) -> list[object]:
    return [f"file://{GOLDEN}/b-512/replica"]


def url_and_config(tmp_path: Path) -> list[object]:
    return ["-config", "x.yml", "-o", "x.db", f"file://{GOLDEN}/b-512/replica"]


def other_scheme(tmp_path: Path) -> list[object]:
    return ["-o", tmp_path / "out.db", "gs://bucket/app.db"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (missing_txid, 3),
        (damaged, 4),
        (unsound, 4),
        (unreadable, 5),
        (gap, 6),
        (existing, 7),
        (both_targets, 1),
        (a_pipe, 1),
        (a_url, 1),
        (too_long, 1),
        (a_loop, 1),
        (no_output, 1),
        (url_and_config, 1),
        (other_scheme, 1),
    ],
)
def test_restore_exit_codes(
    run: Run, arguments: Callable[[Path], list[object]], expected: int, tmp_path: Path
) -> None:
    """Each kind of failure has its documented exit code and one line, and prints no result."""
    code, out, err = run("restore", "-json", *arguments(tmp_path))
    assert (code, out) == (expected, "")
    assert is_one_line(err)


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["restore"],
        ["restore", "-bogus", "x"],
        ["restore", "-parallelism", "0", "-o", "x", "file:///x"],
        ["restore", "-parallelism", "many", "-o", "x", "file:///x"],
        ["restore", "-txid", "7", "-o", "x", "file:///x"],
        ["restore", "-integrity-check", "some", "-o", "x", "file:///x"],
        ["restore", "-f", "-dry-run", "-o", "x", "file:///x"],
        ["restore", "-delta", "-if-db-not-exists", "-o", "x", "file:///x"],
        ["restore", "-f", "-delta", "-o", "x", "file:///x"],
        ["restore", "-f", "-txid", "0000000000000001", "-o", "x", "file:///x"],
        ["restore", "-f", "-follow-interval", "soon", "-o", "x", "file:///x"],
        ["restore", "-f", "-follow-interval", "0", "-o", "x", "file:///x"],
        ["ltx", "-level", "10", "file:///x"],
        ["restore", "app.db"],
        ["databases"],
        ["status"],
        ["status", "x" * 300],
        ["status", "."],
        ["reset", "."],
        ["replicate", "/", "file:///x"],
        ["restore", "-if-db-not-exists", "-o", "x" * 300, "file:///x"],
        ["databases", "-config", "/does/not/exist.yml"],
        ["doctor"],
        ["doctor", "app.db"],
        ["doctor", "s3:///"],
    ],
)
def test_wrong_usage_is_one_line(run: Run, words: list[str]) -> None:
    """Usage errors return 1 with one line that says what is expected."""
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert is_one_line(err)


@pytest.mark.parametrize("name", ["snapshots", "generations", "mcp"])
def test_commands_of_litestream_that_are_elsewhere(run: Run, name: str) -> None:
    """A command somebody knows from Litestream says where its job is done here."""
    code, out, err = run(name, "-config", "x.yml")
    assert (code, out) == (1, "")
    assert is_one_line(err)
    assert "walship" in err.removeprefix("walship: ")


def test_every_exit_code_is_documented(run: Run) -> None:
    """The help lists the exit codes that there are."""
    code, out, _ = run("restore", "-h")
    assert code == 0
    codes = {value for name, value in vars(exits).items() if re.match("EXIT_(?!HELP)", name)}
    documented = {int(match) for match in re.findall(r"^  (\d+)  +\w", out, re.MULTILINE)}
    assert documented | {exits.EXIT_TERMINATED} == codes


def test_hint_for_a_url_that_the_shell_cut(run: Run, tmp_path: Path) -> None:
    """An endpoint without a region looks like an unquoted "&"; the error says so."""
    url = "s3://bucket/app.db?endpoint=fly.storage.tigris.dev"
    code, _, err = run("restore", url)
    assert code == 1
    assert "put it in quotes" in err
    code, _, err = run("restore", f"{url}&region=auto")
    assert code == 1
    assert "put it in quotes" not in err
    code, _, err = run("restore", "s3://bucket?region=auto")
    assert code == 1
    assert "a region and no endpoint" in err
    code, _, err = run("restore", "s3://bucket?region=eu-west-1&storage-class=X")
    assert code == 1
    assert "put it in quotes" not in err


# --- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected_ms"),
    [
        ("2026-11-22T15:30:41.107Z", 1_795_361_441_107),
        ("2026-11-22T15:30:41.107000Z", 1_795_361_441_107),
        ("2026-11-22T15:30:41.1071Z", 1_795_361_441_108),
        ("2026-11-22T16:30:41.107+01:00", 1_795_361_441_107),
        ("2026-11-22 15:30:41Z", 1_795_361_441_000),
        ("-15m", NOW_MS - 900_000),
        ("-1h30m", NOW_MS - 5_400_000),
        ("5 minutes ago", NOW_MS - 300_000),
        ("1 hour and 30 minutes ago", NOW_MS - 5_400_000),
        ("2h ago", NOW_MS - 7_200_000),
        ("2 days ago", NOW_MS - 172_800_000),
    ],
)
def test_times(text: str, expected_ms: int) -> None:
    """RFC 3339 and relative times; a part of a millisecond belongs to what is before it."""
    assert parse_time(text, NOW_MS) == expected_ms


@pytest.mark.parametrize(
    "text",
    ["", "now", "yesterday", "5", "5 minutes", "ago", "-", "5 parsecs ago", "2026-11-22T15:30:41"],
)
def test_times_that_are_none(text: str) -> None:
    """Anything else is refused with examples, also a local time without an offset."""
    with pytest.raises(ConfigError, match="2026-01-31T15:54:00Z"):
        parse_time(text, NOW_MS)


def test_relative_times_are_relative_to_the_clock() -> None:
    """Now is the clock's."""
    clock = FakeClock(NOW_MS)
    assert parse_time("-1s", clock.now_ms()) == NOW_MS - 1000


# --- listing -------------------------------------------------------------------------------------


def test_ltx_json_is_litestreams(run: Run, replica: str) -> None:
    """The JSON of ltx: an array with Litestream's five fields; level 0 unless asked otherwise."""
    code, out, err = run("ltx", "-json", replica)
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert [each["max_txid"] for each in listed] == [f"{txid:016x}" for txid in range(1, 20)]
    assert listed[0] == {
        "level": 0,
        "min_txid": "0000000000000001",
        "max_txid": "0000000000000001",
        "size": 3161,
        "timestamp": "2026-11-22T15:30:41Z",
    }
    _, out, _ = run("ltx", "-json", "-level", "all", replica)
    assert len(json.loads(out)) == len(manifest("a-4096-levels")["files"])
    _, out, _ = run("ltx", "--level", "9", "--json", replica)
    assert {each["level"] for each in json.loads(out)} == {9}


def test_ltx_text(run: Run, replica: str, tmp_path: Path) -> None:
    """The text of ltx is a table with a heading, also when it is empty."""
    code, out, _ = run("ltx", replica)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["level", "min_txid", "max_txid", "size", "created"]
    assert lines[1].split() == [
        "0",
        "0000000000000001",
        "0000000000000001",
        "3161",
        "2026-11-22T15:30:41Z",
    ]
    code, out, _ = run("ltx", f"file://{tmp_path}/empty")
    assert (code, len(out.splitlines())) == (0, 1)
    code, out, _ = run("ltx", "-json", f"file://{tmp_path}/empty")
    assert (code, json.loads(out)) == (0, [])


def test_wal_is_the_old_name_of_ltx(run: Run, replica: str) -> None:
    """`wal` prints what `ltx` prints, and says so on standard error."""
    expected = run("ltx", "-json", replica)[1]
    code, out, err = run("wal", "-json", replica)
    assert (code, out) == (0, expected)
    assert "walship ltx" in err


def test_databases(run: Run, tmp_path: Path) -> None:
    """The databases of the configuration file with the kind of their replica."""
    config = tmp_path / "walship.yml"
    config.write_text(
        f"dbs:\n  - path: {tmp_path}/a.db\n    replica:\n      url: file://{tmp_path}/ra\n"
        f"  - path: {tmp_path}/b.db\n    replica:\n      url: s3://bucket/b\n"
    )
    code, out, _ = run("databases", "-json", "-config", config)
    assert code == 0
    assert json.loads(out) == [
        {"path": f"{tmp_path}/a.db", "replica": "file"},
        {"path": f"{tmp_path}/b.db", "replica": "s3"},
    ]
    code, out, _ = run("databases", "-config", config)
    assert out.splitlines()[0].split() == ["path", "replica"]
    assert out.splitlines()[2].split() == [f"{tmp_path}/b.db", "s3"]


def test_databases_says_what_is_not_needed(run: Run, tmp_path: Path) -> None:
    """The command that looks at the file says all there is to say about it; others do not."""
    config = tmp_path / "walship.yml"
    config.write_text(
        f"dbs:\n  - dir: {tmp_path}/none\n    pattern: '*.db'\n    monitor-interval: 1s\n"
        f"    replica: file://{tmp_path}/r\n"
    )
    code, out, err = run("databases", "-json", "-config", config)
    assert (code, json.loads(out)) == (0, [])
    assert "key=monitor-interval reason=commits are seen as they happen" in err
    assert f"there is no directory {tmp_path}/none" in err
    assert run("status", "-json", "-config", config) == (0, "[]\n", "")


def test_databases_of_a_directory(run: Run, replica: str, tmp_path: Path) -> None:
    """Databases of a directory are listed, restored and looked at like those with an entry."""
    (tmp_path / "r").mkdir()
    Path(replica.removeprefix("file://")).rename(tmp_path / "r" / "a.db")
    config = tmp_path / "walship.yml"
    config.write_text(
        f"dbs:\n  - dir: {tmp_path}/data\n    pattern: '*.db'\n    replica: file://{tmp_path}/r\n"
    )
    database = tmp_path / "data" / "a.db"
    assert run("restore", "-config", config, database)[0] == 0
    assert json.loads(run("databases", "-json", "-config", config)[1]) == [
        {"path": str(database), "replica": "file"}
    ]
    (row,) = json.loads(run("status", "-json", "-config", config)[1])
    assert row["replica_txid"] == "0000000000000013"
    code, _, err = run("ltx", "-config", config, tmp_path / "data" / "a.sqlite")
    assert code == 1
    assert f"it has: {tmp_path}/data/*.db" in err


def test_status(run: Run, replica: str, tmp_path: Path) -> None:
    """Status: Litestream's fields, and the newest TXID of the replica."""
    config = tmp_path / "walship.yml"
    (tmp_path / "a.db").write_bytes(b"x")
    (tmp_path / "a.db-wal").write_bytes(bytes(4152))
    config.write_text(
        f"dbs:\n  - path: {tmp_path}/a.db\n    replica:\n      url: {replica}\n"
        f"  - path: {tmp_path}/b.db\n    replica:\n      url: file://{tmp_path}/nothing\n"
    )
    code, out, _ = run("status", "-json", "-config", config)
    assert code == 0
    assert json.loads(out) == [
        {
            "database": f"{tmp_path}/a.db",
            "status": "not initialized",
            "state": "-",
            "local_txid": "-",
            "replica_txid": "0000000000000013",
            "lag": "-",
            "wal_size": "4.2 kB",
            "last_verified": "-",
        },
        {
            "database": f"{tmp_path}/b.db",
            "status": "no database",
            "state": "-",
            "local_txid": "-",
            "replica_txid": "-",
            "lag": "-",
            "wal_size": "-",
            "last_verified": "-",
        },
    ]
    code, out, _ = run("status", tmp_path / "a.db")
    assert code == 0
    assert out.splitlines()[1].split() == [
        f"{tmp_path}/a.db",
        "not",
        "initialized",
        "-",
        "-",
        "-",
        "-",
    ] + [
        "4.2",
        "kB",
        "-",
    ]


def test_status_tells_of_verifications(run: Run, tmp_path: Path) -> None:
    """When the replica was found sound last, and with an exit code what is wrong since."""
    path = tmp_path / "a.db"
    directory = tmp_path / ".a.db-walship"
    directory.mkdir()
    sound = Verification(outcome="sound", replica="file:///r", txid=5, time_ms=NOW_MS)
    remember(directory, sound)
    code, out, err = run("status", "-json", path)
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["last_verified"] == "2027-01-15T08:00:00Z"
    bad = Verification(
        outcome="damaged", replica="file:///r", txid=6, time_ms=NOW_MS + 60_000, problem="it is bad"
    )
    remember(directory, bad)
    code, out, err = run("status", "-json", path)
    assert (code, err) == (4, f"walship: {path}: verification: it is bad\n")
    assert json.loads(out)[0]["last_verified"] == (
        "2027-01-15T08:00:00Z (damaged 2027-01-15T08:01:00Z)"
    )
    remember(directory, dataclasses.replace(bad, outcome="failed"))
    assert run("status", "-json", path)[0] == 0


def test_status_of_an_unreachable_replica(run: Run, tmp_path: Path) -> None:
    """What is local is printed all the same; the exit code says that the store was not asked."""
    config = tmp_path / "walship.yml"
    (tmp_path / "a.db").write_bytes(b"x")
    (tmp_path / "r").symlink_to("r")
    config.write_text(
        f"dbs:\n  - path: {tmp_path}/a.db\n    replica:\n      url: file://{tmp_path}/r\n"
    )
    code, out, err = run("status", "-json", "-config", config)
    assert code == 5
    assert is_one_line(err)
    assert json.loads(out)[0]["status"] == "error"


def test_version(run: Run) -> None:
    """The version alone, or with those of what matters to a bug report."""
    assert run("version") == (0, f"{__version__}\n", "")
    code, out, _ = run("version", "-verbose")
    assert code == 0
    for word in ("Version:", "Python:", "SQLite:", "OS/Arch:"):
        assert word in out


def test_no_command_prints_help_on_stderr(run: Run) -> None:
    """Without a command there is nothing to do: the help, and exit code 1."""
    code, out, err = run()
    assert (code, out) == (1, "")
    assert "examples:" in err


# --- as a program --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program", [[sys.executable, str(REPOSITORY / "cli.py")], [sys.executable, "-m", "walship.cli"]]
)
def test_runs_as_a_program(program: list[str], replica: str, tmp_path: Path) -> None:
    """The source file runs as it is, and so does the module."""
    if not Path(program[1]).exists() and program[1] != "-m":
        pytest.skip("the sources are not here")
    done = subprocess.run(
        [*program, "restore", "-json", "-o", tmp_path / "out.db", replica],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["txid"] == "0000000000000013"


def test_closed_pipe_is_no_traceback(replica: str) -> None:
    """`walship ltx ... | head -1` ends quietly."""
    program = subprocess.Popen(
        [sys.executable, "-m", "walship.cli", "ltx", "-json", replica],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()
    errors = program.stderr.read()
    program.stderr.close()
    program.wait(timeout=60)
    assert errors == b""


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_clean_up(number: signal.Signals, expected: int, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM in the middle of a restore: one line, its exit code, no file left."""
    write_pages(tmp_path / "r", 0, 1, 1, 4, range(1, 5))
    output = tmp_path / "out" / "out.db"
    code = f"""
import os, sys
from walship import cli
from walship.replica.store.local import LocalStore
def get(self, key, start=0, length=None):
    print("reading", flush=True)
    os.read(0, 1)  # until the end of time
LocalStore.get = get
sys.argv = ["walship", "restore", "-o", {str(output)!r}, "file://{tmp_path}/r"]
sys.exit(cli.main())
"""
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == "reading\n"
        assert len(list(output.parent.iterdir())) == 1
        program.send_signal(number)
        assert program.wait(timeout=30) == expected
        assert is_one_line(program.stderr.read())
    assert list(output.parent.iterdir()) == []
