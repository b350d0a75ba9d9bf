"""Plays seeds:  cd tests && python -m simulation FIRST [LAST] [--trace] [--coverage]

One seed plays the same every time, so a failure is looked at with its number and ``--trace``.  With
``--coverage`` the shipped modules that ran are listed, with the share of their lines that did.
"""

from __future__ import annotations

import argparse
import sys

_MODULES = (
    "capture",
    "catchup",
    "compaction",
    "continuity",
    "election",
    "engine",
    "fence",
    "frames",
    "host",
    "levels",
    "listing",
    "pagemap",
    "peers",
    "record",
    "resync",
    "sealing",
    "sender",
    "spool",
    "uploader",
    "waits",
)


def _play(first: int, last: int, trace: bool) -> int:
    from simulation import patches, world

    failed = 0
    with patches.installed():
        for seed in range(first, last + 1):
            outcome = world.run(seed, trace=print if trace else None)
            if outcome.problem is not None:
                failed += 1
                print(f"seed {seed}: {outcome.problem}", flush=True)
    print(f"{last + 1 - first} seeds, {failed} failed")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, nargs="?")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--coverage", action="store_true")
    arguments = parser.parse_args()
    last = arguments.first if arguments.last is None else arguments.last
    if not arguments.coverage:
        return int(_play(arguments.first, last, arguments.trace) > 0)
    import coverage

    measured = coverage.Coverage(data_file=None, branch=True, source_pkgs=["walship"])
    measured.start()
    failed = _play(arguments.first, last, arguments.trace)
    measured.stop()
    measured.report(include=[f"*/replica/{name}.py" for name in _MODULES], file=sys.stdout)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
