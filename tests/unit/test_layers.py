"""The layer rules of pyproject.toml hold, and each of them notices a violation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "replica").is_dir(), reason="tests of an installed wheel: there are no sources"
)

LAYERS = "Imports point down: cli, commands, sidecar, middleware, aio, logs, vfs, replica"
COMMANDS = "Imports point down: commands, what they share"
SIDECAR = "Imports point down: commands of the sidecar, its service, one database"
ENGINE = "Imports point down: engine, store, format, base"
CONFIG = "Imports point down: where settings come from, what they say"
BOTO = "Only the S3 store knows boto3"
SQLITE = "SQLite is reached through the VFS, the port and those that check or write files"
SEES = "The VFS sees no store and no format"

VIOLATIONS = [
    (COMMANDS, "src/walship/commands/options.py", "from walship.commands import restoring"),
    (SIDECAR, "src/walship/sidecar/service.py", "from walship.sidecar import control"),
    (LAYERS, "vfs/registry.py", "from walship.sidecar.hold import Hold"),
    (LAYERS, "vfs/files.py", "import walship.cli"),
    (LAYERS, "replica/sqlite.py", "import walship.vfs.files"),
    (LAYERS, "replica/capture.py", "from walship import connect"),
    (ENGINE, "replica/errors.py", "import walship.replica.clock"),
    (ENGINE, "replica/format/wal.py", "import walship.replica.store.base"),
    (ENGINE, "replica/store/s3.py", "import walship.replica.config.sources"),
    (ENGINE, "replica/spool.py", "import walship.replica.capture"),
    (ENGINE, "replica/capture.py", "import walship.replica.uploader"),
    (ENGINE, "replica/uploader.py", "import walship.replica.engine"),
    (ENGINE, "replica/restore.py", "import walship.replica.capture"),
    (ENGINE, "replica/config/url.py", "import walship.replica.doctor.probe"),
    (CONFIG, "replica/config/values.py", "import walship.replica.config.settings"),
    (ENGINE, "replica/unlisted.py", ""),
    (BOTO, "replica/store/local.py", "import boto3"),
    (BOTO, "cli.py", "import botocore.session"),
    (SQLITE, "replica/capture.py", "import apsw"),
    (SQLITE, "replica/store/base.py", "import sqlite3"),
    (SEES, "vfs/replicating.py", "import walship.replica.store.base"),
    (SEES, "vfs/files.py", "import walship.replica.format.wal"),
]


def copy_sources(directory: Path) -> Path:
    """The sources with their links, in a place where a violation can be planted."""
    tree = directory / "tree"
    tree.mkdir()
    for name in ("src", "vfs", "replica"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "cli.py", tree)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the sources in ``tree``."""
    program = Path(sys.executable).parent / "lint-imports"
    if not program.exists():
        pytest.skip("import-linter is not installed")
    return subprocess.run(
        [program, "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def broken(output: str) -> set[str]:
    """Names of the contracts that were reported as broken."""
    ends = (line.partition(" BROKEN") for line in output.splitlines())
    return {name for name, found, _ in ends if found}


def test_layers_hold(tmp_path: Path) -> None:
    """Every contract is kept by the sources as they are."""
    done = lint(copy_sources(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("contract", "file", "line"),
    VIOLATIONS,
    ids=[f"{file}: {line}" for _, file, line in VIOLATIONS],
)
def test_violation_is_noticed(contract: str, file: str, line: str, tmp_path: Path) -> None:
    """An import against a rule breaks that rule."""
    tree = copy_sources(tmp_path)
    with (tree / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(tree)
    assert done.returncode != 0, done.stdout
    if line:
        assert contract in broken(done.stdout), done.stdout
    else:  # a module without a layer is an error before any contract is judged
        assert "unlisted" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("replica/capture.py", "import time"),
        ("replica/spool.py", "import random"),
        ("replica/capture.py", "import threading\n\nx = threading.Thread(target=print)"),
        ("vfs/connection.py", 'import os\n\nx = os.environ["HOME"]'),
        ("cli.py", 'import os\n\nx = os.getenv("HOME")'),
        ("replica/format/wal.py", "from ..errors import FormatError"),
    ],
)
def test_banned_names_are_noticed(file: str, line: str, tmp_path: Path) -> None:
    """Clock, randomness, threads, environment and parent-relative imports are ruff's to find."""
    program = Path(sys.executable).parent / "ruff"
    if not program.exists():
        pytest.skip("ruff is not installed")
    tree = copy_sources(tmp_path)
    with (tree / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = subprocess.run(
        [program, "check", "--no-cache", "--select", "TID", "--output-format", "concise", file],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "TID25" in done.stdout
