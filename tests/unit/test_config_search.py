"""Where a configuration file is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from walship.replica.config import sources as config
from walship.replica.config.sources import find_config


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The three places, with nothing there yet, in the test's directory."""
    found = [
        tmp_path / "cwd" / "walship.yml",
        tmp_path / "walship.yml",
        tmp_path / "litestream.yml",
    ]
    found[0].parent.mkdir()
    monkeypatch.chdir(found[0].parent)
    monkeypatch.setattr(config, "CONFIG_PLACES", ("walship.yml", *map(str, found[1:])))
    return found


def test_the_places_are_the_documented_ones() -> None:
    """The working directory, then /etc, and there also Litestream's file."""
    assert config.CONFIG_PLACES == ("walship.yml", "/etc/walship.yml", "/etc/litestream.yml")


def test_the_order(places: list[Path]) -> None:
    """Variables come before files, ours before Litestream's."""
    environ: dict[str, str] = {"LITESTREAM_CONFIG": "", "WALSHIP_CONFIG": ""}
    assert find_config(environ) is None
    for place in reversed(places):
        place.touch()
        found = find_config(environ)
        assert found is not None
        assert found.resolve() == place
    environ["LITESTREAM_CONFIG"] = "/l.yml"
    assert find_config(environ) == Path("/l.yml"), "also if it does not exist"
    environ["WALSHIP_CONFIG"] = "~/w.yml"
    assert find_config(environ) == Path("~/w.yml").expanduser()
