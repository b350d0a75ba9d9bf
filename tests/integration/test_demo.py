"""The example programs, run as a reader of the README would run them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import walship
from support.servers import S3Endpoint, free_ports

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason="tests of an installed wheel: there are no examples"
)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without anything that names a replica, and with ``more``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "LITESTREAM_", "WALSHIP_")) and name != "BUCKET_NAME"
    }
    return {**kept, **more}


def run_demo(
    directory: Path,
    *arguments: str,
    program: Path = EXAMPLES / "demo.py",
    more: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the demo in ``directory``."""
    return subprocess.run(
        [sys.executable, program, *arguments],
        cwd=directory,
        env=environment(more or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def number(output: str, name: str) -> int:
    """The number that the demo printed after ``name``."""
    found = re.search(rf"{re.escape(name)} +([\d,]+)", output)
    assert found is not None, output
    return int(found[1].replace(",", ""))


def check(done: subprocess.CompletedProcess[str]) -> None:
    """The demo succeeded, and its numbers fit together."""
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    taken, safe = number(out, "commits acknowledged"), number(out, "in the replica at the kill")
    restored = number(out, "restored")
    assert taken > 0
    assert safe > 0
    assert safe <= restored
    assert number(out, "missing") == 0
    assert re.search("integrity check +ok", out)


def test_demo_with_a_directory(tmp_path: Path) -> None:
    """``make demo`` without any variables: everything that was in the replica comes back."""
    done = run_demo(tmp_path, "--seconds", "1.5")
    check(done)
    data = tmp_path / "demo-data"
    assert not (data / "machine").exists()
    with contextlib.closing(sqlite3.connect(data / "new-machine" / "orders.db")) as db:
        (count,) = db.execute("select count(*) from orders").fetchone()
    assert count == number(done.stdout, "restored")
    check(run_demo(tmp_path, "--seconds", "0.5"))  # and again over what is left of the first


def test_demo_with_a_bucket(s3_server: S3Endpoint, tmp_path: Path) -> None:
    """With the variables that ``fly storage create`` sets it replicates to the bucket, below a
    path of its own."""
    bucket = s3_server.make_bucket()
    more = {**s3_server.environ, "BUCKET_NAME": bucket, "AWS_ENDPOINT_URL_S3": s3_server.url}
    check(run_demo(tmp_path, "--seconds", "1.5", more=more))
    keys = s3_server.keys(bucket)
    assert keys
    assert all(re.match(r"walship-demo/\d{8}-\d{6}/(000\d/|lock.json$)", key) for key in keys)


def test_demo_with_a_url(minio_server: S3Endpoint, tmp_path: Path) -> None:
    """With WALSHIP_REPLICA it replicates below that URL, and touches nothing that is there."""
    bucket = minio_server.make_bucket()
    with contextlib.closing(minio_server.client()) as client:
        client.put_object(Bucket=bucket, Key="production/0000/precious", Body=b"data")
    url = f"s3://$BUCKET_NAME/production?endpoint={minio_server.url}&region=us-east-1"
    more = {**minio_server.environ, "BUCKET_NAME": bucket, "WALSHIP_REPLICA": url}
    check(run_demo(tmp_path, "--seconds", "1", more=more))
    keys = set(minio_server.keys(bucket)) - {"production/0000/precious"}
    assert keys
    assert all(key.startswith("production/walship-demo/") for key in keys)


def test_demo_notices_what_is_missing(tmp_path: Path) -> None:
    """If a restore brought back less than the replica had, the demo says so and exits with 1."""
    broken = tmp_path / "demo.py"
    source = (EXAMPLES / "demo.py").read_text()
    call = "walship.restore(replica, restored)"
    assert source.count(call) == 1
    broken.write_text(source.replace(call, "walship.restore(replica, restored, txid=2)"))
    done = run_demo(tmp_path, "--seconds", "1.5", program=broken)
    assert done.returncode == 1, done.stdout + done.stderr
    assert number(done.stdout, "missing") > 0


def test_demo_notices_wrong_content(tmp_path: Path) -> None:
    """If an order came back other than it was taken, the demo says so and exits with 1."""
    broken = tmp_path / "demo.py"
    source = (EXAMPLES / "demo.py").read_text()
    call = "walship.restore(replica, restored)\n"
    edit = 'sqlite3.connect(restored).execute("update orders set cents = 1").connection.commit()\n'
    broken.write_text(source.replace(call, f"{call}    {edit}"))
    done = run_demo(tmp_path, "--seconds", "0.5", program=broken)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG" in done.stdout


def test_demo_without_a_store(tmp_path: Path) -> None:
    """A store that cannot be reached is two lines, not a traceback, and exit code 1."""
    (port,) = free_ports(1)
    more = {
        "BUCKET_NAME": "nowhere",
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_REGION": "auto",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    done = run_demo(tmp_path, more=more)
    assert done.returncode == 1, done.stdout
    first, second = (line for line in done.stderr.splitlines() if line)
    assert first.startswith("application: ")
    assert str(port) in first
    assert second == "demo: the application did not get going"


def test_demo_leaves_other_directories_alone(tmp_path: Path) -> None:
    """A directory that holds something else is refused with one line and not emptied."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").touch()
    done = run_demo(tmp_path, "--directory", "mine")
    assert done.returncode == 1
    assert done.stderr.strip() == "demo: mine holds something else: name another --directory"
    assert (tmp_path / "mine" / "photo").exists()


# --- the program that the README opens with ------------------------------------------------------


class Server:
    """The FastAPI example under uvicorn."""

    def __init__(self, directory: Path, replica: Path) -> None:
        self.database = directory / "notes.db"
        (self.port,) = free_ports(1)
        self.log = directory.with_suffix(".log")
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "fastapi_app:app", "--port", str(self.port)],
                cwd=EXAMPLES,
                env=environment({"WALSHIP_REPLICA": str(replica), "NOTES_DB": str(self.database)}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def call(self, method: str, path: str, **more: Any) -> Any:
        """The JSON answer to a request."""
        httpx = pytest.importorskip("httpx")
        answer = httpx.request(
            method, f"http://127.0.0.1:{self.port}{path}", timeout=20, trust_env=False, **more
        )
        answer.raise_for_status()
        return answer.json()

    def wait(self, ready: Callable[[Any], bool] = bool) -> Any:
        """The first answer of ``/health`` that is ``ready``."""
        httpx = pytest.importorskip("httpx")
        deadline = time.monotonic() + 40
        while True:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if ready(health := self.call("GET", "/health")):
                    return health
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def end(self, how: signal.Signals) -> None:
        """Send a signal and wait."""
        self.process.send_signal(how)
        self.process.wait(timeout=40)
        orderly = "Application shutdown complete" in self.log.read_text()
        assert orderly == (how == signal.SIGTERM), self.log.read_text()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Starts the example on a machine with the given name; all share one replica."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    started: list[Server] = []

    def start(machine: str) -> Server:
        directory = tmp_path / machine
        directory.mkdir(exist_ok=True)
        server = Server(directory, tmp_path / "replica")
        started.append(server)
        return server

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


def test_fastapi_application(serve: Callable[[str], Server]) -> None:
    """Notes outlive a deploy (SIGTERM, new machine), and a crash with the loss of the disk."""
    first = serve("first")
    first.wait()
    for text in ("one", "two"):
        first.call("POST", "/notes", json={"text": text})
    assert first.call("GET", "/notes") == ["one", "two"]
    first.end(signal.SIGTERM)  # the last close ships what is left

    second = serve("second")
    second.wait()
    assert second.call("GET", "/notes") == ["one", "two"]
    second.call("POST", "/notes", json={"text": "three"})
    health = second.wait(lambda h: h["lag_s"] == 0 and h["replicated_txid"] == h["txid"] > 1)
    assert (health["state"], health["last_error"]) == ("ok", None)
    second.end(signal.SIGKILL)

    third = serve("third")
    third.wait()
    assert third.call("GET", "/notes") == ["one", "two", "three"]
    third.end(signal.SIGTERM)


def test_fastapi_application_keeps_connections_apart(serve: Callable[[str], Server]) -> None:
    """Many requests at a time, each with a connection of its own: every note is there once."""
    from concurrent.futures import ThreadPoolExecutor

    server = serve("only")
    server.wait()
    texts = [f"note {n}" for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda text: server.call("POST", "/notes", json={"text": text}), texts)
        )
    assert sorted(answer["id"] for answer in answers) == list(range(1, 41))
    assert sorted(server.call("GET", "/notes")) == sorted(texts)


def test_readme_opens_with_the_example() -> None:
    """The first program of the README is examples/fastapi_app.py, word for word."""
    readme = (ROOT / "README.md").read_text()
    first = re.search(r"```python title=\"examples/fastapi_app.py\"\n(.*?)```", readme, re.DOTALL)
    assert first is not None
    assert first[1] == (EXAMPLES / "fastapi_app.py").read_text()


# --- what README and docs say --------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file that is there."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_public_error_is_described() -> None:
    """docs/errors.md has each public exception, and the exit codes are those of ``walship -h``."""
    page = (ROOT / "docs" / "errors.md").read_text()
    for name in walship.__all__:
        thing = getattr(walship, name)
        if isinstance(thing, type) and issubclass(thing, walship.ReplicaError):
            assert f"`{name}`" in page, name
    shown = subprocess.run(
        [sys.executable, "-m", "walship.cli", "restore", "-h"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    codes = re.findall(r"^  (\d+) ", shown.split("exit codes:")[1], re.MULTILINE)
    assert len(codes) >= 8
    rows = re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE)
    listed = [code for row in rows for code in row.split(", ")]
    assert set(codes) <= set(listed)


def test_make_finds_a_python_that_is_new_enough(tmp_path: Path) -> None:
    """A Python that is too old, or a version manager's command without a version behind it, is
    passed over; without any other the message says what to install."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {
        "python3.14": "echo 'pyenv: python3.14: command not found' >&2; exit 127",
        "python3.12": "exit 1",
        "python3": "exit 1",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    tree = tmp_path / "tree"
    (tree / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "environment", tree / ".ci")
    shutil.copy(ROOT / "pyproject.toml", tree)
    for tool in ("sh", "dirname", "cksum", "cat", "rm"):
        (commands / tool).symlink_to(shutil.which(tool) or tool)

    def make() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tree / ".ci" / "environment", "venv"],
            env={"PATH": str(commands)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = make()
    assert done.returncode == 1
    assert "Python 3.11 or newer with the venv module is needed" in done.stderr
    # One that fits is chosen, whatever stands before it on the list.  It makes no environment here.
    fitting = 'case "$*" in *ensurepip*) exit 0;; "-V") echo Python 3.11.0;; *) exit 9;; esac'
    (commands / "python3.11").write_text(f"#!/bin/sh\n{fitting}\n")
    (commands / "python3.11").chmod(0o755)
    done = make()
    assert done.returncode == 9
    assert done.stderr.strip() == "Making venv with Python 3.11.0 ..."
