"""YAML where every value but null stays text as it is written.

So ``no``, ``010`` and ``1:30`` are what they look like; the readers of ``values`` know what a
setting is.  Import it late: nothing else needs the YAML library, which takes long to load.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

from walship.replica.errors import ConfigError

__all__ = ["line_of", "parse_yaml"]


def parse_yaml(text: str) -> object:
    """Mappings, lists, text and None.

    Raises:
        ConfigError: not YAML, or a key given twice.
        RecursionError: it is nested too deeply.
    """
    try:
        return yaml.load(text, _TextLoader)
    except yaml.YAMLError as error:
        # Without the cause: it has the offending line in it, and a traceback would show it.
        raise ConfigError(f"not YAML: {_problem(error)}") from None


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


class _TextLoader(yaml.SafeLoader):
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
