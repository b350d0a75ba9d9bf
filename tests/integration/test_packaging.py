"""The wheel: built from a clean copy, holding the whole tree and nothing else, usable by itself."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "replica").is_dir(), reason="tests of an installed wheel: there are no sources"
)


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone has of what goes into a package, links as links."""
    tree = tmp_path_factory.mktemp("clean") / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "vfs", "replica"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in ("cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def build(kind: str, tree: Path, output: Path) -> Path:
    """Build a wheel or a source distribution with the build tools of this environment."""
    done = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", output, tree],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(clean_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    pytest.importorskip("build")
    return build("wheel", clean_copy, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's content, as in site-packages; the sources are not there."""
    directory = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def run_from(site: Path, code: str) -> Any:
    """What ``code`` prints as JSON in an interpreter that finds walship in ``site`` only."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected_files(tree: Path) -> dict[str, bytes]:
    """Every file a wheel must hold below ``walship/``, by its name there."""
    package = tree / "src/walship"
    files = {f"walship/{path.name}": path for path in package.glob("*.py") if path.is_file()}
    files["walship/py.typed"] = package / "py.typed"
    for top in (tree / "vfs", tree / "replica", package / "commands", package / "sidecar"):
        for path in top.rglob("*.py"):
            files[f"walship/{top.name}/{path.relative_to(top)}"] = path
    return {name: path.read_bytes() for name, path in files.items()}


def test_wheel_holds_the_tree(wheel: Path, clean_copy: Path) -> None:
    """Every source file is in the wheel with its content, and no other file of ours."""
    with zipfile.ZipFile(wheel) as archive:
        found = {
            name: archive.read(name)
            for name in archive.namelist()
            if ".dist-info/" not in name and not name.endswith("/")
        }
    assert found == expected_files(clean_copy)


def test_source_distribution_makes_the_same_wheel(
    clean_copy: Path, wheel: Path, tmp_path: Path
) -> None:
    """A wheel built from the unpacked source distribution is the one built from the clone."""
    source = build("sdist", clean_copy, tmp_path / "sdist")
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", source, "-C", unpacked], check=True, timeout=60)
    (tree,) = unpacked.iterdir()
    again = build("wheel", tree, tmp_path / "wheel")
    with zipfile.ZipFile(again) as ours, zipfile.ZipFile(wheel) as first:
        names = [name for name in first.namelist() if not name.endswith("RECORD")]
        assert {n: ours.read(n) for n in names} == {n: first.read(n) for n in names}


def test_only_one_name_is_claimed(site: Path) -> None:
    """``vfs``, ``replica`` and ``cli`` stay free for the application: only ``walship`` is taken."""
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"walship"}


def test_import_is_light(site: Path) -> None:
    """``import walship`` comes from the wheel and loads neither the AWS SDK nor the CLI."""
    found = run_from(
        site,
        "import json, walship\n"
        "heavy = ('boto3', 'botocore', 's3transfer', 'tqdm', 'argparse', 'asyncio', 'ssl',\n"
        "         'walship.cli', 'walship.replica.store.s3')\n"
        "print(json.dumps([walship.__file__, [n for n in heavy if n in sys.modules]]))",
    )
    assert found == [str(site / "walship" / "__init__.py"), []]


def test_modules_that_come_when_they_are_named(site: Path) -> None:
    """``import walship`` is enough for ``walship.aio.wait`` and for the middleware."""
    found = run_from(
        site,
        "import json, walship\n"
        "print(json.dumps([walship.aio.wait.__name__, walship.middleware.DurableASGI.__name__,\n"
        "                  hasattr(walship, 'no_such_thing')]))",
    )
    assert found == ["wait", "DurableASGI", False]


def test_directory_replica_needs_no_sdk(site: Path, tmp_path: Path) -> None:
    """Replicating to a directory and restoring from it works from the wheel, without boto3."""
    database, replica = str(tmp_path / "app.db"), str(tmp_path / "replica")
    found = run_from(
        site,
        f"import json, walship\n"
        f"db = walship.connect({database!r}, replica={replica!r})\n"
        f"db.execute('create table t (x)'); db.execute('insert into t values (42)')\n"
        f"walship.replication(db).sync(timeout=20)\n"
        f"db.close()\n"
        f"walship.restore({replica!r}, {database + '-copy'!r})\n"
        f"import apsw\n"
        f"copy = apsw.Connection({database + '-copy'!r})\n"
        f"rows = copy.execute('select x from t').fetchall()\n"
        f"print(json.dumps([rows, 'boto3' in sys.modules]))",
    )
    assert found == [[[42]], False]


def test_public_names_exist(site: Path) -> None:
    """Everything in ``__all__`` is there, and the package is marked as typed."""
    missing = run_from(
        site,
        "import json, walship\n"
        "print(json.dumps([n for n in walship.__all__ if not hasattr(walship, n)]))",
    )
    assert missing == []
    assert (site / "walship" / "py.typed").exists()


def test_metadata(site: Path) -> None:
    """Version, Python, licence and the command are what pyproject.toml and the package say."""
    (info,) = site.glob("*.dist-info")
    metadata = email.message_from_string((info / "METADATA").read_text())
    version = run_from(site, "import json, walship\nprint(json.dumps(walship.__version__))")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == version == project["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (info / "licenses" / "LICENSE").exists()
    assert "walship = walship.cli:main" in (info / "entry_points.txt").read_text()


def test_command_line_from_the_wheel(site: Path) -> None:
    """``walship version`` runs from the wheel."""
    code = "from walship.cli import main\nraise SystemExit(main(['version']))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"],
        cwd=os.sep,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (done.returncode, done.stderr) == (0, "")
    assert project["version"] in done.stdout
