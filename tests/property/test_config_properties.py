"""Whatever is in a configuration file, it is settings or one ConfigError in one line."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from walship.replica.config.file import Settings, read_settings
from walship.replica.config.sources import DATABASE_KEYS, DIRECTORY_KEYS, GLOBAL_KEYS, REPLICA_KEYS
from walship.replica.config.text import load_text
from walship.replica.errors import ConfigError

KEYS = sorted({*DATABASE_KEYS, *DIRECTORY_KEYS, *GLOBAL_KEYS, *REPLICA_KEYS})
WORDS = [
    *("", "1", "-1", "0", "1s", "1e999s", "9" * 400, "true", "no", "auto", "s3", "file", "gs", "~"),
    *("s3://b/p?endpoint=h&region=r", "s3://", "s3://b?x=", "file:///r", "s3://[/", "s3://b:9/p"),
    *(
        "/a.db",
        "a/../b",
        "*.db",
        "[",
        "[!",
        "$X",
        "${X",
        "${}",
        "$PID",
        "\0",
        "\ud7ff",
        "é",
        ":9090",
    ),
    *("http://[::1", "https://h:99999", "//", "sqlite://", ":memory:", "0123456789abcdef" * 2),
]
SCALARS = st.one_of(st.none(), st.sampled_from(WORDS), st.text(max_size=8))
NAMES = st.one_of(st.sampled_from(KEYS), st.text(max_size=6))
SECTIONS = st.dictionaries(NAMES, SCALARS, max_size=6)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)
REPLICAS = SECTIONS | st.fixed_dictionaries({"url": st.sampled_from(WORDS)}) | SCALARS
ENTRIES = st.builds(
    lambda more, replica, key: {**more, **({} if replica is None else {key: replica})},
    st.dictionaries(NAMES, VALUES, max_size=5),
    REPLICAS | st.lists(REPLICAS, max_size=2),
    st.sampled_from(["replica", "replicas"]),
) | st.fixed_dictionaries(
    {"path": st.sampled_from(["/a.db", "/b.db"]), "replica": REPLICAS},
    optional={key: SCALARS for key in DATABASE_KEYS if key != "path"},
)
FILES = st.builds(
    lambda more, entries, logs: {**more, "dbs": entries, "logging": logs},
    st.dictionaries(NAMES, VALUES, max_size=5),
    st.lists(ENTRIES, max_size=3) | VALUES,
    SECTIONS | SCALARS,
)


def settings_of(text: str) -> Settings | None:
    """What the file says, or None if it is refused."""
    try:
        return read_settings(load_text(text, {"X": "x"}), {"X": "x"})
    except ConfigError as error:
        assert "\n" not in str(error)
        assert str(error)
        return None


@given(FILES)
def test_any_tree(tree: Any) -> None:
    """Known keys with values that do not fit, unknown ones, and structures where text belongs."""
    settings = settings_of(yaml.safe_dump(tree, allow_unicode=True))
    if settings is not None:
        settings.all_databases()
        settings.database("/a.db")
        repr(settings)


@given(st.text(max_size=60))
@example("dbs: [" * 5000)
@example("a: &a {b: *a}")
@example("? [1, 2]\n: 3")
@example("!!binary x")
@example("? !!set {a}\n: 1")
@example("\ud800")
@example("<<: 1")
@example("a: &x {<<: *x}")
def test_any_text(text: str) -> None:
    """Text that is no YAML, or YAML that no configuration file has."""
    settings_of(text)


@given(st.sampled_from(KEYS), VALUES)
def test_any_value_of_a_key(key: str, value: Any) -> None:
    """Each key, in each place, with anything in it."""
    base: dict[str, Any] = {"path": "/a.db", "replica": {"url": "s3://b/p"}}
    for tree in (
        {key: value, "dbs": [base]},
        {"dbs": [{**base, key: value}]},
        {"dbs": [{**base, "replica": {"bucket": "b", key: value}}]},
        {"dbs": [{"dir": "/d", "pattern": "*", "replica": {"bucket": "b", key: value}}]},
    ):
        settings_of(yaml.safe_dump(tree, allow_unicode=True))
