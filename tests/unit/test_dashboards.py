"""The dashboard and the alert rules in examples/: they speak of what is exported."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from support.dashboards import EXAMPLES, dashboard, expressions, rules
from support.promql import Samples
from walship.replica.counts import CheckpointCounts, Operation
from walship.replica.engine import Status, Work
from walship.replica.errors import StoreUnavailable
from walship.replica.levels import L0Files
from walship.replica.sqlite import FencedError, RefusedError
from walship.vfs.exposition import families
from walship.vfs.measures import DatabaseMetrics, Metrics

ROOT = EXAMPLES.parent

pytestmark = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason="tests of an installed wheel: there are no examples"
)

NOW = 1_736_000_000.0
IDLE = DatabaseMetrics(
    status=Status(
        path="/data/app.db",
        replica="s3://bucket/app",
        state="ok",
        txid=7,
        replicated_txid=7,
        lag_s=0.0,
        pending_bytes=0,
        wal_bytes=0,
        uploads=1,
        upload_bytes=400,
        last_upload_ms=int(NOW - 30 * 86400) * 1000,
        last_error=None,
        uploader=True,
        fence="idle",
    ),
    work=Work(
        uploads=1,
        upload_bytes=400,
        syncs=9,
        sync_errors=0,
        sync_s=0.1,
        wal_bytes=4152,
        checkpoints=CheckpointCounts(lambda: 0.0).all(),
        damaged_merges=0,
    ),
    l0_files=L0Files(eligible=0, not_compacted=1, too_recent=2),
    database_bytes=8192,
    validation_interval_s=0.0,
)
PUT = Operation(
    replica_type="s3",
    operation="PUT",
    attempts=2,
    n_bytes=400,
    seconds=0.1,
    durations=(0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    errors={"SlowDown": 1},
)


def metrics(*databases: DatabaseMetrics) -> Metrics:
    return Metrics(databases=databases, operations=(PUT,), requests={"PutObject": 2})


def samples(*databases: DatabaseMetrics) -> list[tuple[str, dict[str, str], float]]:
    """What is exported of these databases."""
    return samples_of(metrics(*databases))


def samples_of(found: Metrics) -> list[tuple[str, dict[str, str], float]]:
    """All that is exported."""
    return [
        (sample.name, sample.labels, sample.value)
        for family in families(found)
        for sample in family.samples
    ]


def changed(**status: Any) -> DatabaseMetrics:
    """The idle database, with another status."""
    return replace(IDLE, status=replace(IDLE.status, **status))


def firing(*databases: DatabaseMetrics) -> set[str]:
    """The alerts that fire once their time has passed."""
    now = Samples(samples(*databases), NOW)
    return {name for name, rule in rules().items() if now.evaluate(rule["expr"])}


def verified(hours_ago: float, **status: Any) -> DatabaseMetrics:
    """A database that is to be verified every day."""
    when = int((NOW - hours_ago * 3600) * 1000)
    found = changed(last_verified_ms=when, last_verified_txid=7, **status)
    return replace(found, validation_interval_s=86400.0)


@pytest.mark.parametrize(
    "database",
    [
        IDLE,
        changed(fence="held"),
        changed(fence="none"),
        changed(uploader=False),
        changed(state="opening", last_upload_ms=None),
        changed(lag_s=2.0, pending_bytes=400),
        verified(30.0, last_verification="sound"),
        verified(30.0, last_verification="failed"),
    ],
)
def test_alerts_are_silent(database: DatabaseMetrics) -> None:
    """Nothing fires for a database that is idle, however long, or that is shipped."""
    assert firing(database) == set()
    assert firing() == set()


@pytest.mark.parametrize(
    ("database", "alerts"),
    [
        (changed(lag_s=61.0), {"WalshipLag"}),
        (changed(state="retrying"), {"WalshipUploadsFail"}),
        (changed(state="stopped"), {"WalshipStopped"}),
        (changed(state="stopped", fence="lost"), {"WalshipStopped", "WalshipFenced"}),
        (changed(disk_full=True), {"WalshipDiskFull"}),
        (verified(50.0, last_verification="failed"), {"WalshipNotVerified"}),
        (verified(1.0, last_verification="damaged"), {"WalshipReplicaBad"}),
        (verified(1.0, last_verification="differs"), {"WalshipReplicaBad"}),
        (replace(IDLE, validation_interval_s=86400.0), {"WalshipNeverVerified"}),
    ],
)
def test_alerts_fire(database: DatabaseMetrics, alerts: set[str]) -> None:
    """Each kind of trouble has its alert, also beside a database that is well."""
    other = replace(IDLE, status=replace(IDLE.status, path="/data/other.db"))
    assert firing(database) == alerts
    assert firing(other, database) == alerts


@pytest.mark.parametrize(
    ("error", "alerts"),
    [
        (StoreUnavailable("away"), {"WalshipUploadsFail"}),
        (RefusedError("no"), {"WalshipStopped"}),
        (OSError("no"), {"WalshipStopped"}),
        (FencedError("theirs"), {"WalshipStopped", "WalshipFenced"}),
    ],
)
def test_alerts_for_what_cannot_be_opened(error: Exception, alerts: set[str]) -> None:
    """A database that ``walship replicate`` cannot open has its alerts too."""
    found = Metrics(databases=(IDLE,), unopened={"/data/b.db": error}, operations=(), requests={})
    now = Samples(samples_of(found), NOW)
    fired = {name: now.evaluate(rule["expr"]) for name, rule in rules().items()}
    assert {name for name, value in fired.items() if value} == alerts
    for value in fired.values():
        assert isinstance(value, dict)
        assert set(value) <= {frozenset({("db", "/data/b.db")})}


def test_every_alert_is_seen_to_fire() -> None:
    """The tests above leave out none; each has words for people and says how grave it is."""
    cases = test_alerts_fire.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert set(rules()) == set().union(*(alerts for _, alerts in cases))
    for rule in rules().values():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert "{{ $labels.db }}" in rule["annotations"]["summary"]


def test_the_dashboard_asks_for_what_there_is() -> None:
    """Each metric, and each label of it, in the dashboard and the rules is one that is exported."""
    database = verified(1.0, last_verification="sound")
    labels: dict[str, set[str]] = {}
    for name, given, _ in samples(database):
        labels.setdefault(name, set()).update(given)
    wanted = expressions(dashboard()) + [rule["expr"] for rule in rules().values()]
    assert len(wanted) > 20
    named = set()
    for expression in wanted:
        metrics = re.findall(r"\b(?:litestream|walship)_\w+", expression)
        assert metrics, expression
        for metric in metrics:
            assert metric in labels, metric
            for by in re.findall(r"by \(([^)]*)\)", expression):
                assert set(re.split(r",\s*", by)) <= labels[metric], expression
        for metric, matchers in re.findall(r"(\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", matchers)) <= labels[metric], expression
        named.update(metrics)
    assert {name for name in labels if "replica_info" not in name} - named <= {
        "litestream_sync_count",
        "litestream_checkpoint_error_count",
        "litestream_checkpoint_seconds",
        "litestream_replica_operation_bytes",
        "litestream_replica_operation_duration_seconds_count",
        "litestream_replica_operation_duration_seconds_sum",
        "litestream_compaction_verify_error_count",
        "walship_last_upload_timestamp_seconds",
        "walship_last_verified_txid",
        "walship_uploader",
    }


def test_the_dashboard_can_be_drawn() -> None:
    """Panels have numbers of their own, lie on the grid, and not over one another."""
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for a, b in combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart_x or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_docs_list_what_is_exported() -> None:
    """docs/metrics.md has a line for each metric, and none for others."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `((?:litestream|walship)_\w+)`", page, re.MULTILINE))
    exported = {
        re.sub(r"(_duration_seconds)_(bucket|count|sum)$", r"\1", name)
        for name, _, _ in samples(verified(1.0, last_verification="sound"))
    }
    assert listed == exported


def test_the_little_language_understands_itself() -> None:
    """What the rules are judged with does what Prometheus does, where they need it."""
    now = Samples(
        [
            ("a", {"db": "x", "s": "1"}, 3.0),
            ("a", {"db": "x", "s": "2"}, 5.0),
            ("b", {"db": "y"}, 1.0),
        ],
        100.0,
    )
    x, y = frozenset({("db", "x")}), frozenset({("db", "y")})
    assert now.evaluate("max by (db) (a)") == {x: 5.0}
    assert now.evaluate('sum by (db) (a{s=~"1|2"}) > 7') == {x: 8.0}
    assert now.evaluate('a{s="3"}') == {}
    assert now.evaluate("time() - max by (db) (a) > 90 and max by (db) (a) == 5") == {x: 95.0}
    assert now.evaluate("max by (db) (a) unless b") == {x: 5.0}
    assert now.evaluate("b unless max by (db) (b)") == {}
    assert now.evaluate("2 * b + 3600") == {y: 3602.0}
    for wrong in ("a >", "max by db (a)", "a{db!~'x'}", "rate(a[5m])"):
        with pytest.raises(SyntaxError):
            now.evaluate(wrong)
