"""A probe's report for people and for programs, and what is known about providers."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, TextIO

from walship.replica.config.url import provider_of
from walship.replica.store.settings import LocalSettings, StoreSettings

from .probe import Check, Report

__all__ = ["Printer", "as_json", "notes_about"]

#: What limits a fence that has passed the checks, by the name of the provider.
_LIMITS: Final[Mapping[str, str]] = {
    "Backblaze B2": "Backblaze documents no conditional writes: what passes today may be gone "
    "tomorrow",
    "Cloudflare R2": "Cloudflare does not promise that conditional writes are atomic; no test is "
    "known where they were not",
    "DigitalOcean Spaces": "reports about Spaces differ: what holds here need not hold in another "
    "region",
    "Google Cloud Storage": "Google documents no conditions of S3 requests: what passes today may "
    "be gone tomorrow",
    "Hetzner": "conditional writes were reported as missing at Hetzner: what holds here need not "
    "hold in another region",
    "S3-compatible": "whether a race shows is chance; docs/doctor.md has the versions of MinIO, "
    "SeaweedFS and others from which on they are safe",
    "Scaleway": "Scaleway documents conditional writes; there are no reports about races there",
    "Tigris": "this holds for writers in one region. Buckets of type Global and Dual agree between "
    "regions only after a while: never write from two, or take a bucket of type Single or "
    "Multi-region",
}
_LIMITS_OF_A_DIRECTORY: Final = (
    "a directory is fenced among the processes of this machine; on a network file system also "
    "among machines if its locks reach them all (NFS: not with nolock or local_lock)"
)

_NAME_WIDTH: Final = 18
_STATUS_WIDTH: Final = 8
_MIN_WIDTH: Final = 60
_MAX_WIDTH: Final = 100


def notes_about(report: Report, settings: StoreSettings) -> Sequence[str]:
    """What a good verdict about this store does not cover, a sentence each."""
    if not report.fence:
        return ()
    if isinstance(settings, LocalSettings):
        return (_LIMITS_OF_A_DIRECTORY,)
    limit = _LIMITS.get(provider_of(settings.endpoint).name)
    return () if limit is None else (limit,)


def as_json(report: Report, notes: Sequence[str]) -> dict[str, Any]:
    """The report as a value that ``json`` prints; ``docs/doctor.md`` describes it."""
    return {
        "url": report.url,
        "fit": report.fit,
        "fence": report.fence,
        "because": report.because,
        "notes": list(notes),
        "checks": [asdict(check) for check in report.checks],
    }


class Printer:
    """Prints a report as it comes, a line or two for each check.

    Args:
        out: on a terminal a check's name appears when it begins.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()
        columns = shutil.get_terminal_size().columns if self._live else 80
        self._width = min(_MAX_WIDTH, max(_MIN_WIDTH, columns)) - 1
        self._begun = False

    def title(self, url: str) -> None:
        self._print(f"{url}\n\n")

    def started(self, name: str) -> None:
        if self._live:
            self._print(f" {name:{_NAME_WIDTH}} ...")
            self._begun = True

    def ended(self, check: Check) -> None:
        status = "FAILED" if check.status == "failed" else check.status
        begin = f" {check.name:{_NAME_WIDTH}} {status:{_STATUS_WIDTH}} "
        self._print(("\r" if self._begun else "") + self._wrapped(begin, check.seen))
        self._begun = False

    def verdict(self, report: Report, notes: Sequence[str]) -> None:
        if report.fence:
            fence = f"yes ({report.because})"
        else:
            fence = f"no, because {report.because}"
        self._print("\n" + self._wrapped(" fence:  ", fence))
        if report.fit:
            fit = "yes"
        elif report.works:
            fit = "no, unless you see to it yourself that there is never a second writer"
        else:
            fit = f"no (failed: {', '.join(report.failed)})"
        self._print(self._wrapped(" fit:    ", fit))
        for note in notes:
            self._print(self._wrapped(" note:   ", note))

    def stopped(self) -> None:
        """End the line of a check that was not."""
        if self._begun:
            self._print("\n")
            self._begun = False

    def _wrapped(self, begin: str, text: str) -> str:
        lines = textwrap.wrap(
            text,
            self._width,
            initial_indent=begin,
            subsequent_indent=" " * len(begin),
            break_on_hyphens=False,
        )
        return "".join(f"{line}\n" for line in lines or [begin.rstrip()])

    def _print(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
