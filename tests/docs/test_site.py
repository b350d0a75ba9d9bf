"""The site is built, and pages that are made from the code are what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.blocks import ROOT
from support.cli_reference import FILE, cli_reference


def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Each page is in the navigation, and every link and anchor leads somewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").exists(), page.name
    # Nothing is loaded from elsewhere.
    html = (tmp_path / "index.html").read_text()
    assert 'src="http' not in html
    assert 'rel="stylesheet" href="http' not in html


def test_commands_are_those_of_the_parser() -> None:
    """docs/cli.md is what `make docs` makes of the parser."""
    assert FILE.read_text(encoding="utf-8") == cli_reference(), "stale: run `make docs`"
