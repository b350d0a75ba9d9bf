"""Every block of code in README.md and docs/ is run, checked, or says why it is not.

The blocks of a page are run in order, in a directory of their own, with a MinIO in the place of
every provider (`support.elsewhere`).  They are run as they stand there, but for the replacements
below.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from support import page_session, wellformed
from support.blocks import PAGES, ROOT, BadPage, Block, blocks_of
from support.elsewhere import ACCESS_KEY_ID, SECRET_ACCESS_KEY, Elsewhere, elsewhere
from support.servers import free_ports
from walship import cli
from walship.replica.errors import ConfigError

#: What pages show and this checkout does not have yet.  A block with one of these words in it is
#: only held to be well-formed; take a word out to have its blocks run.
NOT_YET: Final[tuple[str, ...]] = ()

#: Buckets of the pages.
BUCKETS: Final = ("my-bucket",)
#: Directories of the pages, which are made below that of the page.
_PLACES: Final = re.compile(r"(?<![\w./:$}-])/(data|backup|path/to|etc|scratch)(?=/|\b)")
#: Keys of the pages, other than those of Tigris.
_KEYS: Final = {
    "AKIAXXXXXXXXXXXXXXXX": ACCESS_KEY_ID,
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx": SECRET_ACCESS_KEY,
}
#: "After what the page did so far", in the pages.
_MOMENT: Final = "2026-01-31T15:54:00Z"
#: Where servers of the pages listen.
_PORTS: Final = ("8000", "9090")
#: By page, whom its programs have turned to: the names by which settings are chosen.
SEEN: Final = {
    "tigris": {"fly.storage.tigris.dev:443"},
    "litestream": {"fly.storage.tigris.dev:443"},
    "r2": {"0123456789abcdef.r2.cloudflarestorage.com:443"},
    "aws": {"my-bucket.s3.amazonaws.com:443"},
    "minio": {"minio:9000"},
}
_PAGE_S: Final = 120.0
_CHECKS: Final[dict[str, Callable[[str], object]]] = {
    "json": wellformed.check_json,
    "toml": wellformed.check_toml,
    "yaml": wellformed.check_yaml,
    "dockerfile": wellformed.check_dockerfile,
    "ini": wellformed.check_unit,
}
_PROGRAMS: Final = ("sh", "python")


@pytest.fixture(scope="session")
def internet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """Every provider."""
    with elsewhere(tmp_path_factory.mktemp("elsewhere")) as running:
        yield running


def fate(block: Block) -> str:
    """What becomes of a block."""
    if block.language == "text":
        return "text"
    if block.language not in _PROGRAMS or "parsed" in block.directives:
        return "checked"
    if "not run" in block.directives:
        return "not run"
    if any(re.search(each, block.text) for each in NOT_YET):
        return "not yet"
    return "run"


def name(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_well_formed(page: Path) -> None:
    """Data is what it says it is; commands and programs can be parsed, with options that exist;
    what is shown as a file of the project is that file; what is called text holds no command."""
    for block in blocks_of(page):
        try:
            _check(block)
        except wellformed.Unfit as unfit:
            pytest.fail(f"{block.where}: {unfit}", pytrace=False)


def _check(block: Block) -> None:
    file = ROOT / block.title
    if block.title and file.is_file() and block.text != file.read_text(encoding="utf-8"):
        raise wellformed.Unfit(f"it is not {block.title} any more")
    if block.language in _CHECKS:
        _CHECKS[block.language](block.text)
    elif block.language == "python":
        try:
            compile(block.text, block.where, "exec", flags=0x2000)  # PyCF_ALLOW_TOP_LEVEL_AWAIT
        except SyntaxError as error:
            raise wellformed.Unfit(f"not Python: {error}") from error
    elif block.language == "sh":
        _check_commands(block)
    elif block.language == "text":
        command = re.search(r"^\s*(walship|import|export|dbs:)\b.*", block.text, re.MULTILINE)
        if command is not None and not command[0].lstrip().startswith("walship:"):
            raise wellformed.Unfit(f"this is no mere text: {command[0]}")
    else:
        raise wellformed.Unfit(f"nobody knows how to check {block.language}")
    reasons = [*block.directives.get("not run", ()), *block.directives.get("parsed", ())]
    if reasons and (block.language not in _PROGRAMS or len(reasons[0].split()) < 3):
        raise wellformed.Unfit("a program that is not run has a reason")


def _check_commands(block: Block) -> None:
    parsed = subprocess.run(
        ["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=20, check=False
    )
    if parsed.returncode:
        raise wellformed.Unfit(parsed.stderr.strip())
    if fate(block) == "not yet":
        return
    for line in re.sub(r"\\\n", " ", block.text).splitlines():
        words = shlex.split(line, comments=True)
        for word in ("|", ">", "&", "&&", "||", "2>"):
            if word in words:
                words = words[: words.index(word)]
        if words[:1] != ["walship"] or "-h" in words:
            continue
        try:
            cli._parser().parse_args(cli._joined(words[1:]))
        except ConfigError as error:
            raise wellformed.Unfit(f"{line.strip()}: {error}") from error


@pytest.mark.s3
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_run(page: Path, internet: Elsewhere, tmp_path: Path) -> None:
    """The programs of a page do what they should, one after another."""
    ports = free_ports(len(_PORTS))
    steps = [step for block in blocks_of(page) if (step := _step(block, tmp_path, ports))]
    if not any(step["kind"] != "file" for step in steps):
        return
    for bucket in BUCKETS:
        internet.empty_bucket(bucket)
    work = tmp_path / "work"
    work.mkdir()
    for place in ("data", "backup", "path/to", "etc", "scratch"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    log = tmp_path / "log"
    with log.open("wb") as output:
        done = subprocess.run(
            [
                sys.executable,
                page_session.__file__,
                tmp_path / "steps.json",
            ],
            cwd=work,
            env=_environ(internet, ports[0]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=_PAGE_S,
            check=False,
        )
    assert done.returncode == 0, log.read_text(errors="replace")
    if page.stem in SEEN:
        assert set(internet.asked) == SEEN[page.stem]


def _environ(internet: Elsewhere, port: int) -> dict[str, str]:
    """A reader's, who has keys, and the programs of this environment."""
    clean = re.compile(r"AWS_|WALSHIP_|LITESTREAM_|BUCKET_NAME|.*_proxy$", re.IGNORECASE)
    kept = {key: value for key, value in os.environ.items() if not clean.match(key)}
    return {
        **kept,
        **internet.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "UVICORN_PORT": str(port),
    }


def _step(block: Block, root: Path, ports: list[int]) -> dict[str, Any] | None:
    """What `support.page_session` is to do about a block."""
    step: dict[str, Any] = {"where": block.where, "text": _as_reader(block.text, root, ports)}
    for key, said in block.directives.items():
        step[key] = [_as_reader(each, root, ports) for each in said]
    if block.title:
        return {**step, "kind": "file", "title": Path(block.title).name}
    if fate(block) != "run":
        return None
    return {**step, "kind": block.language}


def _as_reader(text: str, root: Path, ports: list[int]) -> str:
    """What a reader makes of a block: keys and directories of their own, the present."""
    for theirs, ours in _KEYS.items():
        text = text.replace(theirs, ours)
    for theirs, port in zip(_PORTS, ports, strict=True):
        text = text.replace(theirs, str(port))
    if _MOMENT in text:
        text = text.replace(_MOMENT, f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}")
    return _PLACES.sub(lambda match: f"{root}{match[0]}", text)


def test_count(record_property: Callable[[str, object], None]) -> None:
    """Prints what became of all blocks; most programs are run."""
    count = Counter(fate(block) for page in PAGES for block in blocks_of(page))
    words = ("run", "checked", "not run", "not yet", "text")
    said = ", ".join(f"{count[word]} {word}" for word in words)
    record_property("summary", f"blocks of code in README and docs: {said}")
    assert count["run"] > count["not run"] + count["not yet"]


@pytest.mark.parametrize(
    "text",
    ["x\n\n    indented\n", "```\nno language\n```\n", "```sh\nno end\n", "<!-- exit: 1 -->\nx\n"],
)
def test_bad_pages(text: str, tmp_path: Path) -> None:
    """Code that nobody would look at is found."""
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(BadPage):
        list(blocks_of(page))
