"""Damage of any kind: a restore gives the right bytes or a `FormatError`, never something else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from support.replicas import GOLDEN, local_store, manifest, sha256
from walship.replica.clock import SystemClock
from walship.replica.errors import FormatError
from walship.replica.restore import restore

SETS = ["b-512", "e-mixed-frame-block"]  # both page encodings


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """A golden set, one of its level-0 segments, and that segment's damaged content."""
    name = draw(st.sampled_from(SETS))
    path = draw(st.sampled_from(sorted((GOLDEN / name / "replica" / "ltx" / "0").iterdir())))
    data = bytearray(path.read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["bit", "byte", "header", "cut", "drop", "insert", "repeat"])):
            case "bit":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                data[at] = draw(st.integers(0, 255))
            case "header":
                data[at % 100] = draw(st.integers(0, 255))
            case "cut":
                del data[max(at, 1) :]
            case "drop":
                del data[at : at + draw(st.integers(1, 50))]
                data = data or bytearray(1)
            case "insert":
                data[at:at] = draw(st.binary(max_size=30))
            case "repeat":
                data[at:at] = data[at : at + 60]
    return name, path.name, bytes(data)


@settings(max_examples=150)
@given(damages(), st.sampled_from([64, 601, 5000, 1 << 20]))
def test_damaged_segment_is_noticed_or_harmless(
    damage: tuple[str, str, bytes], range_bytes: int
) -> None:
    """Level-0 segments with one of them damaged, read in pieces of any size."""
    name, damaged, content = damage
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory, "replica")
        folder = root / "ltx" / "0"
        folder.mkdir(parents=True)
        for path in (GOLDEN / name / "replica" / "ltx" / "0").iterdir():
            (folder / path.name).write_bytes(content if path.name == damaged else path.read_bytes())
        output = Path(directory, "out", "out.db")
        with (
            mock.patch("walship.replica.apply.SMALL_BYTES", 0),
            mock.patch("walship.replica.apply.RANGE_BYTES", range_bytes),
        ):
            try:
                restore(local_store(root), output, clock=SystemClock(), verify="full")
            except FormatError as error:
                assert "\n" not in str(error)
                assert list(output.parent.iterdir()) == []
            else:
                assert sha256(output) == manifest(name)["latest"]["sha256"]
