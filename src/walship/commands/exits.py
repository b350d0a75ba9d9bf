"""Exit codes, and which error has which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from walship.replica.errors import (
    ContinuityError,
    FormatError,
    GapError,
    IntegrityError,
    NoBackupError,
    OutputExistsError,
    ReplicaError,
    StoreError,
)

__all__ = [
    "ENDED",
    "EXIT_DAMAGED",
    "EXIT_DIFFERS",
    "EXIT_EXISTS",
    "EXIT_GAP",
    "EXIT_HELP",
    "EXIT_INTERRUPTED",
    "EXIT_NO_BACKUP",
    "EXIT_OK",
    "EXIT_OTHER",
    "EXIT_STORE",
    "EXIT_TERMINATED",
    "EXIT_UNFIT",
    "VERIFY_CODES",
    "exit_code",
]


EXIT_OK: Final = 0

EXIT_OTHER: Final = 1

EXIT_NO_BACKUP: Final = 3

EXIT_DAMAGED: Final = 4

EXIT_STORE: Final = 5

EXIT_GAP: Final = 6

EXIT_EXISTS: Final = 7

EXIT_UNFIT: Final = 8

EXIT_DIFFERS: Final = 9

EXIT_INTERRUPTED: Final = 130

EXIT_TERMINATED: Final = 143

#: For `main` alone: a signal has ended what would not end otherwise.  Its exit code is 0.
ENDED: Final = -1

#: The first class that fits decides.
_EXIT_CODES: Final[tuple[tuple[type[ReplicaError], int], ...]] = (
    (NoBackupError, EXIT_NO_BACKUP),
    (IntegrityError, EXIT_DAMAGED),
    (FormatError, EXIT_DAMAGED),
    (StoreError, EXIT_STORE),
    (GapError, EXIT_GAP),
    (ContinuityError, EXIT_GAP),
    (OutputExistsError, EXIT_EXISTS),
)

EXIT_HELP: Final = """\
exit codes:
  0    done (also: nothing to do, with -if-db-not-exists or -if-replica-exists; restore -f was ended
       by a signal)
  1    wrong usage or configuration, or any other error
  3    no backup that fits
  4    the replica is damaged, or the restored database fails SQLite's check
  5    the store cannot be reached, or refuses
  6    segments are missing in the middle of the replica; copy and replica do not fit
  7    the output exists already
  8    the store is not fit (doctor)
  9    the replica can be restored, and is not the database (verify)
  130  interrupted (Ctrl-C); nothing was changed
  143  terminated (SIGTERM); nothing was changed
"""


def exit_code(error: ReplicaError) -> int:
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_OTHER)


#: Of what a verification found.
VERIFY_CODES: Final[Mapping[str, int]] = {
    "sound": EXIT_OK,
    "differs": EXIT_DIFFERS,
    "damaged": EXIT_DAMAGED,
}
