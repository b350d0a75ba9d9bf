"""What a configuration file asks for in a process beside replication: metrics and a heartbeat."""

from __future__ import annotations

import http.server
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import walship
from support.dashboards import dashboard, expressions, rules
from support.databases import WAIT_S, Database
from support.promql import Samples
from walship.replica import heartbeat
from walship.replica.config.file import Settings
from walship.replica.engine import Status
from walship.vfs.registry import registry
from walship.vfs.services import Services, services, trouble_of

WELL = Status(
    path="/app.db",
    replica="s3://bucket/app",
    state="ok",
    txid=7,
    replicated_txid=7,
    lag_s=0.0,
    pending_bytes=0,
    wal_bytes=0,
    uploads=1,
    upload_bytes=1,
    last_upload_ms=1,
    last_error=None,
    uploader=True,
    fence="held",
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """A test begins as a process does, and what it configures ends with it."""
    settings, directories = dict(registry._settings), dict(registry._directories)
    services.close()
    registry._has_services = False
    yield
    services.close()
    services.configure(Settings())
    registry._settings, registry._directories = settings, directories
    registry._has_services = False


@pytest.fixture
def port() -> int:
    """A port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


@pytest.fixture
def beats() -> Iterator[tuple[str, list[str]]]:
    """A watchdog: its URL, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/beat", asked
    server.shutdown()
    thread.join()
    server.server_close()


def wait(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def text_of(port: int) -> str:
    """What is served there; nothing if nobody does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:
        return ""


def answers(port: int) -> bool:
    """Whether metrics are served there."""
    return "walship_replication_lag_seconds" in text_of(port)


def configuration(tmp_path: Path, *lines: str) -> Path:
    """A file for one database, with these lines at its top."""
    file = tmp_path / "walship.yml"
    database = f"  - {{path: {tmp_path}/app.db, replica: {tmp_path}/replica}}\n"
    file.write_text("".join(f"{line}\n" for line in lines) + f"dbs:\n{database}")
    return file


def test_addr(tmp_path: Path, port: int) -> None:
    """An application serves under ``addr`` from its first database on."""
    walship.configure(configuration(tmp_path, f"addr: 127.0.0.1:{port}"))
    assert not answers(port)
    db = walship.connect(tmp_path / "app.db")
    try:
        assert answers(port)
    finally:
        db.close()


def test_addr_that_is_taken(tmp_path: Path, port: int, caplog: pytest.LogCaptureFixture) -> None:
    """The second process that wants it says so, and works."""
    with walship.serve_metrics(f"127.0.0.1:{port}"):
        walship.configure(configuration(tmp_path, f"addr: 127.0.0.1:{port}"))
        db = walship.connect(tmp_path / "app.db")
        db.execute("create table t(x)")
        walship.replication(db).sync(WAIT_S)
        db.close()
    assert (
        f"this process serves no metrics: addr: metrics cannot be served on 127.0.0.1:{port}"
        in (caplog.text)
    )


def test_another_file_another_address(tmp_path: Path, port: int) -> None:
    """A file that is read later replaces the address; one without any changes nothing."""
    walship.configure(configuration(tmp_path, "addr: 127.0.0.1:0"))
    db = walship.connect(tmp_path / "app.db")
    try:
        walship.configure(configuration(tmp_path, f"addr: 127.0.0.1:{port}"))
        assert answers(port)
        walship.configure(configuration(tmp_path))
        assert answers(port)
    finally:
        db.close()


@pytest.mark.parametrize("served", [False, True])
def test_a_child_serves_by_itself(tmp_path: Path, port: int, served: bool) -> None:
    """After a fork it is the child that opens a database which serves, once its parent is gone."""
    script = f"""
import os, sys, walship
walship.configure({str(configuration(tmp_path, f"addr: 127.0.0.1:{port}"))!r})
if {served}:
    walship.connect({str(tmp_path / "app.db")!r}).close()
ended, held = os.pipe()
if os.fork():
    os._exit(0)
os.close(held)
os.read(ended, 1)  # until the parent is gone
db = walship.connect({str(tmp_path / "app.db")!r})
print(flush=True)
sys.stdin.read()
db.close()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        assert answers(port)
    finally:
        process.stdin.close()
        process.wait(WAIT_S)
        process.stdout.read()  # the child has ended
        process.stdout.close()


def test_heartbeat(
    tmp_path: Path,
    beats: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While the databases are shipped the watchdog is asked; its path stays out of the log."""
    caplog.set_level(logging.INFO, "walship")
    url, asked = beats
    monkeypatch.setattr(heartbeat, "_LOOK_S", 0.02)
    walship.configure(configuration(tmp_path, f"heartbeat-url: {url}"))
    db = walship.connect(tmp_path / "app.db")
    wait(lambda: asked)
    db.close()
    assert set(asked) == {"/beat"}
    (line,) = [r.getMessage() for r in caplog.records if "heartbeats are sent" in r.getMessage()]
    assert line == "heartbeats are sent to 127.0.0.1 every 300 s"


def test_who_beats(tmp_path: Path) -> None:
    """A database that is shipped counts as well; none that is open does not."""
    mine = Services(registry)
    try:
        assert mine._what_is_wrong(60.0) == "no database is open"
        database = Database(tmp_path)
        with database.opened() as db:
            db.execute("create table t(x)")
            database.sync()
            assert mine._what_is_wrong(60.0) is None
            registry.unopened = lambda: {"/b.db": OSError("it is a directory")}
            assert mine._what_is_wrong(60.0) == "/b.db: it is a directory"
    finally:
        registry.unopened = dict
        registry.services = services


@pytest.mark.parametrize(
    ("changes", "trouble"),
    [
        ({}, None),
        ({"lag_s": 60.0, "state": "retrying", "last_error": "away"}, None),
        (
            {"lag_s": 61.0, "state": "retrying", "last_error": "away"},
            "/app.db: commits of 61 s are not in the replica (away)",
        ),
        ({"lag_s": 61.0}, "/app.db: commits of 61 s are not in the replica"),
        ({"state": "opening"}, "/app.db: opening"),
        ({"state": "stopped", "last_error": "fenced"}, "/app.db: fenced"),
        (
            {"last_verification": "damaged", "verification_problem": "a hole"},
            "/app.db: a hole",
        ),
        ({"last_verification": "failed", "verification_problem": "no room"}, None),
    ],
)
def test_what_is_trouble(changes: dict[str, object], trouble: str | None) -> None:
    """Trouble is what has kept commits from the replica for longer than the interval."""
    assert trouble_of(replace(WELL, **changes), 60.0) == trouble  # type: ignore[arg-type]


def test_the_sidecar(tmp_path: Path, port: int, beats: tuple[str, list[str]]) -> None:
    """``walship replicate`` serves metrics before there is a database, and logs as it is told."""
    url, _ = beats
    file = configuration(
        tmp_path,
        f"addr: 127.0.0.1:{port}",
        f"heartbeat-url: {url}",
        "logging: {type: json, stderr: false}",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "walship.cli", "replicate", "-config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LOG_LEVEL": "info"},
    )
    try:
        wait(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT_S)
    assert err == ""
    assert process.returncode == 0
    lines = out.splitlines()
    assert lines
    assert all(line.startswith('{"time": "') for line in lines)
    assert any(f"metrics are served on 127.0.0.1:{port}" in line for line in lines)
    assert url not in out


def test_the_sidecar_reports_what_it_cannot_open(tmp_path: Path, port: int) -> None:
    """A database that cannot be replicated is among the metrics for as long as that is so."""
    (tmp_path / "app.db").write_bytes(b"this is no database, whatever its name says" * 100)
    file = configuration(tmp_path, f"addr: 127.0.0.1:{port}")
    process = subprocess.Popen(
        [sys.executable, "-m", "walship.cli", "replicate", "-config", str(file)],
        stderr=subprocess.PIPE,
        text=True,
    )
    labels = f'{{db="{tmp_path}/app.db",state="stopped"}}'
    try:
        wait(lambda: f"walship_state{labels} 1.0" in text_of(port) or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)


def test_the_sidecar_needs_its_address(tmp_path: Path, port: int) -> None:
    """An address that is taken ends ``walship replicate`` at once, in one line."""
    file = configuration(tmp_path, f"addr: 127.0.0.1:{port}")
    with walship.serve_metrics(f"127.0.0.1:{port}"):
        done = subprocess.run(
            [sys.executable, "-m", "walship.cli", "replicate", "-config", str(file)],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"walship: addr: metrics cannot be served on 127.0.0.1:{port}: ")


_APPLICATION = """
import sys, time, walship
walship.configure(sys.argv[1])
db = walship.connect(sys.argv[2])
db.execute("create table if not exists t (x)")
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["application", "sidecar"])
def test_dashboard_and_alerts_over_what_is_scraped(kind: str, tmp_path: Path, port: int) -> None:
    """Of a real process, at rest: each metric of the dashboard is there, with the labels that are
    asked for, and no alert fires."""
    file = configuration(tmp_path, f"addr: 127.0.0.1:{port}", "validation-interval: 1s")
    path = str(tmp_path / "app.db")
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('create table t (x)')"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=WAIT_S)
    words = {
        "application": ["-c", _APPLICATION, str(file), path],
        "sidecar": ["-m", "walship.cli", "replicate", "-config", str(file)],
    }[kind]
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
    try:
        wait(lambda: "walship_last_verified_txid{" in text_of(port))
        families = list(text_string_to_metric_families(text_of(port)))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=WAIT_S)
    samples = [each for family in families for each in family.samples]
    labels: dict[str, set[str]] = {}
    for each in samples:
        labels.setdefault(each.name, set()).update(each.labels)
    # Some have no sample yet: no request went to S3, and nothing was merged.
    names = {name for family in families for name in (family.name, f"{family.name}_total")}
    for expression in expressions(dashboard()):
        for metric in re.findall(r"\b(?:litestream|walship)_\w+", expression):
            assert metric in names | labels.keys(), expression
            for matchers in re.findall(rf"{metric}{{([^}}]*)}}", expression):
                wanted = set(re.findall(r"(\w+)=", matchers))
                assert wanted <= labels.get(metric, wanted), expression
    now = Samples([(each.name, each.labels, each.value) for each in samples], time.time())
    assert {name for name, rule in rules().items() if now.evaluate(rule["expr"])} == set()
