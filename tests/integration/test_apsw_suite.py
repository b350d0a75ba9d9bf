"""APSW's own test-suite, of some 240 tests, with walship's VFS as the default one.

What cannot pass is listed with the reason, and with what its failure says; everything else has to
pass, and what is listed has to fail: a list that is too long is noticed too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import apsw_suite

_ONE_VFS_NAME = "expects one VFS; a VFS that forwards to another names both", "False is not true"
_STACKED_IN_PYTHON = (
    "APSW cannot forward xGetSystemCall from a VFS in Python to another one",
    "Pointer must be int/long",
)
_NEEDS_ROLLBACK = "leaves WAL mode, which is refused", "only the WAL can be"
_NEEDS_NO_PAGE = "needs a database without any page; in WAL mode there is the first"
_ENCRYPTED = (
    "puts a VFS that scrambles bytes on top: what reaches the file is no database",
    "file is not a database",
)

#: Test, why it cannot pass, and what its failure says.
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "unconfigured": {
        "APSW.testConnectionVfsname": _ONE_VFS_NAME,
        "APSW.testVFS": _STACKED_IN_PYTHON,
        "APSW.testVFSWithWAL": _STACKED_IN_PYTHON,
    },
    "replicated": {
        "APSW.testConnectionVfsname": _ONE_VFS_NAME,
        "APSW.testVFS": _ENCRYPTED,
        "APSW.testVFSWithWAL": _ENCRYPTED,
        "APSW.testAutovacuumPages": (_NEEDS_NO_PAGE, "TypeError not raised by execute"),
        "APSW.testExtDiskused": (_NEEDS_NO_PAGE, "ValueError not raised by diskused"),
        "APSW.testConnectionPragma": ("expects that the mode is not WAL yet", "'wal' != 'delete'"),
        "APSW.testIssue98": _NEEDS_ROLLBACK,
        "APSW.testIssue106": _NEEDS_ROLLBACK,
        "Shell.testShell": _NEEDS_ROLLBACK,
    },
}


def _run(directory: Path, mode: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, apsw_suite.__file__, str(directory), mode],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
        check=False,
    )
    report = directory / "report.json"
    assert report.exists(), f"the suite died with status {done.returncode}: {done.stdout[-3000:]}"
    result: dict[str, Any] = json.loads(report.read_text())
    return result


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("apsw.tests") is None, reason="this APSW has no test-suite in it"
)
@pytest.mark.parametrize(
    "mode",
    [
        "replicated",
        pytest.param(
            "unconfigured",
            marks=pytest.mark.skipif(
                not os.environ.get("WALSHIP_DEEP"), reason="takes a minute: set WALSHIP_DEEP=1"
            ),
        ),
    ],
)
def test_apsw_suite(mode: str, tmp_path: Path) -> None:
    """All of it passes but for what is listed, and every database equals its replica."""
    report = _run(tmp_path / "suite", mode)
    expected = EXPECTED[mode]
    details = report["details"]
    unexpected = {name: text for name, text in details.items() if name not in expected}
    assert not unexpected, "\n".join(unexpected.values())
    outcomes = report["outcomes"]
    assert len(outcomes) > 200
    for name, (reason, words) in expected.items():
        assert outcomes.get(name) == "failed", f"{name} passes although it {reason}"
        assert re.search(words, details[name]), f"{name} fails for another reason: {details[name]}"
    assert report["wrong"] == []
    if mode == "replicated":
        # Every test of this class has opened a database when it begins.
        n_databases = sum(name.startswith("APSW.") for name in outcomes)
        assert report["verdicts"]["equal"] >= n_databases > 100, report["verdicts"]
