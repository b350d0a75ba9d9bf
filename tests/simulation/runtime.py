"""Threads that run one at a time, in an order and at times that a seed decides.

Every simulated thread is a *task* on an operating system's thread of its own, but only one of them
runs: it goes on until it waits (sleeps, waits for a lock, for a store's answer) and then hands over
to whoever is due next.  Time is virtual: it jumps to the next task's.  So the real modules run as
they are, with locks, loops and time-outs, a thousand times faster than time, and the same seed
gives the same run.

`stand_in` takes the place of the modules ``threading`` and ``queue`` in the modules under test.
"""

from __future__ import annotations

import _thread
import collections
import heapq
import queue as _real_queue
import random
import threading
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

__all__ = ["Killed", "Runtime", "SimulationError", "Task", "active", "stand_in"]

NS = 1_000_000_000


class Killed(BaseException):
    """The simulated process that this thread belongs to has been killed: unwind, touch nothing."""


class SimulationError(AssertionError):
    """The run cannot go on: nothing can happen any more, or too much does."""


class Owner:
    """What tasks belong to, and live and are stopped with: a process, or the world.

    Attributes:
        dead: it was killed; its tasks unwind.
        paused: its tasks do not run (SIGSTOP, or its machine is suspended).
        rate: seconds of its clock in a second of true time.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.paused = False
        self.rate = 1.0
        self.tasks: list[Task] = []
        self.parked: list[tuple[Task, int, bool]] = []

    def ended(self) -> None:
        """Dead, and all tasks have unwound."""


class Task:
    """A simulated thread."""

    def __init__(self, owner: Owner, name: str, action: Callable[[], object]) -> None:
        self.owner = owner
        self.name = name
        self.action = action
        self.token = 0  # counts its waits: what was meant for an earlier one is void
        self.woken = False
        self.ended = False
        self.carrier: _Carrier | None = None
        self.waiting_for = ""
        self.joiners: list[Task] = []
        self.thread: object = None  # what the task's own code takes for its thread

    def __repr__(self) -> str:
        return f"{self.owner.name}/{self.name}"


class _Carrier:
    """An operating system's thread that carries one task after the other."""

    idle: ClassVar[list[_Carrier]] = []

    def __init__(self) -> None:
        self.baton = _thread.allocate_lock()
        self.baton.acquire()
        self.job: tuple[Runtime, Task] | None = None
        threading.Thread(target=self._work, name="carrier", daemon=True).start()

    def _work(self) -> None:
        _here.simulated = True
        while True:
            self.baton.acquire()
            assert self.job is not None
            runtime, task = self.job
            runtime.carry(task)
            self.job = None
            self.idle.append(self)
            runtime.hand_over()


class Runtime:
    """One run.

    Args:
        rng: decides who is next.
        preempt: chance that a task is stopped where others could go on.
        preempt_s: for how long it then is, at most, seconds.
        limit: of steps, before it counts as endless.

    Attributes:
        now_ns: true time, nanoseconds since the run began.
        tokens: of names and nonces, which decide nothing.
        errors: what ended tasks that should not have ended so.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        preempt: float = 0.0,
        preempt_s: float = 0.0,
        limit: int = 200_000,
    ) -> None:
        self.rng = rng
        self.tokens = random.Random(rng.random())
        self.now_ns = 0
        self.current: Task | None = None
        self.errors: list[tuple[Task, BaseException]] = []
        self.steps = 0
        self.trace: Callable[[str], None] | None = None
        self.fingerprint = 0
        self._preempt, self._preempt_s = preempt, preempt_s
        self._limit = limit
        self._heap: list[tuple[int, float, int, Task, int, bool]] = []
        self._front: collections.deque[Task] = collections.deque()
        self._seq = 0
        self._finished = False
        self._world = Owner("world")
        self._owners: list[Owner] = [self._world]
        self._main = _thread.allocate_lock()
        self._main.acquire()

    @property
    def now(self) -> float:
        """True time, seconds."""
        return self.now_ns / NS

    def note(self, *words: object) -> None:
        """Something that a reader of the trace wants to know, and that must come again."""
        text = " ".join(map(str, words))
        line = f"{self.now_ns} {self.steps} {text}"
        self.fingerprint = zlib.crc32(line.encode(), self.fingerprint)
        if self.trace is not None:
            self.trace(f"{self.now:10.4f} {self.current!r:24} {text}")

    # -- tasks --------------------------------------------------------------------------------

    def spawn(
        self,
        action: Callable[[], object],
        name: str,
        owner: Owner | None = None,
        *,
        after_s: float = 0.0,
    ) -> Task:
        """A new task; it begins when it is due."""
        if owner is None:
            owner = self._world
        task = Task(owner, name, action)
        if owner not in self._owners:
            self._owners.append(owner)
        owner.tasks.append(task)
        self._push(self.now_ns + round(after_s * NS), task, True)
        return task

    def run(self, action: Callable[[], object]) -> None:
        """Run until ``action``, which is the first task, and all that it leaves to do has ended."""
        global active
        assert active is None
        active = self

        def first() -> None:
            try:
                action()
            finally:
                self.finish()

        try:
            self.spawn(first, "main")
            self._resume_next()
            self._main.acquire()
        finally:
            active = None

    def finish(self) -> None:
        """End everything: what still runs is killed."""
        if not self._finished:
            self._finished = True
            for owner in self._owners:
                self._kill(owner, self.current)

    def carry(self, task: Task) -> None:
        """Run a task from its beginning to its end, in its carrier's thread."""
        try:
            if not task.owner.dead:
                task.action()
        except Killed:
            pass
        except BaseException as error:
            # What a killed process raises while it unwinds means nothing.
            if not task.owner.dead:
                self.errors.append((task, error))
                self.finish()
        task.ended = True
        for joiner in task.joiners:
            self.wake(joiner)
        owner = task.owner
        owner.tasks.remove(task)
        if owner.dead and not owner.tasks:
            self._bury(owner)

    def hand_over(self) -> None:
        """At the end of a task: let the next one run."""
        self._resume_next()

    def kill(self, owner: Owner) -> None:
        """End all tasks of an owner where they are, before anything else happens.

        Raises:
            Killed: the calling task is one of them.
        """
        self._kill(owner, self.current)
        if self.current is not None and self.current.owner is owner:
            raise Killed

    def _kill(self, owner: Owner, spared: Task | None) -> None:
        if not owner.dead:
            owner.dead, owner.paused = True, False
            owner.parked.clear()
            self._front.extend(task for task in owner.tasks if task is not spared)
            if not owner.tasks:
                self._bury(owner)

    def _bury(self, owner: Owner) -> None:
        try:
            owner.ended()
        except Exception as error:
            self.errors.append((self._blame(), error))

    def _fail(self, error: SimulationError) -> None:
        """End everything from within a wait, whose task is still to be ended itself."""
        self.errors.append((self._blame(), error))
        self._finished = True
        for owner in self._owners:
            self._kill(owner, None)

    def pause(self, owner: Owner) -> None:
        """Stop all tasks of an owner (they keep what they hold) until `resume`."""
        owner.paused = True

    def resume(self, owner: Owner) -> None:
        """Let them go on."""
        owner.paused = False
        parked, owner.parked = owner.parked, []
        for task, token, woken in parked:
            if task.token == token:
                self._push(self.now_ns, task, woken)

    # -- waiting ------------------------------------------------------------------------------

    def sleep(self, seconds: float) -> None:
        """Wait so long, by the clock of the calling task."""
        self.block("sleep", seconds)

    def block(self, why: str, seconds: float | None) -> bool:
        """Wait to be woken; False if the time was over first (None: no limit)."""
        task = self.current
        assert task is not None
        if task.owner.dead:
            raise Killed
        task.token += 1
        task.woken = False
        task.waiting_for = why
        if seconds is not None:
            nanoseconds = max(0, -int(-seconds * NS // task.owner.rate))
            self._push(self.now_ns + nanoseconds, task, False)
        self._switch(task)
        if task.owner.dead:
            raise Killed
        return task.woken

    def wake(self, task: Task) -> None:
        """End the wait of a task."""
        if not task.ended:
            self._push(self.now_ns, task, True)

    def preempt(self) -> None:
        """A point at which others may run."""
        if self._preempt and self.rng.random() < self._preempt:
            self.block("preempted", self._preempt_s * self.rng.random())

    def _push(self, at_ns: int, task: Task, woken: bool) -> None:
        self._seq += 1
        heapq.heappush(self._heap, (at_ns, self.rng.random(), self._seq, task, task.token, woken))

    def _next(self) -> Task | None:
        while self._front:
            task = self._front.popleft()
            if not task.ended:
                task.token += 1
                return task
        self.steps += 1
        if self.steps > self._limit and not self._finished:
            self._fail(SimulationError(f"it goes on without end ({self.steps} steps)"))
            return self._next()
        while self._heap and not self._finished:
            at_ns, _, _, task, token, woken = heapq.heappop(self._heap)
            if task.ended or task.token != token:
                continue
            if task.owner.paused:
                task.owner.parked.append((task, token, woken))
                continue
            self.now_ns = max(self.now_ns, at_ns)
            task.token += 1
            task.woken = woken
            return task
        if not self._finished:
            stuck = ", ".join(
                f"{task} ({task.waiting_for})" for owner in self._owners for task in owner.tasks
            )
            self._fail(SimulationError(f"nothing can happen any more: {stuck}"))
            return self._next()
        return None

    def _blame(self) -> Task:
        return self.current or Task(self._world, "nobody", lambda: None)

    def _switch(self, task: Task) -> None:
        following = self._next()
        if following is task:
            return
        assert following is not None, "a task that waits can always be killed"
        assert task.carrier is not None
        self._start(following)
        task.carrier.baton.acquire()

    def _resume_next(self) -> None:
        following = self._next()
        if following is None:
            self.current = None
            self._main.release()
        else:
            self._start(following)

    def _start(self, task: Task) -> None:
        self.current = task
        if task.carrier is None:
            task.carrier = _Carrier.idle.pop() if _Carrier.idle else _Carrier()
            task.carrier.job = (self, task)
        task.carrier.baton.release()


#: The run that is going on, if one is.
active: Runtime | None = None


def _runtime() -> Runtime:
    assert active is not None, "a lock of the simulation is used outside of it"
    return active


# -- in the place of ``threading`` and ``queue`` ---------------------------------------------------


class _Lock:
    """As ``threading.Lock``, and as ``RLock`` if ``reentrant``."""

    def __init__(self, reentrant: bool = False) -> None:
        self._reentrant = reentrant
        self._holder: Task | None = None
        self._depth = 0
        self._waiters: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        runtime = _runtime()
        me = runtime.current
        if self._reentrant and self._holder is me:
            self._depth += 1
            return True
        if blocking:
            runtime.preempt()
        assert me is not None
        left = None if timeout < 0 else timeout
        deadline = None if left is None else runtime.now + left / me.owner.rate
        while self._depth:
            if not blocking:
                return False
            if deadline is not None:
                left = (deadline - runtime.now) * me.owner.rate
                if left <= 0:
                    return False
            self._waiters.append(me)
            runtime.block("lock", left)
            if me in self._waiters:
                self._waiters.remove(me)
        self._holder, self._depth = me, 1
        return True

    def release(self) -> None:
        if not self._depth:
            raise RuntimeError("release unlocked lock")
        self._depth -= 1
        if self._depth:
            return
        self._holder = None
        waiters, self._waiters = self._waiters, []
        for task in waiters:
            _runtime().wake(task)

    def locked(self) -> bool:
        return self._depth > 0

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Condition:
    """As ``threading.Condition``."""

    def __init__(self, lock: _Lock | None = None) -> None:
        self._lock = lock if lock is not None else _Lock(reentrant=True)
        self._waiters: list[Task] = []
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        runtime = _runtime()
        task = runtime.current
        assert task is not None
        self._waiters.append(task)
        self._lock.release()
        try:
            return runtime.block("condition", timeout)
        finally:
            if task in self._waiters:
                self._waiters.remove(task)
            self._lock.acquire()

    def notify_all(self) -> None:
        waiters, self._waiters = self._waiters, []
        for task in waiters:
            _runtime().wake(task)

    def notify(self, n: int = 1) -> None:
        waiters, self._waiters = self._waiters[:n], self._waiters[n:]
        for task in waiters:
            _runtime().wake(task)


class _Thread:
    """As ``threading.Thread``: a task of the process that makes it."""

    def __init__(
        self, target: Callable[[], object], name: str = "thread", daemon: bool = False
    ) -> None:
        self._target = target
        self.name = name
        self._task: Task | None = None

    def start(self) -> None:
        runtime = _runtime()
        assert runtime.current is not None
        self._task = runtime.spawn(self._target, self.name, runtime.current.owner)
        self._task.thread = self

    def join(self, timeout: float | None = None) -> None:
        runtime = _runtime()
        task, me = self._task, runtime.current
        assert task is not None
        assert me is not None
        if not task.ended:
            task.joiners.append(me)
            runtime.block(f"join {task}", timeout)
            if me in task.joiners:
                task.joiners.remove(me)


class _SimpleQueue:
    """As ``queue.SimpleQueue``."""

    def __init__(self) -> None:
        self._items: collections.deque[Any] = collections.deque()
        self._waiters: list[Task] = []

    def put(self, item: Any) -> None:
        self._items.append(item)
        waiters, self._waiters = self._waiters, []
        for task in waiters:
            _runtime().wake(task)

    def get(self) -> Any:
        runtime = _runtime()
        assert runtime.current is not None
        while not self._items:
            self._waiters.append(runtime.current)
            runtime.block("queue", None)
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._items:
            raise _real_queue.Empty
        return self._items.popleft()


#: Says of the operating system's threads which are the simulation's.
_here = threading.local()


def _is_simulated() -> bool:
    return active is not None and getattr(_here, "simulated", False)


class _StandIn:
    """Takes the place of ``threading`` and ``queue``; outside a run it is the real thing."""

    Empty = _real_queue.Empty

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)

    @staticmethod
    def Lock() -> Any:
        return _Lock() if _is_simulated() else threading.Lock()

    @staticmethod
    def RLock() -> Any:
        return _Lock(reentrant=True) if _is_simulated() else threading.RLock()

    @staticmethod
    def Condition(lock: Any = None) -> Any:
        return _Condition(lock) if _is_simulated() else threading.Condition(lock)

    @staticmethod
    def Thread(**arguments: Any) -> Any:
        return _Thread(**arguments) if _is_simulated() else threading.Thread(**arguments)

    @staticmethod
    def current_thread() -> Any:
        if _is_simulated():
            assert active is not None
            assert active.current is not None
            return active.current.thread
        return threading.current_thread()

    @staticmethod
    def SimpleQueue() -> Any:
        return _SimpleQueue() if _is_simulated() else _real_queue.SimpleQueue()


stand_in = _StandIn()
