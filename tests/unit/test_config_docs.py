"""docs/settings.md says what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from walship.replica.config.settings import DatabaseSettings, Parser, ReplicaSettings
from walship.replica.config.sources import (
    CONFIG_PLACES,
    DATABASE_KEYS,
    DIRECTORY_KEYS,
    GLOBAL_KEYS,
    REPLICA_KEYS,
    WITHOUT_EFFECT,
)
from walship.replica.config.values import (
    parse_bool,
    parse_duration,
    parse_int,
    parse_size,
    parse_text,
)
from walship.replica.store.settings import S3Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def rows(heading: str, cell: int = -1) -> dict[str, str]:
    """Name and another cell, the last one, of each row of the table under a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`([a-z0-9-]+)`", cells[0]) if line.startswith("| `") else ():
            found[name] = cells[cell]
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


def _defaults() -> dict[str, tuple[Parser, object]]:
    """How a setting is read, and its default in the code, where that is a value."""
    known: dict[str, tuple[Parser, object]] = {}
    for keys, kinds in (
        (DATABASE_KEYS, [DatabaseSettings]),
        (REPLICA_KEYS, [ReplicaSettings, S3Settings]),
    ):
        fields = {each.name: each.default for kind in kinds for each in dataclasses.fields(kind)}
        for key, parser in keys.items():
            if key == "path":
                continue
            name = key.replace("-", "_")
            for field in (name, f"{name}_s"):
                if fields.get(field, dataclasses.MISSING) not in (dataclasses.MISSING, None):
                    known[key] = parser, fields[field]
    return known


@pytest.mark.parametrize("key", sorted(_defaults()))
def test_defaults_are_those_of_the_code(key: str) -> None:
    """The default in the table, read as a setting is, is the code's."""
    parser, default = _defaults()[key]
    written = rows("Database", cell=2).get(key) or rows("Replica", cell=2)[key]
    if default == 0 and written in ("never", "no limit"):
        return
    usual = written.rpartition(" else ")[2].partition(";")[0].strip("`")
    assert parser(key, usual) == default


KINDS = {
    parse_bool: "switch",
    parse_duration: "duration",
    parse_int: "number",
    parse_size: "size",
    parse_text: "text",
}


def test_values_are_of_the_kind_that_is_said() -> None:
    """Each setting is read as the kind of value that the table names."""
    said = {**rows("Database", cell=1), **rows("Replica", cell=1)}
    for key, parser in {**DATABASE_KEYS, **REPLICA_KEYS}.items():
        if parser in KINDS:
            assert said[key] == KINDS[parser], key
        elif parser.__name__ == "parse":  # one of `parse_choice`
            assert said[key] == "word", key
