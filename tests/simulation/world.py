"""One run: machines and applications that share a replica, chaos, and what must hold nevertheless.

``run(seed)`` draws everything from the seed: how many machines and processes there are, what the
applications do, how the store fares, who is killed, stopped, cloned or lost and when.  Then the
weather clears, everybody says whether it goes on, and the replica is judged.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

import walship
from walship.replica import capture as capture_module
from walship.replica.config.levels import LevelSettings
from walship.replica.config.settings import DatabaseSettings, ReplicaSettings
from walship.replica.engine import restore_if_missing
from walship.replica.errors import (
    ClosedError,
    ContinuityError,
    GapError,
    IntegrityError,
    NoBackupError,
    ReplicaError,
    RestoreError,
    StoreError,
)
from walship.replica.fence import LEASE_KEY, Lease, parse_lease
from walship.replica.format.ltx import Decoder, Encoder, Header
from walship.replica.listing import list_replica
from walship.replica.restore import restore
from walship.replica.spool import Sealed
from walship.replica.sqlite import FencedError, NotYetReplicated, RefusedError, SpoolError
from walship.replica.store.base import (
    PREVIOUS_METADATA,
    SegmentInfo,
    list_segments,
    segment_key,
)
from walship.replica.store.settings import LocalSettings, S3Settings

from .bucket import Bucket, Client, Weather
from .history import History, Violation
from .machine import Machine, Process
from .runtime import Owner, Runtime

__all__ = ["Outcome", "Profile", "run"]

#: Where simulated disks lie: in memory, if there is such a place.
_BASE = next((d for d in ("/dev/shm", None) if d is None or os.access(d, os.W_OK)), None)

_TOLD = (FencedError, ContinuityError, RefusedError)

#: An asynchronous commit of the only connection of a machine takes no longer, virtual seconds: it
#: waits for nobody but the clock (20 ms, at a gate).
_COMMIT_S = 0.3


@dataclass
class Profile:
    """What kind of world it is.

    Attributes:
        machines: that are there from the beginning.
        processes, threads: that use the database on each machine.
        ops: of each thread.
        chaos, pause_s: events, and the time between two, seconds.
        level_s: interval of level 1; those of levels 2 and 3 are 3 and 9 times as long; seconds.
        snapshot_s: interval and retention of snapshots, seconds.
    """

    theme: str = ""
    machines: int = 1
    processes: int = 1
    threads: int = 1
    ops: int = 12
    chaos: int = 6
    pause_s: float = 2.0
    directory: bool = False
    conditional: str = "yes"
    page_size: int = 512
    page: int = 1000
    interval_s: float = 0.0
    lease_s: float = 10.0
    fence_wait_s: float = 0.0
    open_timeout_s: float = 10.0
    checkpoint_pages: int = 20
    max_sync_wal_bytes: int = 0
    max_spool_bytes: int = 0
    spool_full: str = "resync"
    drift: float = 0.0
    preempt: float = 0.0
    preempt_s: float = 0.0
    on_fenced: str = "refuse"
    level_s: float = 30.0
    snapshot_s: float = 86400.0
    weather: Weather = field(default_factory=Weather)
    events: tuple[str, ...] = ()

    @classmethod
    def draw(cls, rng: random.Random, theme: str | None = None) -> Profile:
        """One of the kinds of worlds in which something is to be learnt, with its details."""
        drawn_theme = rng.choice(tuple(THEMES))
        theme = theme or drawn_theme
        rough = rng.choice((0.0, 0.02, 0.1, 0.25))
        drawn = cls(
            theme=theme,
            ops=rng.choice((4, 10, 25)),
            chaos=rng.choice((2, 5, 10)),
            pause_s=rng.choice((0.3, 2.0, 6.0)),
            directory=rng.random() < 0.12,
            page_size=rng.choice((512, 1024)),
            page=rng.choice((3, 1000)),
            interval_s=rng.choice((0.0, 0.2, 1.0)),
            lease_s=rng.choice((5.0, 5.0, 10.0, 30.0)),
            fence_wait_s=rng.choice((0.0, 15.0, 60.0)),
            checkpoint_pages=rng.choice((3, 20, 1000)),
            max_sync_wal_bytes=rng.choice((0, 0, 4096)),
            max_spool_bytes=rng.choice((0, 0, 0, 20_000)),
            spool_full=rng.choice(("resync", "block", "fail")),
            on_fenced=rng.choice(("refuse", "refuse", "refuse", "local")),
            drift=rng.choice((0.0, 0.1, 0.2)),
            preempt=rng.choice((0.0, 0.01, 0.1)),
            preempt_s=rng.choice((0.0, 0.0, 0.05)),
            weather=Weather(
                lost=rough * rng.choice((0, 0.5)),
                silent=rough * rng.choice((0, 1)),
                late=rough * rng.choice((0, 1)),
                twice=rough * rng.choice((0, 0.5)),
                refused=rough * rng.choice((0, 0.5)),
                slow=rough * rng.choice((0, 1)),
                latest_s=rng.choice((1.0, 20.0, 120.0)),
                timeout_s=rng.choice((0.5, 2.0, 8.0, 30.0)),
            ),
        )
        if rng.random() < 0.7:
            drawn.level_s = rng.choice((1.0, 3.0, 10.0))
            drawn.snapshot_s = rng.choice((0.0, 10.0, 60.0))
        THEMES[theme](drawn, rng)
        return drawn


def _alone(profile: Profile, rng: random.Random) -> None:
    """One process on one machine: the application is never disturbed."""
    profile.events = ("kill", "kill-at", "kill-in-commit", "pause", "outage", "check")
    profile.threads = rng.choice((1, 1, 2))
    if rng.random() < 0.2:  # a store that cannot keep a second writer out
        profile.conditional = rng.choice(("ignored", "refused"))


def _processes(profile: Profile, rng: random.Random) -> None:
    """Several processes on one machine: one uploads, until it dies or hangs."""
    profile.processes = rng.choice((2, 3))
    profile.threads = rng.choice((1, 1, 2))
    profile.events = ("kill", "kill", "kill-at", "kill-in-commit", "pause", "outage", "check")
    if rng.random() < 0.2:
        profile.events += ("foreign", "foreign")


def _fight(profile: Profile, rng: random.Random) -> None:
    """Several machines, each of which believes to be the one."""
    profile.machines = rng.choice((2, 3))
    profile.processes = rng.choice((1, 1, 2))
    profile.events = ("kill", "kill-at", "pause", "pause", "suspend", "suspend", "outage", "check")
    profile.events += ("straggle", "straggle")


def _loss(profile: Profile, rng: random.Random) -> None:
    """Machines are lost with their disks, or come back with an older one."""
    profile.machines = rng.choice((1, 2))
    profile.events = ("kill", "lose", "lose", "rewind", "rewind", "pause", "outage", "check")


def _clones(profile: Profile, rng: random.Random) -> None:
    """Machines are copied while they run."""
    profile.machines = rng.choice((1, 2))
    profile.processes = rng.choice((1, 1, 2))
    profile.events = ("clone", "clone", "kill", "pause", "suspend", "check")


def _retention(profile: Profile, rng: random.Random) -> None:
    """What is old is compacted and removed, while writers sleep."""
    profile.machines = rng.choice((2, 3))
    profile.directory = False
    profile.events = ("compact", "compact", "compact", "suspend", "suspend", "kill", "lose")


def _everything(profile: Profile, rng: random.Random) -> None:
    """All at once."""
    profile.machines = rng.choice((1, 2, 3))
    profile.processes = rng.choice((1, 2, 3))
    profile.threads = rng.choice((1, 2))
    every = ("kill", "kill-at", "kill-in-commit", "pause", "suspend", "outage", "check")
    profile.events = (*every, "compact", "lose", "clone", "rewind", "foreign", "straggle")


THEMES: dict[str, Callable[[Profile, random.Random], None]] = {
    "alone": _alone,
    "processes": _processes,
    "fight": _fight,
    "loss": _loss,
    "clones": _clones,
    "retention": _retention,
    "everything": _everything,
}


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        problem: what was found, or None.
        fingerprint: equal runs have equal ones.
    """

    seed: int
    problem: str | None
    fingerprint: int
    steps: int
    virtual_s: float
    commits: int
    acknowledged: int
    segments: int
    requests: int
    kills: int
    told: int


def run(
    seed: int,
    profile: Profile | None = None,
    *,
    trace: Callable[[str], None] | None = None,
    keep: Path | None = None,
) -> Outcome:
    """Play one seed; `patches.installed` must be in force."""
    # Always the same one in a process: names of files are in what is compared.
    directory = Path(_BASE or tempfile.gettempdir(), f"walship-sim-{os.getpid()}")
    directory.mkdir()
    collected = gc.isenabled()
    gc.disable()  # what is collected when is no matter of chance
    world = World(seed, directory, profile, trace)
    try:
        with world.observed():
            return world.play()
    finally:
        for machine in world.everything:
            machine.close_descriptors()
        if keep is not None:
            shutil.copytree(directory, keep, dirs_exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        if collected:
            gc.enable()


class World:
    """See `run`."""

    def __init__(
        self,
        seed: int,
        directory: Path,
        profile: Profile | None,
        trace: Callable[[str], None] | None,
    ) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.directory = directory
        self.profile = profile or Profile.draw(rng)
        self.rng = random.Random(rng.random())
        self.runtime = Runtime(
            random.Random(rng.random()),
            preempt=self.profile.preempt,
            preempt_s=self.profile.preempt_s,
        )
        self.runtime.trace = trace
        self.bucket = Bucket(
            self.runtime,
            random.Random(rng.random()),
            directory=self.profile.directory,
            conditional=self.profile.conditional,
            skew_s=rng.choice((0.0, 7200.0, -3e8)),
            page=self.profile.page,
        )
        self.bucket.weather = self.profile.weather
        self.bucket.watch = self.landed
        self.bucket.stopped = self.stop_straggler
        self._lease: tuple[Lease, Process] | None = None
        self._former: tuple[Lease, Process] | None = None  # who was the writer, until another is
        self.history = History(seed)
        self.machines: list[Machine] = []
        self.everything: list[Machine] = []
        self.problems: list[str] = []
        self.calm = False
        self.n_disks = 0
        self.origins: dict[str, frozenset[str]] = {}  # of a disk: those that it is a copy of
        self._images: dict[Path, frozenset[str]] = {}
        self.n_told = 0
        self.n_kills = 0
        self.acked_objects: dict[int, str] = {}
        self._checks = 0
        self._walked = directory / "walked"
        self._applied: dict[int, str] = {}  # TXID: which version of its segment

    # -- the whole ----------------------------------------------------------------------------

    def play(self) -> Outcome:
        self.runtime.run(self._main)
        for task, error in self.runtime.errors:
            self.problems.append(f"{task}: {type(error).__name__}: {error}")
            self._trace_error(error)
        if not self.problems:
            self._attempt("in the end", self.verify)
        return Outcome(
            seed=self.seed,
            problem=self.problems[0] if self.problems else None,
            fingerprint=self.runtime.fingerprint,
            steps=self.runtime.steps,
            virtual_s=self.runtime.now,
            commits=self.history.count,
            acknowledged=len(self.history.acknowledged),
            segments=len(self.acked_objects),
            requests=self.bucket.n_requests,
            kills=self.n_kills,
            told=self.n_told,
        )

    def _trace_error(self, error: BaseException) -> None:
        if self.runtime.trace is not None:
            import traceback

            self.runtime.trace("".join(traceback.format_exception(error)))

    def _main(self) -> None:
        for _ in range(self.profile.machines):
            self.add_machine()
        self.runtime.sleep(2.0)
        for _ in range(self.profile.chaos):
            self.runtime.sleep(self.rng.expovariate(1 / self.profile.pause_s))
            self.happen(self.rng.choice(self.profile.events))
        self.runtime.sleep(self.rng.expovariate(0.3))
        self.runtime.note("the weather clears")
        self.calm = True
        self.bucket.weather = Weather(latest_s=self.profile.weather.latest_s)
        self.bucket.away_until = 0.0
        self.bucket.straggler = None
        self.bucket.release()
        for machine in self.machines:
            for process in machine.processes:
                process.kill_in, process.kill_in_commit = None, False
                self.runtime.resume(process)
        deadline = self.runtime.now + 1500
        while not all(machine.settled for machine in self.machines):
            if self.runtime.now > deadline:
                waiting = [machine.name for machine in self.machines if not machine.settled]
                raise Violation(f"{waiting} neither go on nor are told why not")
            self.runtime.sleep(0.5)
        self.verify()
        self.bucket.land_everything()
        self.verify()
        # Whoever comes now can go on.
        last = self.add_machine(wait_s=200.0)
        while not last.settled:
            self.runtime.sleep(0.5)
        if last.told is not None:
            raise Violation(f"nobody is there any more, but a new machine is told: {last.told}")
        self.verify()

    def problem(self, text: str) -> None:
        """A promise was broken; the run goes on, for what it still shows."""
        self.runtime.note("PROBLEM", text)
        self.problems.append(text)

    def _attempt(self, when: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (AssertionError, ReplicaError, apsw.Error) as error:
            self.problems.append(f"{when}: {type(error).__name__}: {error}")
            self._trace_error(error)

    # -- machines -----------------------------------------------------------------------------

    def add_machine(self, *, wait_s: float | None = None, copy_of: Path | None = None) -> Host:
        name = f"m{len(self.everything)}"
        machine = Host(
            self.runtime,
            name,
            self.directory / name,
            random.Random(self.rng.random()),
            self.profile.drift,
        )
        machine.wait_s = self.profile.fence_wait_s if wait_s is None else wait_s
        if copy_of is not None:
            shutil.copytree(copy_of, machine.directory, dirs_exist_ok=True)
        self.new_disk(machine, self._images.get(copy_of, frozenset()) if copy_of else frozenset())
        self.machines.append(machine)
        self.everything.append(machine)
        self.runtime.spawn(lambda: self.supervise(machine), f"supervise-{name}")
        return machine

    def new_disk(self, machine: Host, origins: frozenset[str]) -> None:
        """What is on the machine's disk now is nobody's continuation but its own."""
        self.n_disks += 1
        machine.disk = f"{machine.name}/{self.n_disks}"
        machine.boot = f"boot-{self.n_disks}"
        self.origins[machine.disk] = origins
        machine.tail = 0

    def copy(self, machine: Host, image: Path) -> None:
        """Take a snapshot of a machine's volume."""
        self.history.copied(machine.disk)
        machine.copy_to(image)
        self._images[image] = self.origins[machine.disk] | {machine.disk}

    def supervise(self, machine: Host) -> None:
        """Keep the machine's processes running, as an operator would."""
        rng = random.Random(self.rng.random())
        self.runtime.sleep(rng.expovariate(1.0))
        while not machine.gone:
            wanted = 1 if self.calm else self.profile.processes
            if self.calm and machine.settled:
                return
            if len(machine.processes) < wanted and self.runtime.now >= machine.not_before:
                self.start(machine, rng)
            self.runtime.sleep(0.2 + rng.random())

    def start(self, machine: Host, rng: random.Random) -> None:
        process = machine.start(self.bucket, random.Random(rng.random()))
        if not self.calm and rng.random() < 0.1:
            process.kill_in = rng.randrange(400)
        self.runtime.note("starts", process.name)
        process.spawn(lambda: self.live(machine, process), "app-0")

    def kill(self, process: Process) -> None:
        self.n_kills += 1
        process.kill()
        self.runtime.sleep(0.0)  # by then it is gone

    # -- what happens -------------------------------------------------------------------------

    def happen(self, event: str) -> None:
        rng = self.rng
        machine = rng.choice(self.machines)
        process = rng.choice(machine.processes) if machine.processes else None
        self.runtime.note("event", event, process.name if process else machine.name)
        if event == "outage":
            self.bucket.away_until = self.runtime.now + rng.choice((0.5, 3, 15, 60))
        elif event == "check":
            self.verify()
        elif event == "compact":
            self.compact()
        elif event == "lose":
            self.lose(machine)
        elif event == "clone":
            if len(self.machines) < 4:
                clone = self.directory / f"image-{len(self.everything)}"
                self.copy(machine, clone)
                self.add_machine(copy_of=clone)
        elif event == "rewind":
            image = self.directory / f"image-of-{machine.name}"
            if image.exists():
                self.lose(machine, image)
                shutil.rmtree(image)
            else:
                self.copy(machine, image)
        elif process is None:
            return
        elif event == "kill":
            self.kill(process)
        elif event == "kill-at":
            process.kill_in = rng.randrange(150)
        elif event == "kill-in-commit":
            process.kill_in_commit = True
        elif event == "pause":
            self.pause([process], rng.choice((1.0, 8.0, 15.0, 70.0)))
        elif event == "suspend":
            self.pause(list(machine.processes), rng.choice((8.0, 15.0, 70.0, 4000.0)))
        elif event == "straggle":
            self.bucket.straggler = process
        elif event == "foreign":
            self.commit_from_outside(machine)

    def pause(self, processes: list[Process], seconds: float) -> None:
        for process in processes:
            self.runtime.pause(process)
            process.machine.stopped_until = self.runtime.now + seconds + 1  # type: ignore[attr-defined]

        def go_on() -> None:
            for process in processes:
                self.runtime.note("goes on", process.name)
                self.runtime.resume(process)

        self.runtime.spawn(go_on, "alarm", after_s=seconds)

    def stop_straggler(self, process: Owner) -> None:
        """A segment is on its way that lands late: so late that it is somebody else's turn."""
        assert isinstance(process, Process)
        self.pause([process], self.rng.choice((15.0, 70.0, 600.0)))

    def lose(self, machine: Host, image: Path | None = None) -> None:
        """The machine is gone with its disk; another takes its place, perhaps from an old image."""
        for process in list(machine.processes):
            self.kill(process)
        machine.wipe()
        machine.pipes.clear()
        machine.locks.clear()
        if image is not None:
            shutil.copytree(image, machine.directory, dirs_exist_ok=True)
        self.new_disk(machine, self._images[image] if image is not None else frozenset())
        machine.told = None

    def compact(self) -> None:
        """Snapshot what is acknowledged, and remove what is old in level 0, as retention does."""
        store = Client(self.bucket)
        up_to = max(self.acked_objects, default=0)
        if not up_to or self.profile.directory:
            return
        self._walk(up_to)
        body = self._walked.read_bytes()
        page_size = self.profile.page_size
        parts: list[bytes] = []
        header = Header(
            page_size=page_size,
            commit=len(body) // page_size,
            min_txid=1,
            max_txid=up_to,
            timestamp_ms=self.bucket.now_ms(),
        )
        encoder = Encoder(lambda pieces: parts.extend(bytes(p) for p in pieces), header)
        for n in range(len(body) // page_size):
            encoder.add_page(n + 1, body[n * page_size : (n + 1) * page_size])
        encoder.finish()
        store.put(segment_key(store, 9, 1, up_to), b"".join(parts))
        old = [info.key for info in list_segments(store, 0) if info.max_txid < up_to]
        store.delete(old)

    def commit_from_outside(self, machine: Host) -> None:
        """A program that does not use the VFS writes to the database, and perhaps checkpoints."""
        if not machine.path.exists() or machine.path.stat().st_size == 0:
            return
        connection = apsw.Connection(str(machine.path), vfs="unix")
        try:
            connection.set_busy_timeout(0)
            if connection.pragma("journal_mode") != "wal":
                return
            for _ in range(self.rng.choice((1, 3))):
                self._commit(machine, connection, self.rng, "foreign")
            if self.rng.random() < 0.6:
                mode = self.rng.choice(("PASSIVE", "TRUNCATE", "RESTART"))
                connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        except (apsw.BusyError, apsw.LockedError):
            pass
        finally:
            connection.close(True)
            machine.touch(machine.path.stat().st_ino)

    # -- the application ----------------------------------------------------------------------

    def live(self, machine: Host, process: Process) -> None:
        """The main thread of a process."""
        try:
            connection = self.open(machine, process)
        except _TOLD as error:
            self.told(machine, process, error, "open")
            process.exit()
        except (GapError, IntegrityError) as error:
            self.problem(f"{process.name} cannot open: {type(error).__name__}: {error}")
            process.exit()
        except (StoreError, RestoreError, SpoolError, apsw.BusyError, apsw.CantOpenError) as error:
            self.runtime.note("does not open:", type(error).__name__, _without_tokens(error))
            process.exit()
        threads = [
            process.spawn(lambda: self.work(machine, process, None), f"app-{n + 1}")
            for n in range(self.profile.threads - 1)
            if not self.calm
        ]
        self.work(machine, process, connection)
        while any(not thread.ended for thread in threads):
            self.runtime.sleep(0.1)
        self.runtime.note("ended well")
        process.exit()

    def told(self, machine: Host, process: Process, error: Exception, where: str) -> None:
        """An application has learnt that it may not go on."""
        self.n_told += 1
        self.runtime.note("is told at", where, type(error).__name__, _without_tokens(error))
        if self.n_disks < 2:
            self.problem(f"told without a rival: {type(error).__name__}: {error}")
        if isinstance(error, FencedError) and self._has_lease(process):
            self.problem(f"{process.name} has the lease and is told: {error}")
        machine.told = error
        if self.calm:
            machine.settled = True
        elif self.rng.random() < 0.5:
            # The operator gives this side up and restores it.
            self.runtime.spawn(lambda: self.lose(machine), "operator", after_s=self.rng.random())
        machine.not_before = self.runtime.now + self.rng.expovariate(0.2)

    def _has_lease(self, process: Process) -> bool:
        """Whether it is the writer, and has waited for that until no other could be one."""
        engine = process.registry.engine(str(process.machine.path))
        if engine is None or self._lease is None or not self._lease[0].owner:
            return False
        key = segment_key(Client(self.bucket), 0, *(2 * [engine.capture.state.acked_txid + 1]))
        found = self.bucket.objects.get(key)
        by_walship = found is not None and PREVIOUS_METADATA in found.metadata
        return by_walship and self._lease[1] is process and engine.fence._outlasted

    def open(self, machine: Host, process: Process) -> walship.Connection:
        """As `walship.connect` does."""
        settings = self.settings(machine)
        process.registry.configure(settings)
        if process.registry.engine(str(machine.path)) is None:
            restore_if_missing(settings, process.host)
        connection = walship.Connection(
            str(machine.path),
            flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE,
            vfs=process.vfs_name,
        )
        process.connections.append(connection)
        try:
            connection.set_busy_timeout(5000)
            connection.wal_autocheckpoint(self.profile.checkpoint_pages)
            connection.pragma("page_size", self.profile.page_size)
            if connection.pragma("journal_mode", "wal") != "wal":
                raise Violation("not in WAL mode")
            machine.saw(self.history, self.history.tail(connection))
        except BaseException:
            if not process.dead:
                connection.close(True)
            raise
        return connection

    def settings(self, machine: Host) -> DatabaseSettings:
        profile = self.profile
        store: Any = S3Settings(bucket="replica")
        if profile.directory:
            store = LocalSettings(path=Path("/replica"))
        return DatabaseSettings(
            path=machine.path,
            meta_path=machine.state,
            replica=ReplicaSettings(store=store, sync_interval_s=profile.interval_s),
            busy_timeout_s=5.0,
            open_timeout_s=profile.open_timeout_s,
            shutdown_sync_timeout_s=30.0,
            max_sync_wal_bytes=profile.max_sync_wal_bytes,
            max_spool_bytes=profile.max_spool_bytes,
            spool_full=profile.spool_full,  # type: ignore[arg-type]
            spool_full_timeout_s=5.0,
            fence_lease_s=profile.lease_s,
            fence_wait_s=machine.wait_s,
            on_fenced=profile.on_fenced,  # type: ignore[arg-type]
            levels=LevelSettings(
                intervals_s=tuple(profile.level_s * factor for factor in (1, 3, 9)),
                snapshot_interval_s=profile.snapshot_s,
                snapshot_retention_s=profile.snapshot_s,
                l0_retention_s=profile.lease_s,
                l0_retention_check_interval_s=profile.level_s,
            ),
        )

    def work(self, machine: Host, process: Process, connection: walship.Connection | None) -> None:
        """One thread of an application: some operations, then a clean end."""
        rng = random.Random(process.rng.random())
        try:
            if connection is None:
                connection = self.open(machine, process)
            if not self.calm:
                connection = self.use(machine, process, connection, rng)
            if self.calm:
                self.settle(machine, process, connection)
            connection.close(True)
        except _TOLD as error:
            self.told(machine, process, error, "work")
            self.close(process, connection)
        except ClosedError as error:
            self.problem(f"{process.name}: {error}")
        except (StoreError, SpoolError, apsw.BusyError, apsw.CantOpenError) as error:
            self.runtime.note("stops:", type(error).__name__, _without_tokens(error))
            self.close(process, connection)

    def close(self, process: Process, connection: walship.Connection | None) -> None:
        if connection is not None and not process.dead:
            with contextlib.suppress(SpoolError, *_TOLD):  # at the gate: the WAL stays
                connection.close(True)

    def use(
        self,
        machine: Host,
        process: Process,
        connection: walship.Connection,
        rng: random.Random,
    ) -> walship.Connection:
        for _ in range(self.profile.ops):
            self.runtime.sleep(rng.choice((0.0, 0.01, 0.1, 0.1, 1.0)))
            if self.calm:
                break
            op = rng.choice(_OPS)
            try:
                if op == "commit":
                    self.commit(machine, process, connection, rng)
                elif op == "sync":
                    self.sync(machine, process, rng.choice((0.0, 1.0, 20.0)))
                elif op == "durable":
                    number = self.commit(machine, process, connection, rng)
                    if number:
                        self.sync(machine, process, rng.choice((1.0, 5.0)), number)
                elif op == "status":
                    self.look_at_status(process)
                elif op == "checkpoint":
                    mode = rng.choice(("PASSIVE", "FULL", "RESTART", "TRUNCATE"))
                    connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
                elif op == "vacuum":
                    connection.execute("VACUUM")
                elif op == "rollback":
                    connection.execute("BEGIN IMMEDIATE")
                    for n in range(20):
                        connection.execute("REPLACE INTO cells VALUES (?, -1, zeroblob(900))", (n,))
                    connection.execute("ROLLBACK")
                elif op == "read":
                    connection.execute("BEGIN")
                    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
                    self.runtime.sleep(rng.choice((0.1, 1.0)))
                    connection.execute("COMMIT")
                else:
                    connection.close(True)
                    connection = self.open(machine, process)
            except (apsw.BusyError, apsw.SQLError) as error:
                self.runtime.note(op, "is refused:", type(error).__name__)
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        return connection

    def commit(
        self,
        machine: Host,
        process: Process,
        connection: walship.Connection,
        rng: random.Random,
    ) -> int:
        """One transaction; its number, or 0 if SQLite was busy."""
        began = self.runtime.now
        try:
            return self._commit(machine, connection, rng, process.name)
        except (apsw.BusyError, SpoolError) as error:
            self.runtime.note("commit:", type(error).__name__)
            full = isinstance(error, SpoolError) and self.profile.max_spool_bytes
            if isinstance(error, SpoolError) and not full and not machine.was_stopped():
                raise
            return 0
        finally:
            took = self.runtime.now - began
            alone = self.profile.processes == self.profile.threads == 1
            full = self.profile.spool_full == "block" and self.profile.max_spool_bytes
            full = full or self.profile.preempt_s
            if alone and took > _COMMIT_S and not machine.was_stopped() and not full:
                self.problem(f"{process.name}: a commit took {took:.3f} s")

    def _commit(
        self, machine: Host, connection: apsw.Connection, rng: random.Random, who: str
    ) -> int:
        number = 0
        big = rng.random() < 0.1
        if big:
            connection.execute("PRAGMA cache_size = 5")
        try:
            connection.execute("BEGIN IMMEDIATE")
            tail = self.history.tail(connection)
            self.history.look(tail, machine.disk)
            number = self.history.begin(tail, machine.disk)
            self.history.make_tables(connection)
            if big:
                for n in range(30):
                    connection.execute(
                        "REPLACE INTO cells VALUES (?, -1, zeroblob(700))", (1000 + n,)
                    )
                connection.execute("DELETE FROM cells WHERE k >= 1000")
            self.history.write(connection, number)
            connection.execute("COMMIT")
        except Exception:
            if number and not any(p.dead for p in (self.runtime.current.owner,)):  # type: ignore[union-attr]
                self.history.failed(number)
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self.history.done(number)
        machine.saw(self.history, number)
        self.runtime.note("committed", number, "after", tail, "by", who)
        return number

    def sync(self, machine: Host, process: Process, timeout: float, number: int = 0) -> None:
        engine = process.registry.engine(str(machine.path))
        assert engine is not None
        number = number or machine.tail
        try:
            txid = engine.sync(timeout)
        except NotYetReplicated:
            self.runtime.note("not yet", number)
            return
        self.runtime.note("synced", number, "in", txid)
        self.history.acknowledge(number, f"{process.name} at {self.runtime.now:.3f}, txid {txid}")

    def look_at_status(self, process: Process) -> None:
        engine = process.registry.engine(str(process.machine.path))
        assert engine is not None
        status = engine.status()
        txid = status.replicated_txid
        self.runtime.note("status", status.state, txid, status.fence, status.last_error is None)
        if txid and not self._was_stored(txid):
            self.problem(f"{process.name} says that txid {txid} is replicated, and it never was")

    def settle(self, machine: Host, process: Process, connection: walship.Connection) -> None:
        """The weather is fair: this process goes on, or is told why it cannot."""
        for _ in range(200):
            number = self.commit(machine, process, connection, self.rng)
            if number:
                break
            self.runtime.sleep(1.0)
        else:
            raise Violation(f"{process.name} cannot commit any more")
        engine = process.registry.engine(str(machine.path))
        assert engine is not None
        number = machine.tail
        txid = engine.sync(400.0)
        self.runtime.note("goes on:", number, "in", txid)
        self.history.acknowledge(number, f"{process.name} in the end, txid {txid}")
        machine.settled = True
        machine.told = None

    # -- judging ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def observed(self) -> Iterator[None]:
        """Notice what the engines count as acknowledged, when they do."""
        real = capture_module.Capture.acknowledge
        world = self

        def acknowledge(self: capture_module.Capture, txid: int) -> None:
            for sealed in self.state.segments:
                if sealed.txid <= txid:
                    world.counted(sealed)
            real(self, txid)

        capture_module.Capture.acknowledge = acknowledge  # type: ignore[method-assign]
        logger = logging.getLogger("walship")
        handler = _Log(self.runtime)
        logger.addHandler(handler)
        propagates, logger.propagate = logger.propagate, False
        level = logger.level
        logger.setLevel(logging.INFO if self.runtime.trace else logging.ERROR)
        try:
            yield
        finally:
            capture_module.Capture.acknowledge = real  # type: ignore[method-assign]
            logger.removeHandler(handler)
            logger.propagate = propagates
            logger.setLevel(level)

    def counted(self, sealed: Sealed) -> None:
        """A segment is acknowledged: it is in the replica, and no other was before."""
        self.runtime.note("acknowledges", sealed.txid)
        key = segment_key(Client(self.bucket), 0, sealed.txid, sealed.txid)
        if self.bucket.everything.get(key) != sealed.sha256:
            self.problem(f"txid {sealed.txid} is acknowledged and is not in the replica")
        before = self.acked_objects.setdefault(sealed.txid, sealed.sha256)
        if before != sealed.sha256:
            self.problem(f"txid {sealed.txid} is acknowledged twice, with other content")

    def landed(self, key: str, body: bytes, who: Owner) -> None:
        """An object is in the replica: nobody's, as long as another one believes to be the writer.

        Whoever takes the lease over may still wait; it goes on when its first segment lands.
        """
        assert isinstance(who, Process)
        if key == LEASE_KEY:
            lease = parse_lease(body)
            assert lease is not None
            if self._lease is not None and lease.nonce != self._lease[0].nonce:
                self.bucket.release()
                self._former = None
                if not self._knows_nonce(who, self._lease[1]):
                    self._former = self._lease
            self._lease = (lease, who)
        elif (
            self._former is not None
            and self._lease is not None
            and who is self._lease[1]
            and key.startswith(Client(self.bucket).level_prefix(0))
        ):
            former, self._former = self._former, None
            self._judge_take_over(*former, who)

    def _knows_nonce(self, successor: Process, former: Process) -> bool:
        return successor.disk == former.disk or former.disk in self.origins[successor.disk]

    def _judge_take_over(self, lease: Lease, former: Process, successor: Process) -> None:
        """By its own clock, and what it was told of its last sign of life, the former writer must
        know by now that it may be none any more."""
        engine = None if former.dead else former.registry.engine(str(former.machine.path))
        if engine is None or engine.fence._lease is None:
            return
        fence = engine.fence
        if fence.works and fence._lease.nonce == lease.nonce and fence.holds():
            self.problem(
                f"{successor.name} goes on, and {former.name} believes for another "
                f"{lease.lease_s * 2 / 3 - fence._age():.3f} s that it is the writer"
            )

    def _was_stored(self, txid: int) -> bool:
        return segment_key(Client(self.bucket), 0, txid, txid) in self.bucket.everything

    def verify(self) -> None:
        """What the replica holds now is one history, and all that was acknowledged.

        Raises:
            Violation: it is not.
        """
        self._checks += 1
        target = self.directory / f"restored-{self._checks}"
        store = Client(self.bucket)
        try:
            result = restore(store, target, clock=_NoClock())
        except NoBackupError:
            if self.history.acknowledged:
                told = sorted(self.history.acknowledged)
                raise Violation(f"the replica is empty, and {told} were acknowledged") from None
            return
        newest = self.history.judge(target)
        missing = self.history.missing(newest)
        self.runtime.note("restored txid", result.txid, "commit", newest)
        if missing:
            told = self.history.acknowledged[missing[0]]
            raise Violation(
                f"acknowledged and not in the replica: commits {missing} (the first by {told}); "
                f"txid {result.txid} ends with {newest}"
            )
        assert result.txid is not None
        self._walk(result.txid)
        if self._walked.read_bytes() != target.read_bytes():
            raise Violation("applying all segments gives another database than restore does")
        target.unlink()

    def _walk(self, stop: int) -> None:
        """Apply what the replica holds to a file, TXID by TXID, and judge the database after each.

        Goes on where it stopped the last time, if what was applied then is still there.
        """
        store = Client(self.bucket)
        listing = [info for info in list_replica(store) if info.max_txid <= stop]
        versions = {
            info.max_txid: self.bucket.objects[info.key].etag for info in listing if not info.level
        }
        if max(self._applied, default=0) > stop or any(
            etag and versions.get(txid, etag) != etag for txid, etag in self._applied.items()
        ):
            self._applied.clear()
            self._walked.unlink()
        self._walked.touch()
        while following := self._following(listing, max(self._applied, default=0)):
            self._apply(store.get(following.key))
            self._applied[following.max_txid] = (
                "" if following.level else self.bucket.objects[following.key].etag
            )
            self.history.judge(self._walked)
        txid = max(self._applied, default=0)
        if txid != stop:
            raise Violation(f"txid {txid} cannot be continued to {stop}")

    def _following(self, listing: list[SegmentInfo], txid: int) -> SegmentInfo | None:
        """What goes on from a TXID in the smallest step; from the newest snapshot, if there is one
        behind it."""
        later = [info for info in listing if info.min_txid <= txid + 1 and info.max_txid > txid]
        snapshots = [info for info in later if info.level == 9]
        if snapshots and not any(info.max_txid == txid + 1 for info in later if info.level < 9):
            return snapshots[-1]
        return min(later, key=lambda info: (info.max_txid, -info.level), default=None)

    def _apply(self, body: bytes) -> None:
        decoder = Decoder(body)
        header = decoder.header
        with self._walked.open("r+b") as file:
            for pgno, page in decoder:
                file.seek((pgno - 1) * header.page_size)
                file.write(page)
            file.truncate(header.commit * header.page_size)


class Host(Machine):
    """A machine, and what its operator knows.

    Attributes:
        tail: newest commit that its database is known to hold.
        told: why it does not go on, if an application was told.
        settled: in the calm after the chaos, it goes on or knows why not.
        not_before: true time before which it is not started again, seconds.
        stopped_until: true time until which a process of it may be stopped.
    """

    tail = 0
    told: Exception | None = None
    settled = False
    gone = False
    not_before = 0.0
    stopped_until = -1.0
    wait_s = 0.0

    def saw(self, history: History, number: int) -> None:
        """A commit is in its database."""
        if history.depth(number) >= history.depth(self.tail):
            self.tail = number

    def was_stopped(self) -> bool:
        """Whether a process may have been stopped just now, with locks."""
        return self.runtime.now < self.stopped_until


class _Log(logging.Handler):
    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def emit(self, record: logging.LogRecord) -> None:
        trace = self._runtime.trace
        if trace is not None:
            where = f"{self._runtime.now:10.4f} {self._runtime.current!r:24}"
            trace(f"{where}   log: {record.getMessage()}")
            if record.exc_info:
                import traceback

                trace("".join(traceback.format_exception(*record.exc_info)))
        if record.exc_info:
            raise_kept(self._runtime, record)


def raise_kept(runtime: Runtime, record: logging.LogRecord) -> None:
    """An unexpected error that was only logged is a failure here."""
    assert record.exc_info is not None
    assert record.exc_info[1] is not None
    current = runtime.current
    if current is not None and not current.owner.dead:
        runtime.errors.append((current, record.exc_info[1]))


class _NoClock:
    def now_ms(self) -> int:
        return 0

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        pass


def _without_tokens(error: Exception) -> str:
    return str(error)[:300]


_OPS = (
    ["commit"] * 10
    + ["sync"] * 3
    + ["durable"] * 4
    + ["checkpoint"] * 3
    + ["status", "vacuum", "rollback", "read", "reopen"]
)
