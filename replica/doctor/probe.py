"""One run of the checks against a store, and what follows from it: can the store fence?

What it writes is removed at the end, also when it is interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from walship.replica.clock import Clock
from walship.replica.errors import StoreError
from walship.replica.store.base import ObjectStore
from walship.replica.store.settings import DEFAULT_PART_SIZE

from .bench import WRITERS, Bench, Finding, Status, failed, ok, skipped
from .reads import Reads
from .writes import Writes

__all__ = ["Check", "Report", "probe"]

log = logging.getLogger("walship.doctor")


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        name: what was checked; stays the same between versions.
        status: "ok"; "failed": walship needs it; "warning": it works without; "skipped".
        seen: one line for people.
        decides: the fence stands and falls with it.
        ms: how long it took, milliseconds.
    """

    name: str
    status: Status
    seen: str
    decides: bool
    ms: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a probe found.

    Attributes:
        url: of the store.
        checks: in the order in which they were made.
        fence: whether the store keeps a second writer out.
        because: one line: what that is based on.
    """

    url: str
    checks: Sequence[Check]
    fence: bool
    because: str

    @property
    def failed(self) -> Sequence[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if check.status == "failed"]

    @property
    def works(self) -> bool:
        """Whether everything works that a single writer needs."""
        return all(check.decides for check in self.checks if check.status == "failed")

    @property
    def fit(self) -> bool:
        """Whether everything works that walship needs, the fence included."""
        return self.fence and self.works


def probe(
    store: ObjectStore,
    clock: Clock,
    *,
    part_size: int = DEFAULT_PART_SIZE,
    started: Callable[[str], None] | None = None,
    ended: Callable[[Check], None] | None = None,
) -> Report:
    """Try out ``store`` and say whether a fence works there.

    About 2,000 requests and 20 MB, from a few seconds to a minute.  Blocks; any thread may call it,
    and other users of the store are not disturbed.  What it writes is gone when it returns or
    raises, as far as the store lets it be removed; the report or the log says what may be left.

    Args:
        store: with retries around it, or a passing trouble counts as a failure.
        part_size: bytes above which the store writes in parts; see ``S3Settings``.
        started: called with the name of each check before it is made, by the calling thread.
        ended: called with each check afterwards.

    Raises:
        StoreError: the store cannot be reached or refuses everything.
    """
    return _Probe(Bench(store, clock, part_size), started, ended).run()


@dataclass(frozen=True, slots=True)
class _Step:
    """One check.

    Attributes:
        needs: checks without whose success this one says nothing.
        decides: the fence stands and falls with it.
    """

    name: str
    run: Callable[[], Finding]
    needs: tuple[str, ...] = ()
    decides: bool = False


def _steps(bench: Bench) -> Sequence[_Step]:
    reads, writes = Reads(bench), Writes(bench)
    basic = ("put", "get", "delete")
    listing, asking = ("list", *basic), ("head", *basic)
    return (
        _Step("reach", reads.reach),
        _Step("list", reads.may_list),
        _Step("put", reads.may_put),
        _Step("get", reads.may_get, ("put",)),
        _Step("head", reads.may_head, ("put",)),
        _Step("delete", reads.may_delete, ("put",)),
        _Step("create", writes.create, basic, decides=True),
        _Step("create again", writes.create_again, ("create",), decides=True),
        _Step("create repeated", writes.create_equal, ("create again",), decides=True),
        _Step("update", writes.update, basic, decides=True),
        _Step("stale update", writes.stale_update, ("update",), decides=True),
        _Step("update of nothing", writes.update_of_nothing, ("update",), decides=True),
        _Step("create race", writes.create_race, ("create again",), decides=True),
        _Step("update race", writes.update_race, ("stale update",), decides=True),
        _Step("conditional get", writes.conditional_get, basic),
        _Step("object age", writes.object_age, listing, decides=True),
        _Step("large object", writes.large_object, basic),
        _Step("large create", writes.large_create, ("large object", "create again"), decides=True),
        _Step("list after put", reads.list_after_put, listing),
        _Step("head after delete", reads.head_after_delete, asking),
        _Step("list pages", reads.list_pages, listing),
        _Step("list from key", reads.list_from_key, ("list pages",)),
        _Step("ranges", reads.ranges, basic),
        _Step("metadata", reads.metadata, asking),
        _Step("clock", reads.clock, basic),
    )


class _Probe:
    """One run.  All of it is in the calling thread; the races have threads of their own."""

    def __init__(
        self,
        bench: Bench,
        started: Callable[[str], None] | None,
        ended: Callable[[Check], None] | None,
    ) -> None:
        self._bench = bench
        self._started = started
        self._ended = ended
        self._checks: list[Check] = []
        self._causes: dict[str, str] = {}  # what failed first, of each check that did not succeed

    def run(self) -> Report:
        try:
            for step in _steps(self._bench):
                self._made(step)
            self._made(_Step("clean up", self._clean_up))
        except BaseException:
            self._remove_quietly()
            raise
        fence, because = self._verdict()
        return Report(self._bench.store.url, tuple(self._checks), fence, because)

    def _made(self, step: _Step) -> Check:
        if self._started is not None:
            self._started(step.name)
        began = self._bench.clock.monotonic()
        cause = next((self._causes[name] for name in step.needs if name in self._causes), None)
        if cause is not None:
            finding = skipped(f'because of "{cause}"')
        else:
            try:
                finding = step.run()
            except StoreError as error:
                if step.name == "reach":
                    raise
                finding = failed(self._bench.text(error))
        ms = round((self._bench.clock.monotonic() - began) * 1000)
        check = Check(step.name, finding.status, finding.seen, step.decides, ms)
        self._checks.append(check)
        if check.status in ("failed", "skipped"):
            self._causes[step.name] = cause or step.name
        if self._ended is not None:
            self._ended(check)
        return check

    def _verdict(self) -> tuple[bool, str]:
        causes = {self._causes.get(check.name) for check in self._checks if check.decides}
        for check in self._checks:
            if check.status != "failed" or check.name not in causes:
                continue
            if check.decides:
                return False, check.seen
            return False, f'it could not be tried: "{check.name}" failed: {check.seen}'
        return True, f"each race of {WRITERS} writers had one winner"

    # --- leaving no trace -------------------------------------------------------------------------

    def _clean_up(self) -> Finding:
        name = f"{self._bench.prefix}*"
        may_list = "list" not in self._causes
        try:
            self._bench.remove()
            left = self._bench.listed("") if may_list else []
        except StoreError as error:
            return failed(f"{name} may be left behind: {self._bench.text(error)}")
        if left:
            return failed(f"{len(left):,} objects are left behind: remove {name} by hand")
        return ok("nothing is left behind" if may_list else "objects removed")

    def _remove_quietly(self) -> None:
        problem = "requests were under way" if self._bench.abandoned else None
        try:
            self._bench.remove()
        except StoreError as error:
            problem = self._bench.text(error)
        except BaseException:
            self._warn("interrupted again")
            raise
        if problem is not None:
            self._warn(problem)

    def _warn(self, problem: str) -> None:
        name, url = self._bench.prefix, self._bench.store.url
        log.warning("%s* may be left behind in %s (%s): remove it by hand", name, url, problem)
