"""The text of a configuration file to a tree of mappings, lists and text.

Two steps: YAML, where every value but null stays text as it is written, and then the variables in
the values.  What the names mean is not known here (``replica.config_file``).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from walship.replica.errors import ConfigError

__all__ = ["expand_text", "line_of", "load_text"]

_log = logging.getLogger(__name__)


def load_text(text: str, variables: Mapping[str, str], *, expand: bool = True) -> object:
    """Parse, then expand each value: a secret with ``#`` or ``:`` in it stays whole.

    Args:
        variables: what ``$NAME`` and ``${NAME}`` stand for.
        expand: leave them as they are if false.

    Raises:
        ConfigError: not YAML, a key given twice, or a variable that is not set where that would
            name the wrong place.
    """
    try:
        loaded = _parse(text, variables if expand else {})
        return _expand(loaded, variables, "", {}) if expand else loaded
    except RecursionError as error:
        raise ConfigError("not usable YAML: it is nested too deeply") from error


def line_of(text: str, message: str) -> int | None:
    """The line that a message is about: it begins with the way there, ``dbs[1]: replica: region:``.

    As far as that can be followed; None if nothing of it is in the text.
    """
    try:
        node = yaml.compose(text, _TextLoader)
    except (yaml.YAMLError, RecursionError):
        return None  # a variable held a piece of the structure
    line: int | None = None
    for part in message.split(": "):
        step = _STEP.fullmatch(part)
        for name in step["name"].split(".") if step else _UNKNOWN.findall(part):
            found = _entry(node, name)
            if found is None:
                return line
            key, node = found
            line = key.start_mark.line + 1
        if step and step["number"] and isinstance(node, yaml.SequenceNode):
            node = node.value[int(step["number"]) - 1]
            line = node.start_mark.line + 1
    return line


#: A piece of the way: a key, perhaps with the number of an entry in its list; or keys in keys.
_STEP: Final = re.compile(r"(?P<name>[a-z0-9-]+(\.[a-z0-9-]+)*)(\[(?P<number>[0-9]+)\])?")
#: How its end is named where nobody knows it.
_UNKNOWN: Final = re.compile(r"unknown setting '([^']+)'")


def _entry(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    entries: list[tuple[yaml.Node, yaml.Node]] = node.value
    return next((each for each in entries if _plain(each[0].value) == name), None)


def _plain(key: object) -> str:
    return str(key).replace("_", "-")


def expand_text(name: str, text: str, variables: Mapping[str, str]) -> str:
    """Expand the variables in one value, all of which must be set.

    Raises:
        ConfigError: one is not; the message says so for the setting ``name``.
    """
    expanded = _expanded(text, variables)
    if missing := _undefined(expanded):
        raise ConfigError(f"{name}: the variable {missing} in it is not set")
    return expanded


# --- YAML ----------------------------------------------------------------------------------------


class _TextLoader(yaml.SafeLoader):
    """YAML where every scalar but null is text, so that ``no``, ``010`` and ``1:30`` stay as
    written; the readers of ``replica.values`` know what a setting is."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            # The last one would win in silence: of two lists of databases, say.
            if key.value in names and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            names.add(key.value)
        return node


_TextLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str, variables: Mapping[str, str]) -> object:
    try:
        return yaml.load(text, _TextLoader)
    except yaml.YAMLError as error:
        if "$" in text and variables:
            # A variable may hold a piece of the structure, as in `dbs: [${DBS}]`.
            whole = _UNDEFINED.sub("", _expanded(text, variables))
            try:
                return yaml.load(whole, _TextLoader)
            except yaml.YAMLError:
                pass
        # Without the cause: it has the offending line in it, and a traceback would show it.
        raise ConfigError(f"not YAML: {_problem(error)}") from None


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, but not the offending line: there may be a secret on it."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"there is a character in it that YAML does not have (U+{error.character:04X})"
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', '')}, {problem}"
    if "'?'" in problem:
        problem += ": a URL inside { } or [ ] needs quotes"
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1})" if mark is not None else str(problem)


# --- variables -----------------------------------------------------------------------------------

_VARIABLE: Final = re.compile(r"\$(?:\{([^{}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Marks where an undefined variable stood; private-use characters, so that nothing else looks so.
_UNDEFINED: Final = re.compile("\ue000([^\ue001]*)\ue001")
#: An undefined variable in one of these is an error.
_MUST_BE_DEFINED: Final = frozenset(
    {"url", "bucket", "path", "dir", "pattern", "endpoint", "meta-path", "meta-dir", "replica"}
)


def _expand(
    node: object, variables: Mapping[str, str], key: str, known: dict[tuple[int, str], object]
) -> object:
    """With variables expanded in a node that stands under a key.

    Args:
        known: what was expanded already, by the node's id and the key: an anchor of anchors would
            take for ever.
    """
    if isinstance(node, dict | list):
        found = known.get((id(node), key))
        if found is None:
            found = known[id(node), key] = _expand_section(node, variables, key, known)
        return found
    if isinstance(node, str):
        text = _expanded(node, variables)
        if missing := _undefined(text):
            if key in _MUST_BE_DEFINED:
                raise ConfigError(f"{key}: the variable {missing} is not set")
            # In the middle of a value it may be a piece of a secret that has a dollar sign in it.
            whole = _VARIABLE.fullmatch(node.strip()) is not None
            _log.warning("variable-not-set key=%s name=%s", key, missing if whole else "?")
        return _UNDEFINED.sub("", text)
    return node


def _expand_section(
    node: dict[object, object] | list[object],
    variables: Mapping[str, str],
    key: str,
    known: dict[tuple[int, str], object],
) -> object:
    if isinstance(node, dict):
        return {
            name: _expand(value, variables, _plain(name), known) for name, value in node.items()
        }
    return [_expand(value, variables, key, known) for value in node]


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        if _NAME.fullmatch(name) is None:
            # Not what is there: it may be a piece of a secret.
            raise ConfigError("${...}: only ${NAME} is expanded")
        if name == "PID" and name not in variables:
            return str(os.getpid())
        value = variables.get(name)
        return f"\ue000{name}\ue001" if value is None else value

    return _VARIABLE.sub(replace, text)


def _undefined(text: str) -> str | None:
    match = _UNDEFINED.search(text)
    return match[1] if match is not None else None
