"""The files in examples/ that run the application elsewhere: linted, and their commands run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import walship
from support import wellformed
from support.blocks import ROOT
from support.servers import free_ports
from support.wellformed import Unfit

EXAMPLES = ROOT / "examples"
CHECKS: dict[str, Callable[[str], object]] = {
    "Dockerfile": wellformed.check_dockerfile,
    "fly.toml": wellformed.check_fly,
    "kubernetes.yaml": wellformed.check_kubernetes,
    "notes.service": wellformed.check_unit,
    "walship.service": wellformed.check_unit,
}


@pytest.mark.parametrize("name", CHECKS)
def test_example_is_fit(name: str) -> None:
    """Each says what it should, to those who know the format and to ours who know what matters."""
    CHECKS[name]((EXAMPLES / name).read_text())


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("Dockerfile", 'CMD ["python", "-m", "uvicorn",', 'CMD ["sh", "-c", "uvicorn",', "SIGTERM"),
        ("Dockerfile", 'CMD ["python", "-m"', 'CMD python ["-m"', "a list of words"),
        ("Dockerfile", "CMD", 'ENTRYPOINT ["/entrypoint.sh"]\nCMD', "ENTRYPOINT"),
        ("Dockerfile", "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGINT", "SIGTERM"),
        ("Dockerfile", "VOLUME /data\n", "", "VOLUME"),
        ("fly.toml", '"45s"', '"5s"', "kill_timeout"),
        ("fly.toml", "SIGTERM", "SIGINT", "kill_signal"),
        ("fly.toml", '"rolling"', '"bluegreen"', "two machines"),
        ("fly.toml", '"/data/notes.db"', '"/tmp/notes.db"', "not on the volume"),
        ("kubernetes.yaml", "kind: StatefulSet", "kind: Deployment", "serviceName|Deployment"),
        ("kubernetes.yaml", "replicas: 1", "replicas: 2", "one writer"),
        ("kubernetes.yaml", "Seconds: 45", "Seconds: 30", "terminationGracePeriodSeconds"),
        ("kubernetes.yaml", "value: /data/notes.db", "value: /tmp/notes.db", "not on the claimed"),
        ("kubernetes.yaml", "containerPort: 8000", "containerPort: http", "StatefulSet"),
        ("notes.service", "TimeoutStopSec=45", "TimeoutStopSec=10", "TimeoutStopSec"),
        ("notes.service", "KillSignal=SIGTERM", "KillSignal=SIGKILL", "KillSignal"),
        ("notes.service", "ExecStart=", "ExecStart=/bin/sh -c ", "SIGTERM"),
        ("walship.service", "WantedBy=multi-user.target", "", "WantedBy"),
        ("walship.service", "PrivateTmp=true", "PrivateTmp=maybe", "PrivateTmp=maybe"),
        ("walship.service", "RestartSec=1", "RestrtSec=1", "RestrtSec"),
        ("Dockerfile", "COPY ", "COPYFILE ", "COPYFILE"),
        ("Dockerfile", "WORKDIR /", "WORKDIR ", "hadolint.*WORKDIR"),
    ],
)
def test_what_is_unfit_is_found(name: str, old: str, new: str, message: str) -> None:
    """The checks notice what would lose commits, or would not start."""
    text = (EXAMPLES / name).read_text()
    assert old in text
    with pytest.raises(Unfit, match=message):
        CHECKS[name](text.replace(old, new))


COMMANDS = {
    "Dockerfile": wellformed.command_of_dockerfile,
    "notes.service": wellformed.command_of_unit,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_ends_with_sigterm(name: str, tmp_path: Path) -> None:
    """What the container or service runs keeps its database where it says, and SIGTERM to that one
    process ships what is left: another start, without the disk, has the notes of the first."""
    words, environ = COMMANDS[name]((EXAMPLES / name).read_text())
    assert words[0].endswith("python")
    place = Path(environ["NOTES_DB"]).parent
    text = (EXAMPLES / name).read_text()
    assert f"VOLUME {place}" in text or f"StateDirectory={place.name}" in text
    replica = tmp_path / "replica"
    database = tmp_path / "notes.db"
    (port,) = free_ports(1)
    for option, value in (("--port", str(port)), ("--host", "127.0.0.1")):
        if option in words:
            words[words.index(option) + 1] = value
    for note in ("first", "second"):
        process = subprocess.Popen(
            [sys.executable, *words[1:]],
            cwd=EXAMPLES,
            # An hour between two uploads: only the close ships what comes in between.
            env={
                **os.environ,
                "NOTES_DB": str(database),
                "WALSHIP_REPLICA": f"file://{replica}?sync-interval=1h",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _when_up(process, f"{url}/health")
            for text in (f"{note} a", f"{note} b"):
                _post(f"{url}/notes", {"text": text})
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
        for left in tmp_path.glob("*notes.db*"):  # the disk is gone
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
    walship.restore(str(replica), str(tmp_path / "copy.db"))
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as db:
        notes = [text for (text,) in db.execute("select text from notes order by id")]
    assert notes == ["first a", "first b", "second a", "second b"]


def _when_up(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 40
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _post(url: str, content: Any) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    urllib.request.urlopen(request, timeout=20).close()
