"""The text of a configuration file to a tree of mappings, lists and text.

Two steps: YAML (``yaml_text``), and then the variables in the values.  What the names mean is not
known here (``file``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from typing import Final

from walship.replica.errors import ConfigError

__all__ = ["expand_text", "load_text"]

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


def expand_text(name: str, text: str, variables: Mapping[str, str]) -> str:
    """Expand the variables in one value, all of which must be set.

    Raises:
        ConfigError: one is not; the message says so for the setting ``name``.
    """
    expanded = _expanded(text, variables)
    if missing := _undefined(expanded):
        raise ConfigError(f"{name}: the variable {missing} in it is not set")
    return expanded


def _parse(text: str, variables: Mapping[str, str]) -> object:
    from .yaml_text import parse_yaml  # most processes have no file to read

    try:
        return parse_yaml(text)
    except ConfigError:
        if "$" not in text or not variables:
            raise
        # A variable may hold a piece of the structure, as in `dbs: [${DBS}]`.
        with contextlib.suppress(ConfigError):
            return parse_yaml(_UNDEFINED.sub("", _expanded(text, variables)))
        raise


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
            name: _expand(value, variables, str(name).replace("_", "-"), known)
            for name, value in node.items()
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
