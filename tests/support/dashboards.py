"""What the dashboard and the alert rules in examples/ ask Prometheus for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import yaml

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"


def rules() -> dict[str, dict[str, Any]]:
    """The alert rules, by name."""
    tree = yaml.safe_load((EXAMPLES / "alerts.yml").read_text(encoding="utf-8"))
    return {rule["alert"]: rule for group in tree["groups"] for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana loads it."""
    found: dict[str, Any] = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    return found


def expressions(node: Any) -> list[str]:
    """All that a part of a dashboard asks for."""
    if isinstance(node, dict):
        found = [node["expr"]] if "expr" in node else []
        return found + [each for child in node.values() for each in expressions(child)]
    if isinstance(node, list):
        return [each for child in node for each in expressions(child)]
    return []
