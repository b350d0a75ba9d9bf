"""Directories whose databases are replicated without being named one by one.

A rule says which files: those below a directory whose name fits a pattern.  Each has a replica of
its own, at the rule's replica followed by the file's path relative to the directory; so Litestream
does it, and either can go on with the replicas of the other.

A rule can be asked about a path that need not exist yet (`DirectorySettings.database`, which is how
the VFS uses it), or for the databases that are there (`DirectorySettings.databases`).
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from walship.replica.errors import ConfigError

from .settings import DatabaseSettings, Parser, state_name
from .values import parse_bool, parse_text

__all__ = ["DIRECTORY_KEYS", "DirectorySettings"]

#: Settings that only such a rule has, and how each is read.
DIRECTORY_KEYS: Final[dict[str, Parser]] = {
    "dir": parse_text,
    "pattern": parse_text,
    "recursive": parse_bool,
    "watch": parse_bool,
    "meta-dir": parse_text,
}

_MAGIC: Final = b"SQLite format 3\0"
#: Local state of walship and of Litestream: no databases in there.
_STATE_DIRECTORY: Final = re.compile(r"\..*-(walship|litestream)")


@dataclass(frozen=True, kw_only=True)
class DirectorySettings:
    """Which databases, and how each of them is replicated.

    Attributes:
        directory: where they are, absolute.
        pattern: what their names fit: ``*``, ``?``, ``[a-z]`` and ``[^a-z]``.
        recursive: also those in directories below it.
        watch: also those that appear later, for a process that has to look for them; where the
            databases are opened through walship that makes no difference.
        meta_dir: below which their local state lies, or None for beside each.
        template: the settings of all of them; its path is the directory, its replica what stands
            before each database's own.

    Raises:
        ConfigError: a pattern that no file name can fit.
    """

    directory: Path
    pattern: str
    recursive: bool = False
    watch: bool = False
    meta_dir: Path | None = None
    template: DatabaseSettings

    def __post_init__(self) -> None:
        if "/" in self.pattern:
            raise ConfigError(
                f"pattern: {self.pattern!r} has a slash in it, and is for file names alone: "
                "`recursive: true` looks into directories"
            )
        if re.search(r"[{}\\]", self.pattern):
            raise ConfigError(
                f"pattern: {self.pattern!r} has more in it than *, ? and [a-z]: give each pattern "
                "an entry of its own"
            )

    def database(self, path: str | os.PathLike[str]) -> DatabaseSettings | None:
        """The settings of a file, whether it exists or not; None if the rule is not for it."""
        file = Path(os.path.realpath(path))
        try:
            relative = file.relative_to(self._root)
        except ValueError:
            return None
        if not self._names.fullmatch(file.name) or file == self._root:
            return None
        if len(relative.parts) > 1 and not self.recursive:
            return None
        if any(_STATE_DIRECTORY.fullmatch(part) for part in relative.parts[:-1]):
            return None
        return self._settings(relative)

    def databases(self) -> list[DatabaseSettings]:
        """The settings of the databases that are there now, in the order of their paths.

        Files that do not begin as SQLite's do are none; links are not followed.
        """
        return [
            self._settings(file.relative_to(self._root))
            for file in self._files(self._root)
            if self._names.fullmatch(file.name) and _is_database(file)
        ]

    @cached_property
    def _root(self) -> Path:
        return Path(os.path.realpath(self.directory))

    @cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile(fnmatch.translate(self.pattern.replace("[^", "[!")))

    def _files(self, directory: Path) -> Iterator[Path]:
        try:
            with os.scandir(directory) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # none is there yet, or none that this process may see
            return
        for entry in found:
            if entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
            elif (
                self.recursive
                and entry.is_dir(follow_symlinks=False)
                and not _STATE_DIRECTORY.fullmatch(entry.name)
            ):
                yield from self._files(Path(entry.path))

    def _settings(self, relative: Path) -> DatabaseSettings:
        assert self.template.replica is not None
        file = self._root / relative
        state = state_name(relative.name)
        beside = file.parent if self.meta_dir is None else self.meta_dir / relative.parent
        store = self.template.replica.store.below(relative.as_posix())
        return replace(
            self.template,
            path=file,
            meta_path=beside / state,
            replica=replace(self.template.replica, store=store),
        )


def _is_database(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False
