"""One thread for each database: opens it once it is there, watches it, and begins again.

What goes wrong is said once, however often it is tried.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Final, Literal

import apsw

from walship.replica.clock import SystemClock
from walship.replica.config.settings import DatabaseSettings
from walship.replica.engine import restore_if_missing
from walship.replica.errors import ClosedError, ConfigError, ContinuityError, ReplicaError
from walship.replica.sqlite import FencedError, RefusedError

from .database import Sidecar

__all__ = ["Worker", "WorkerState"]

log = logging.getLogger("walship.sidecar")

WorkerState = Literal["opening", "waiting", "replicating", "failed", "stopped"]

_clock: Final = SystemClock()

#: Pauses between two looks at a database, seconds: a tenth of its sync interval, within these.
_POLL_S: Final = (0.01, 0.1)
#: The same once nothing has happened for a number of looks.
_IDLE_POLL_S: Final = 0.5
_IDLE_POLLS: Final = 20
#: Pause before a database that is not there, or cannot be opened yet, is looked for again, seconds.
_RETRY_S: Final = 1.0
#: The same after a refusal, which takes a person to end it: pauses double from the first to the
#: second, seconds.  Each attempt costs some requests, and a line in the log.
_REFUSED_S: Final = 10.0
_REFUSED_LONGEST_S: Final = 60.0
#: Time that the last uploads get at least, however long opening took, seconds.
_LEAST_S: Final = 0.1


class Worker:
    """Replicates one database until it is stopped.  Thread-safe.

    Args:
        settings: the database, with its replica.
        restore_missing: restore it first if the file is missing and the replica has data.
    """

    def __init__(self, settings: DatabaseSettings, *, restore_missing: bool) -> None:
        self.settings = settings
        self.path = str(settings.path)
        self._restore_missing = restore_missing
        self._stopping = threading.Event()
        # By when the last uploads must have ended, once it is told to stop; set before that event.
        self._deadline: float | None = None
        # Guards the fields below, and says when one of them changes.
        self._changed = threading.Condition()
        self._state: WorkerState = "opening"
        self._sidecar: Sidecar | None = None
        self._error: Exception | None = None
        self._drained = True
        self._refusals = 0  # in a row
        low, high = _POLL_S
        assert settings.replica is not None
        self._poll_s = min(high, max(low, settings.replica.sync_interval_s / 10))
        self._thread = threading.Thread(
            target=self._run, name=f"walship:{settings.path.name}:sidecar", daemon=True
        )

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    @property
    def state(self) -> WorkerState:
        """Where it stands: "waiting" is for the file to appear, "failed" is tried again."""
        return self._state

    @property
    def error(self) -> Exception | None:
        """Why it failed, if it did."""
        return self._error

    def wait_opened(self, timeout: float) -> bool:
        """Wait until the first attempt to open the database has ended; False after ``timeout``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state != "opening", timeout)

    def sidecar(self) -> Sidecar:
        """What ships the database now.

        Raises:
            ClosedError: nothing does; the message says why.
        """
        with self._changed:
            if self._sidecar is None:
                why = f": {self._error}" if self._error is not None else ""
                raise ClosedError(f"{self.path} is not being replicated ({self._state}){why}")
            return self._sidecar

    def stop(self) -> None:
        """Ask it to ship what is there, within ``shutdown-sync-timeout`` from now, and to let go of
        the database; returns at once."""
        if self._deadline is None:
            self._deadline = _clock.monotonic() + self.settings.shutdown_sync_timeout_s
        self._stopping.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end.

        Returns:
            Whether it has ended, with everything in the replica.
        """
        self._thread.join(timeout)
        return not self._thread.is_alive() and self._drained

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            pause = self._attempt()
            self._stopping.wait(pause)
        with self._changed:
            self._drained = self._drained and self._error is None
            self._state = "stopped"
            self._changed.notify_all()

    def _attempt(self) -> float:
        """Open the database and stay with it; returns after how many seconds to try again."""
        try:
            if not self._is_there():
                self._become("waiting", None)
                return _RETRY_S
            sidecar = Sidecar(self.settings)
            self._become("replicating", None, sidecar)
            self._refusals = 0
            if not sidecar.engine.uploader.leads:
                log.info("%s: another process uploads it; this one stands by", self.path)
            try:
                return self._watch(sidecar)
            finally:
                with self._changed:
                    self._sidecar = None
                sidecar.close(self._left_s())
        except (ConfigError, ContinuityError, FencedError, RefusedError) as error:
            self._become("failed", error)
            return self._refused_s()
        except (ReplicaError, apsw.Error, OSError) as error:
            self._become("failed", error)
            return _RETRY_S
        except Exception as error:
            log.exception("%s: unexpected error", self.path)
            self._become("failed", error)
            return self._refused_s()

    def _refused_s(self) -> float:
        self._refusals += 1
        return min(_REFUSED_LONGEST_S, _REFUSED_S * 2.0 ** min(self._refusals - 1, 10))

    def _is_there(self) -> bool:
        path = Path(self.path)
        if not (path.exists() and path.stat().st_size) and self._restore_missing:
            restore_if_missing(self.settings)
        return path.exists() and path.stat().st_size > 0

    def _watch(self, sidecar: Sidecar) -> float:
        quiet = 0
        while not self._stopping.wait(
            self._poll_s if quiet < _IDLE_POLLS else max(self._poll_s, _IDLE_POLL_S)
        ):
            quiet = 0 if sidecar.poll() else quiet + 1
            if sidecar.fatal is not None:
                self._become("failed", sidecar.fatal, told=True)
                return self._refused_s()
            if sidecar.is_replaced:
                log.warning("%s is another file now: beginning anew", self.path)
                self._become("opening", None)
                return 0.0
        # 0 stands for one attempt; that nothing is left does not.
        is_timed = self.settings.shutdown_sync_timeout_s > 0
        self._drained = sidecar.drain(max(_LEAST_S, self._left_s() or 0.0) if is_timed else 0.0)
        return 0.0

    def _left_s(self) -> float | None:
        """What is left of the time for the last uploads, seconds; None while not told to stop."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - _clock.monotonic())

    def _become(
        self,
        state: WorkerState,
        error: Exception | None,
        sidecar: Sidecar | None = None,
        *,
        told: bool = False,
    ) -> None:
        with self._changed:
            is_news = state != self._state or str(error) != str(self._error)
            self._state, self._error, self._sidecar = state, error, sidecar
            self._changed.notify_all()
        if not is_news:
            return
        if state == "waiting":
            log.info("%s does not exist, or is empty: waiting for it", self.path)
        elif error is not None and not told:
            log.error("%s: %s (trying again)", self.path, error)
