"""The commands that ask the processes which have databases open: list, info, status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

import walship
from support.databases import WAIT_S
from support.recording import Answer, Request, error_answer, recording_endpoint
from support.replicas import GOLDEN
from walship import cli

ENVIRON = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("AWS_", "LITESTREAM_", "WALSHIP_"))
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file with one database of its own and a directory."""
    file = tmp_path / "walship.yml"
    file.write_text(
        f"dbs:\n"
        f"  - path: {tmp_path}/app.db\n"
        f"    replica: file://{tmp_path}/replica/app\n"
        f"  - dir: {tmp_path}/tenants\n"
        f"    pattern: '*.db'\n"
        f"    replica: file://{tmp_path}/replica/tenants\n"
    )
    (tmp_path / "tenants").mkdir()
    return file


def opened(path: Path, replica: Path) -> walship.Connection:
    """A database with something in it that the replica has."""
    db = walship.connect(path, replica, sync_interval=0.0)
    db.execute("create table t(x)")
    walship.replication(db).sync(WAIT_S)
    return db


def test_list_and_info(run: Run, config: Path, tmp_path: Path) -> None:
    """Both have Litestream's fields, for databases with an entry and those of directories."""
    app = opened(tmp_path / "app.db", tmp_path / "replica/app")
    opened(tmp_path / "tenants/a.db", tmp_path / "replica/tenants/a.db").close()
    tenant = opened(tmp_path / "tenants/b.db", tmp_path / "replica/tenants/b.db")
    try:
        code, out, err = run("list", "-json", "-config", config)
        assert (code, err) == (0, "")
        rows = {Path(row.pop("path")).name: row for row in json.loads(out)["databases"]}
        assert [row["status"] for row in rows.values()] == ["replicating", "stopped", "replicating"]
        synced = datetime.fromisoformat(rows["app.db"]["last_sync_at"])
        assert synced.tzinfo is UTC
        assert "last_sync_at" not in rows["a.db"]
        _, out, _ = run("list", "-config", config)
        assert re.fullmatch(r".*/app.db \[replicating\] \(last sync: .*Z\)", out.splitlines()[0])
        assert out.splitlines()[1] == f"{tmp_path}/tenants/a.db [stopped]"

        code, out, err = run("info", "-json", "-config", config)
        assert (code, err) == (0, "")
        info = json.loads(out)
        assert info["version"] == walship.__version__
        assert info["pid"] == os.getpid()
        assert info["database_count"] == 2
        assert isinstance(info["uptime_seconds"], int)
        assert datetime.fromisoformat(info["started_at"]) <= synced
        assert info["processes"][0]["databases"] == [
            f"{tmp_path}/app.db",
            f"{tmp_path}/tenants/b.db",
        ]
        code, out, _ = run("info", "-config", config)
        assert code == 0
        assert f"process {os.getpid()}, since {info['started_at']}:" in out
    finally:
        app.close()
        tenant.close()


def test_nothing_runs(run: Run, config: Path) -> None:
    """Without a process there is nothing to list as replicating, and no process to show."""
    code, out, _ = run("list", "-json", "-config", config)
    assert code == 0
    assert [row["status"] for row in json.loads(out)["databases"]] == ["stopped"]
    code, out, err = run("info", "-json", "-config", config)
    assert (code, out) == (1, "")
    assert f"no process has a database of {config} open" in err


@pytest.mark.parametrize(("quote", "code"), [("", 5), ("'", 0)])
def test_a_url_in_a_real_shell(quote: str, code: int, tmp_path: Path) -> None:
    """Unquoted, a shell cuts the guide's URL at its &; when that goes wrong, the error says so."""
    with recording_endpoint() as endpoint:
        golden = sorted((GOLDEN / "g-s3-layout" / "objects").rglob("*.ltx"))
        for file in golden:
            endpoint.objects[f"bucket/{file.parent.name}/{file.name}"] = (file.read_bytes(), {})

        def check_region(request: Request) -> Answer | None:
            if request.signing_region == "auto":
                return None
            return error_answer(400, "AuthorizationHeaderMalformed", "the region is wrong")

        endpoint.answer = check_region
        url = f"{quote}s3://bucket?endpoint=127.0.0.1:{endpoint.port}&region=auto{quote}"
        program = f"{sys.executable} -m walship.cli restore -o {tmp_path}/my.db {url}"
        done = subprocess.run(
            ["sh", "-c", f"{program} & wait $!" if quote else f"{program}; wait $!"],
            env={**ENVIRON, "AWS_ACCESS_KEY_ID": "tid_x", "AWS_SECRET_ACCESS_KEY": "tsec_y"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == code, done.stderr
    assert ("put it in quotes, or the shell cuts it there" in done.stderr) == (not quote)
    assert (tmp_path / "my.db").exists() == bool(quote)


def test_a_socket_that_nobody_answers_on(run: Run, tmp_path: Path) -> None:
    """With Litestream's option the program behind the socket is asked, or missed."""
    for command in ("list", "info"):
        code, out, err = run(command, "-socket", str(tmp_path / "x.sock"))
        assert (code, out) == (1, "")
        assert "walship replicate" in err
