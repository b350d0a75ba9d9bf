"""`walship doctor`: fit stores pass, each fault of a store is found, and nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.clock import FakeClock
from support.faulty import FaultyStore
from support.racy import Faults, RacyServer, Stored, racy_server
from support.servers import S3Endpoint
from walship import cli
from walship.replica.clock import SystemClock
from walship.replica.config.sources import parse_replica
from walship.replica.doctor import writes
from walship.replica.doctor.probe import Check, Report, probe
from walship.replica.doctor.report import Printer, notes_about
from walship.replica.doctor.writes import Outcome, judge
from walship.replica.errors import StoreUnavailable
from walship.replica.store.local import LocalStore
from walship.replica.store.opening import open_store
from walship.replica.store.retrying import RetryingStore

DOCS = Path(__file__).parents[2] / "docs"

NAMES = [
    "reach",
    "list",
    "put",
    "get",
    "head",
    "delete",
    "create",
    "create again",
    "create repeated",
    "update",
    "stale update",
    "update of nothing",
    "create race",
    "update race",
    "conditional get",
    "object age",
    "large object",
    "large create",
    "list after put",
    "head after delete",
    "list pages",
    "list from key",
    "ranges",
    "metadata",
    "clock",
    "clean up",
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys for servers that check none, and nothing else from the environment."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "LITESTREAM_", "WALSHIP_", "BUCKET_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def url(server: RacyServer) -> str:
    return f"s3://bucket/app?endpoint={server.url}&region=us-east-1"


def probed(server: RacyServer, ended: Callable[[Check], None] | None = None) -> Report:
    clock = SystemClock()
    store = RetryingStore(open_store(parse_replica(url(server)).store, clock), clock)
    try:
        return probe(store, clock, ended=ended)
    finally:
        store.close()


def few_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of something else."""
    monkeypatch.setattr(writes, "_FEWEST_RACES", 2)
    monkeypatch.setattr(writes, "_MOST_RACES", 2)


def not_ok(report: Report) -> dict[str, str]:
    """Status of each check that is not "ok"."""
    return {check.name: check.status for check in report.checks if check.status != "ok"}


# --- stores that are fit --------------------------------------------------------------------------


@pytest.fixture(params=["minio", "seaweedfs", "directory"])
def fit_store(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[str, Callable[[], list[str]]]:
    """A store that is what it should be: its URL, and what lists everything in it."""
    if request.param == "directory":
        root = tmp_path / "replica"

        def files() -> list[str]:
            return sorted(str(each.relative_to(root)) for each in root.rglob("*"))

        return f"file://{root}", files
    server: S3Endpoint = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    bucket = server.make_bucket()
    return server.replica_url(bucket, "some/app"), lambda: sorted(server.keys(bucket))


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_fit_store(run: Run, fit_store: tuple[str, Callable[[], list[str]]]) -> None:
    """Real servers and a directory pass every check, and hold afterwards what they held before."""
    target, everything = fit_store
    with_replica = open_store(parse_replica(target).store, SystemClock())
    key = f"{with_replica.level_prefix(0)}{'0' * 15}1-{'0' * 15}1.ltx"
    with_replica.put(key, b"a segment")
    before = everything()

    code, out, err = run("doctor", target)

    assert (code, err) == (0, "")
    assert re.findall(r"^ (\S.*?) +(ok|FAILED|warning|skipped) ", out, re.M) == [
        (name, "ok") for name in NAMES
    ]
    assert "\n fence:  yes" in out
    assert "\n fit:    yes\n" in out
    assert all(len(line) <= 80 for line in out.splitlines()[1:])
    # The lock of a directory's compare-and-swap is never removed.
    assert [name for name in everything() if name != ".walship-lock.tmp"] == before
    assert with_replica.get(key) == b"a segment"
    with_replica.close()


def test_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """-json prints the documented form, and nothing else on standard output."""
    few_races(monkeypatch)
    with racy_server(Faults(conditions="locked")) as server:
        code, out, err = run("doctor", "-json", url(server))
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert list(report) == ["url", "fit", "fence", "because", "notes", "checks"]
    assert report["url"] == f"s3://bucket/app?endpoint={server.url}"
    assert (report["fit"], report["fence"]) == (True, True)
    assert [check["name"] for check in report["checks"]] == NAMES
    kinds = {"name": str, "status": str, "seen": str, "decides": bool, "ms": int}
    for check in report["checks"]:
        assert {name: type(value) for name, value in check.items()} == kinds
    page = (DOCS / "doctor.md").read_text(encoding="utf-8")
    rows = {check["name"] + " *" * check["decides"] for check in report["checks"]}
    assert [row for row in rows if f"\n| {row} |" not in page] == []
    assert [n for n in (*report, *kinds) if f"`{n}`" not in page] == []


def test_a_database_of_the_configuration_file(run: Run, tmp_path: Path) -> None:
    """As for the other commands, a database stands for its replica."""
    config = tmp_path / "walship.yml"
    config.write_text(
        f"dbs:\n  - path: {tmp_path}/app.db\n    replica:\n      path: {tmp_path}/replica\n"
    )
    code, out, _ = run("doctor", "-json", "-config", config, tmp_path / "app.db")
    assert code == 0
    assert json.loads(out)["url"] == f"file://{tmp_path}/replica"


def test_lost_answers(tmp_path: Path) -> None:
    """Requests that fail now and then, before and after their effect, are no fault of the store."""
    inner = FaultyStore(LocalStore(tmp_path, SystemClock()), seed=3, before=0.03, after=0.03)
    store = RetryingStore(inner, SystemClock(), attempts=30, first_pause_s=0.0005)
    report = probe(store, SystemClock())
    assert inner.faults["after"] > 20
    assert not_ok(report) == {}
    assert report.fit


def test_too_few_clear_answers(tmp_path: Path) -> None:
    """Races in which the winner is never told that it won prove nothing."""

    class Mute(LocalStore):
        def put(self, key: str, *arguments: Any, **conditions: Any) -> Any:
            info = super().put(key, *arguments, **conditions)
            if "race" in key:
                raise StoreUnavailable("no answer")
            return info

    store = RetryingStore(Mute(tmp_path, SystemClock()), FakeClock())
    report = probe(store, SystemClock())
    assert not report.fence
    assert report.because.startswith("only 0 of")


# --- stores that are not --------------------------------------------------------------------------

#: Faults, the status of each check that finds them (not of those skipped for it), whether there is
#: a fence, and why not.
CASES: list[tuple[dict[str, Any], dict[str, str], bool, str]] = [
    ({"conditions": "racy"}, {"create race": "failed", "update race": "failed"}, False, "at once"),
    ({"conditions": "racy-update"}, {"update race": "failed"}, False, "replaced one version"),
    (
        {"conditions": "ignored"},
        {"create again": "failed", "stale update": "failed", "update of nothing": "failed"},
        False,
        "ignores If-None-Match",
    ),
    (
        {"conditions": "unsupported"},
        {"create": "failed", "update": "failed"},
        False,
        "no conditional writes",
    ),
    (
        {"conditions": "lying"},
        {"create again": "failed", "stale update": "failed", "update of nothing": "failed"},
        False,
        "has replaced the object all the same",
    ),
    (
        {"conditions": "exists"},
        {"stale update": "failed", "update of nothing": "failed"},
        False,
        "ignores If-Match",
    ),
    ({"conditions": "vanished"}, {"update of nothing": "failed"}, False, "missing key created"),
    ({"complete_conditions": False}, {"large create": "failed"}, False, "set part-size"),
    ({"etag": False}, {"update": "failed"}, False, "different ETags"),
    ({"modified_skew_s": 3600}, {"object age": "failed"}, False, "whether another writer is alive"),
    ({"not_modified": "always"}, {"conditional get": "failed"}, True, ""),
    ({"not_modified": "never"}, {"conditional get": "warning"}, True, ""),
    ({"date_skew_s": 1200, "modified_skew_s": 1200}, {"clock": "failed"}, True, ""),
    ({"date_skew_s": -1200, "modified_skew_s": -1200}, {"clock": "failed"}, True, ""),
    ({"date_skew_s": 120, "modified_skew_s": 120}, {"clock": "warning"}, True, ""),
    ({"metadata": False}, {"metadata": "failed"}, True, ""),
    ({"hidden": 1}, {"list after put": "failed", "list pages": "failed"}, True, ""),
    ({"page": 100, "pages": False}, {"list pages": "failed"}, True, ""),
    ({"start_after": False}, {"list from key": "failed"}, True, ""),
    ({"ranges": False}, {"ranges": "failed"}, True, ""),
    (
        {"keeps_deleted": True},
        {"list after put": "failed", "head after delete": "failed", "clean up": "failed"},
        True,
        "",
    ),
    ({"refused": frozenset({"list"})}, {"list": "failed"}, False, 'tried: "list" failed: Access'),
    ({"refused": frozenset({"put"})}, {"put": "failed"}, False, 'tried: "put" failed: Access'),
    ({"refused": frozenset({"get"})}, {"get": "failed"}, False, 'tried: "get" failed: Access'),
    ({"refused": frozenset({"head"})}, {"head": "failed"}, True, ""),
    (
        {"refused": frozenset({"delete"})},
        {"delete": "failed", "clean up": "failed"},
        False,
        'tried: "delete" failed: Access',
    ),
]


@pytest.mark.parametrize(
    ("faults", "found", "fence", "because"), CASES, ids=[str(case[0]) for case in CASES]
)
def test_a_fault_is_found(
    faults: dict[str, Any],
    found: dict[str, str],
    fence: bool,
    because: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each fault of a server is found by the checks that look for it, and by no others."""
    if "racy" not in faults.get("conditions", ""):
        few_races(monkeypatch)
    with racy_server(Faults(**{"conditions": "locked", **faults})) as server:
        report = probed(server)
    told = {name: status for name, status in not_ok(report).items() if status != "skipped"}
    assert told == found, report.checks
    assert report.fence is fence
    assert because in report.because
    assert report.fit is (fence and "failed" not in found.values())


def test_no_list_of_faults_is_forgotten() -> None:
    """Every fault that the server can have is among the cases."""
    tried = {name for case in CASES for name in case[0]}
    assert tried == set(Faults.__dataclass_fields__)
    wrong = set(typing.get_args(typing.get_type_hints(Faults)["conditions"])) - {"locked"}
    assert {case[0]["conditions"] for case in CASES if "conditions" in case[0]} == wrong


def test_an_unfit_store_on_the_command_line(run: Run) -> None:
    """The verdict says why and what that means, and the exit code is one of its own."""
    with racy_server(Faults(conditions="racy-update")) as server:
        code, out, err = run("doctor", url(server))
    assert (code, err) == (8, "")
    assert re.search(r"^ update race +FAILED +\d+ of 16 writers at once were told", out, re.M)
    text = " ".join(out.split())
    assert re.search(r" fence: no, because \d+ of 16 writers at once were told", text)
    assert " fit: no, unless you see to it yourself that there is never a second writer" in text
    assert " note:" not in text
    assert not server.objects

    with racy_server(Faults(conditions="locked", metadata=False)) as server:
        code, out, _ = run("doctor", url(server))
    assert code == 8
    assert "\n fence:  yes" in out
    assert "\n fit:    no (failed: metadata)\n" in out


def test_parts_that_are_too_large_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """With parts that no segment reaches, uploads in parts decide nothing."""
    few_races(monkeypatch)
    clock = SystemClock()
    with racy_server(Faults(conditions="locked", complete_conditions=False)) as server:
        settings = parse_replica(f"{url(server)}&part-size=5GiB").store
        store = RetryingStore(open_store(settings, clock), clock)
        report = probe(store, clock, part_size=5 * 1024**3)
        store.close()
    assert report.fit
    assert not_ok(report) == {"large object": "skipped", "large create": "skipped"}


def test_nothing_is_reached(run: Run) -> None:
    """A store that is not there, or lacks the bucket, is one line and the code for stores."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        target = f"s3://bucket/app?endpoint=http://127.0.0.1:{held.getsockname()[1]}&region=x"
        code, _, err = run("doctor", target)
    assert code == 5
    assert err.startswith("walship: cannot list")
    assert err.count("\n") == 1
    with racy_server() as server:
        server.buckets.clear()
        code, _, err = run("doctor", url(server))
    assert code == 5
    assert "bucket 'bucket' does not exist" in err
    with racy_server(Faults(refused=frozenset({"list", "put"}))) as server:
        code, _, err = run("doctor", url(server))
    assert code == 5
    assert "AccessDenied" in err


# --- no trace ------------------------------------------------------------------------------------


@contextlib.contextmanager
def doctor(server: RacyServer) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own, which is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "walship.cli", "doctor", url(server)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class At:
    """Signals a process when the server receives a request whose key ends so.

    Args:
        number: of the signal.
    """

    def __init__(self, server: RacyServer, moment: str, number: int) -> None:
        self._moment = moment
        self._number = number
        self._started = threading.Event()
        self._lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.seen: list[str] = []
        server.received = self._received

    def watch(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._started.set()

    def _received(self, operation: str, key: str) -> None:
        self._started.wait(30)
        assert self.process is not None
        with self._lock:
            now = not self.seen and f"{operation} {key}".endswith(self._moment)
            if now:
                self.seen.append(key)
        if now:
            self.process.send_signal(self._number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["-access", "-create-race-2", "-large", "-page-0100", "-clock"])
def test_an_interrupted_probe_leaves_nothing(moment: str, number: int) -> None:
    """Ctrl-C and SIGTERM end it soon, at whatever moment, and all its objects are gone."""
    with racy_server(Faults(conditions="locked")) as server:
        server.objects["bucket/app/0000/a.ltx"] = Stored(b"a segment")
        at = At(server, moment, number)
        with doctor(server) as process:
            at.watch(process)
            out, err = process.communicate(timeout=60)
        assert at.seen, out
        assert process.returncode == (130 if number == signal.SIGINT else 143), err
        assert list(server.objects) == ["bucket/app/0000/a.ltx"]
    assert "no database or replica was changed" in err
    assert "Traceback" not in err
    assert "fence:" not in out


def test_interrupted_twice() -> None:
    """A second Ctrl-C gives up what hangs, and the message names what may be left."""
    with racy_server(Faults(conditions="locked")) as server:
        release = threading.Event()
        hangs = threading.Event()

        def received(operation: str, key: str) -> None:
            if key.endswith("-create-race-2"):
                hangs.set()
                release.wait(60)

        server.received = received
        with doctor(server) as process:
            assert hangs.wait(60)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert "once more to give up" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            try:
                _, err = process.communicate(timeout=60)
            finally:
                release.set()
    assert process.returncode == 130
    assert re.search(r"walship-doctor-[0-9a-f]{16}-\* may be left behind in s3://bucket/app", err)
    assert "Traceback" not in err


def test_output_that_nobody_reads_any_more() -> None:
    """A pipe that is closed early ends it like Ctrl-C."""
    with racy_server(Faults(conditions="locked")) as server:
        with doctor(server) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read()
            assert (process.wait(60), err) == (1, "")
        assert not server.objects


def test_removal_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """When a probe ends early and cannot tidy up, the log says what is left and where."""

    def ended(check: Check) -> None:
        if check.name == "create":
            server.faults = Faults(conditions="locked", refused=frozenset({"delete"}))
            raise KeyboardInterrupt

    with racy_server(Faults(conditions="locked")) as server:
        with pytest.raises(KeyboardInterrupt):
            probed(server, ended)
        (left,) = server.objects
    (record,) = [each for each in caplog.records if each.name == "walship.doctor"]
    name = left.removeprefix("bucket/app/").removesuffix("create")
    assert f"{name}* may be left behind in s3://bucket/app" in record.getMessage()


# --- the judge of races --------------------------------------------------------------------------

WON, LOST, UNCLEAR = Outcome.WON, Outcome.LOST, Outcome.UNCLEAR


@pytest.mark.parametrize(
    ("outcomes", "content", "wrong"),
    [
        ([WON, LOST, LOST], 0, None),
        ([LOST, LOST, WON], 2, None),
        ([WON, LOST, UNCLEAR], 0, None),
        ([UNCLEAR, LOST, LOST], 0, None),  # it won, and was not told
        ([UNCLEAR, UNCLEAR, UNCLEAR], 1, None),
        ([WON, WON, LOST], 0, "2 of 3 writers at once"),
        ([WON, WON, WON], 2, "3 of 3 writers at once"),
        ([WON, LOST, LOST], 1, "refused has written"),
        ([UNCLEAR, LOST, LOST], 1, "refused has written"),
        ([WON, LOST, UNCLEAR], 2, "is not there afterwards"),  # two writes had effect
        ([WON, LOST, LOST], None, "is not there afterwards"),
        ([LOST, LOST, LOST], None, "none has"),
        ([UNCLEAR, LOST, LOST], None, "none has"),
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_judge(
    outcomes: list[Outcome], content: int | None, wrong: str | None, update: bool
) -> None:
    """A race ends well if one wrote at most, nobody else was told so, and its object is there."""
    bodies = [b"first", b"second", b"third"]
    there = (b"old" if update else None) if content is None else bodies[content]
    found = judge(outcomes, bodies, there, update=update)
    if wrong is None:
        assert found is None
    else:
        assert found is not None
        assert wrong in found


# --- what is printed ------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(fence: bool, *failed: str) -> Report:
    checks = [Check(name, "failed", "wrong", False, 5) for name in failed]
    return Report("s3://bucket", checks, fence, "reasons")


def test_a_terminal_shows_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the check that takes long, or hangs, can be seen, and lines fit its width."""
    monkeypatch.setenv("COLUMNS", "64")
    out = Terminal()
    printer = Printer(out)
    printer.started("create race")
    assert out.getvalue() == " create race        ..."
    printer.ended(Check("create race", "failed", "two writers were told that they won", True, 7))
    shown = [line.rpartition("\r")[2] for line in out.getvalue().split("\n")]
    assert shown == [
        " create race        FAILED   two writers were told that they",
        "                             won",
        "",
    ]
    printer.started("update race")
    printer.stopped()
    assert out.getvalue().endswith(" update race        ...\n")


def test_a_file_shows_finished_checks_only() -> None:
    """Where nobody watches there are no half lines."""
    out = io.StringIO()
    printer = Printer(out)
    printer.started("clock")
    printer.ended(Check("clock", "ok", "same time as the store", False, 7))
    printer.stopped()
    assert out.getvalue() == " clock              ok       same time as the store\n"


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("https://fly.storage.tigris.dev", "Single or Multi-region"),
        ("https://account.r2.cloudflarestorage.com", "Cloudflare"),
        ("https://s3.us-west-001.backblazeb2.com", "Backblaze"),
        ("https://ams3.digitaloceanspaces.com", "region"),
        ("https://fsn1.your-objectstorage.com", "Hetzner"),
        ("https://s3.fr-par.scw.cloud", "Scaleway"),
        ("https://storage.googleapis.com", "Google"),
        ("http://minio:9000", "docs/doctor.md"),
        ("https://s3.eu-central-1.amazonaws.com", None),
        (None, None),
    ],
)
def test_notes(endpoint: str | None, says: str | None) -> None:
    """What is known about a provider limits a good verdict, and is left out of a bad one."""
    query = "" if endpoint is None else f"?endpoint={endpoint}"
    settings = parse_replica(f"s3://bucket/app{query}").store
    notes = notes_about(report(True), settings)
    if says is None:
        assert notes == ()
    else:
        (note,) = notes
        assert says in note
    assert notes_about(report(False), settings) == ()


def test_notes_about_a_directory(tmp_path: Path) -> None:
    """A directory fences as far as its locks reach."""
    (note,) = notes_about(report(True), parse_replica(tmp_path).store)
    assert "network file system" in note
