"""Runs the benchmarks and prints one table.

    python benchmarks/run.py [--quick] [--rounds N] [--crash-rounds N] [--write] [NAME ...]

Names are those of the modules (see `TOPICS`); all by default.  Results also go to
benchmarks/results/ as JSON and as Markdown; with --write the tables replace those in RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import (
    CONTESTANTS,
    HERE,
    LITESTREAM,
    WALSHIP,
    BenchmarkError,
    Row,
    Setting,
    litestream_program,
)

from support.servers import MissingServer, find_weed, seaweedfs

TOPICS = (
    "commits",
    "reads",
    "lag",
    "bulk",
    "restore",
    "day",
    "delta",
    "memory",
    "idle",
    "crash",
    "durable",
    "loss",
    "outage",
    "takeover",
    "resync",
    "sidecar",
    "levels",
)

#: In RESULTS.md everything behind this line is generated.
MEASURED = "<!-- measured: run.py --write replaces everything below -->"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    rounds = options.rounds or (1 if options.quick else 5)
    crash_rounds = options.crash_rounds or (4 if options.quick else 100)
    about = machine()
    for name, value in about.items():
        print(f"{name}: {value}")
    rows: list[Row] = []
    failed: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="walship-bench-", dir=options.directory) as scratch:
        root = Path(scratch)
        (root / "store").mkdir()
        (root / "work").mkdir()
        try:
            with seaweedfs(root / "store") as endpoint:
                setting = Setting(endpoint, root / "work", rounds, options.quick, crash_rounds)
                for name in options.names or TOPICS:
                    began = time.monotonic()
                    try:
                        found = importlib.import_module(name).run(setting)
                    except BenchmarkError as error:
                        print(f"\n{name}: {error}", file=sys.stderr)
                        failed.append(name)
                        continue
                    rows += found
                    seconds = time.monotonic() - began
                    print(f"\n## {name} ({seconds:.0f} s)\n\n{table(found)}", flush=True)
        except (MissingServer, BenchmarkError) as error:
            print(f"run.py: {error}", file=sys.stderr)
            return 1
    about["rounds"] = str(rounds) + (", quick" if options.quick else "")
    about["load at the end"] = _load()
    about["took"] = f"{time.monotonic() - started:.0f} s"
    _save(results, about, rows, options.write)
    missed = [row for row in rows if row.reached is False]
    print(f"\n{len(missed)} goals missed, {len(failed)} benchmarks failed; took {about['took']}")
    for row in missed:
        assert row.goal is not None
        print(f"  {row.topic}: {row.what}: {row.cell(WALSHIP)}, goal {row.goal.text}")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Measures walship beside plain apsw and Litestream, against SeaweedFS.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TOPICS))
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, 1 round: for development only"
    )
    parser.add_argument("--rounds", type=int, help="rounds of every contestant (default 5)")
    parser.add_argument("--crash-rounds", type=int, help="kills for walship (default 100)")
    parser.add_argument("--directory", help="where databases and store lie (default: temporary)")
    parser.add_argument(
        "--write", action="store_true", help="replace the tables in RESULTS.md; all benchmarks only"
    )
    options = parser.parse_args(arguments)
    if options.write and (options.names or options.quick):
        parser.error("--write is for complete runs: without names, without --quick")
    for name in options.names:
        if name not in TOPICS:
            parser.error(f"no benchmark {name!r}: choose from {', '.join(TOPICS)}")
    for name in ("rounds", "crash_rounds"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


# --- output ---------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; contestants beside the three usual ones get columns too."""
    extra: list[str] = []
    for row in rows:
        for name in row.samples:
            if name not in CONTESTANTS and name not in extra:
                extra.append(name)
    names = [*CONTESTANTS[:2], *extra, WALSHIP]
    lines = [["what", *names, "goal", "reached"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        reached = {None: "", True: "yes", False: "NO"}[row.reached]
        what = f"{row.what} [{row.note}]" if row.note else row.what
        cells = [row.cell(name) for name in names]
        lines.append([what, *cells, row.goal.text if row.goal else "", reached])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _save(results: Path, about: dict[str, str], rows: Sequence[Row], write: bool) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    content: dict[str, Any] = {"about": about, "rows": [row.as_json() for row in rows]}
    (results / f"{stamp}.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "".join(f"- {name}: {value}\n" for name, value in about.items())
    for topic in dict.fromkeys(row.topic for row in rows):
        text += f"\n## {topic}\n\n{table([row for row in rows if row.topic == topic])}\n"
    (results / f"{stamp}.md").write_text(text)
    if write:
        page = HERE / "RESULTS.md"
        kept = page.read_text().partition(MEASURED)[0] if page.exists() else ""
        page.write_text(f"{kept}{MEASURED}\n\n{text}")
    print(f"\nsaved as {results.name}/{stamp}.json and .md")


# --- machine --------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    import apsw

    import walship

    return {
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "load at the start": _load(),
        "python": platform.python_version(),
        "apsw": apsw.apsw_version(),
        "SQLite": apsw.sqlite_lib_version(),
        "walship": walship.__version__,
        LITESTREAM: _first_line([litestream_program(), "version"]),
        "seaweedfs": _first_line([str(find_weed()), "version"]),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _load() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
    except OSError as error:
        return f"unknown ({error.strerror})"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


if __name__ == "__main__":
    sys.exit(main())
