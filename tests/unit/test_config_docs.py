"""docs/settings.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from walship.replica.config import (
    CONFIG_PLACES,
    DATABASE_KEYS,
    DIRECTORY_KEYS,
    GLOBAL_KEYS,
    REPLICA_KEYS,
    WITHOUT_EFFECT,
)

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def rows(heading: str) -> dict[str, str]:
    """First and last cell of each row of the table under a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`([a-z0-9-]+)`", cells[0]) if line.startswith("| `") else ():
            found[name] = cells[-1]
    return found


def test_every_replica_setting_is_described() -> None:
    """The table of replica settings has exactly the settings that there are."""
    assert set(rows("Replica")) == set(REPLICA_KEYS)


def test_every_database_setting_is_described() -> None:
    """The table of database settings has exactly the settings that there are."""
    assert set(rows("Database")) == set(DATABASE_KEYS)


def test_every_key_of_a_file_is_described() -> None:
    """The section on files has the keys that only files have, and names the places."""
    assert set(rows("Files")) == {"dbs", "logging", *GLOBAL_KEYS, *DIRECTORY_KEYS}
    text = PAGE.read_text(encoding="utf-8")
    for place in ("WALSHIP_CONFIG", "LITESTREAM_CONFIG", *CONFIG_PLACES):
        assert f"`{place}`" in text


def test_settings_without_effect_are_listed() -> None:
    """The list of settings without effect is the code's, with its reasons."""
    assert rows("Accepted without effect") == dict(WITHOUT_EFFECT)
