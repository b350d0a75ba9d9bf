"""SQLite's own check of a database file that nobody has open yet.

Used on a restored file before it gets its name.  It reads the file only: no WAL is looked for and
none is created.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Literal
from urllib.parse import quote

import apsw

from .errors import RestoreError

__all__ = ["IntegrityMode", "integrity_check"]

IntegrityMode = Literal["none", "quick", "full"]

#: Findings reported at most; one is enough to know.
_FINDINGS_MAX: Final = 5
#: What has its reason in the machine, not in the file.
_UNABLE: Final = (apsw.CantOpenError, apsw.FullError, apsw.NoMemError, apsw.PermissionsError)
#: SQLite's instructions between two chances for Ctrl-C.
_STEPS_PER_LOOK: Final = 200_000


def integrity_check(
    path: str | os.PathLike[str], mode: IntegrityMode, *, vfs: str = "unix"
) -> list[str]:
    """Check a database file with ``PRAGMA quick_check`` or ``integrity_check``.

    Args:
        path: a complete database, without a WAL or journal that matters.
        mode: "quick" leaves out the comparison of tables with their indexes; "none" does nothing.
        vfs: the plain VFS to read it through.

    Returns:
        What is wrong, in SQLite's words; empty if nothing is.

    Raises:
        RestoreError: it could not be checked; that says nothing about the file.
    """
    if mode == "none":
        return []
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    try:
        # immutable: the header may say WAL, and looking for one would need write access.
        name = f"file:{quote(os.path.abspath(path))}?immutable=1"
        connection = apsw.Connection(name, flags=flags, vfs=vfs)
    except _UNABLE as error:
        raise RestoreError(f"SQLite could not check {path}: {error}") from error
    except apsw.Error as error:
        return [str(error)]
    try:
        go_on: Callable[[], bool] = bool  # False: carry on; Python sees signals on the way
        connection.set_progress_handler(go_on, _STEPS_PER_LOOK)
        pragma = "quick_check" if mode == "quick" else "integrity_check"
        rows = connection.execute(f"PRAGMA {pragma}({_FINDINGS_MAX})").fetchall()
    except _UNABLE as error:
        raise RestoreError(f"SQLite could not check {path}: {error}") from error
    except apsw.Error as error:
        return [str(error)]
    finally:
        connection.close(True)
    findings = [str(row[0]) for row in rows]
    return [] if findings == ["ok"] else findings
