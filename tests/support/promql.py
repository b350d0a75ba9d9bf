"""As much of PromQL as alert rules need, over the samples of one moment.

Selectors with ``=`` and ``=~``, ``max by``/``sum by``, ``time()``, numbers, ``+ - * /``,
comparisons, ``and`` and ``unless``.  A vector is a mapping from labels to a value; comparisons
leave the samples for which they hold, as Prometheus does.  What is not understood is a
`SyntaxError`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Value = float | Vector

_TOKEN: Final = re.compile(
    r"\s*(?:(\d+(?:\.\d+)?)|([a-zA-Z_:][a-zA-Z0-9_:]*)|(=~|==|!=|>=|<=|[-+*/(){},=<>])|\"([^\"]*)\")"
)
_LEVELS: Final = (
    ("and", "unless"),
    ("==", "!=", ">=", "<=", ">", "<"),
    ("+", "-"),
    ("*", "/"),
)
_OPERATORS: Final[Mapping[str, Callable[[float, float], float]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class Samples:
    """What was exported at one moment.

    Args:
        samples: name, labels and value of each.
        now: the time, seconds since the epoch.
    """

    def __init__(self, samples: Iterable[tuple[str, Mapping[str, str], float]], now: float) -> None:
        self.now = now
        self._by_name: dict[str, Vector] = {}
        for name, labels, value in samples:
            self._by_name.setdefault(name, {})[frozenset(labels.items())] = value

    def evaluate(self, expression: str) -> Value:
        """The value of an expression; an alert fires for each sample of it."""
        parser = _Parser(self, expression)
        value = parser.binary(0)
        if parser.tokens:
            raise SyntaxError(f"{parser.tokens[0]} in {expression}")
        return value

    def select(self, name: str, matchers: list[tuple[str, str, str]]) -> Vector:
        """The samples of a metric whose labels fit."""
        return {
            labels: value
            for labels, value in self._by_name.get(name, {}).items()
            if all(_fits(dict(labels).get(label, ""), how, text) for label, how, text in matchers)
        }


class _Parser:
    def __init__(self, samples: Samples, expression: str) -> None:
        self._samples = samples
        self.tokens: list[str] = []
        at = 0
        expression = expression.rstrip()
        while at < len(expression):
            found = _TOKEN.match(expression, at)
            if found is None:
                raise SyntaxError(expression[at:])
            quoted = found[4]
            self.tokens.append(f'"{quoted}' if quoted is not None else found[0].strip())
            at = found.end()

    def _next(self, *expected: str) -> str:
        if not self.tokens or (expected and self.tokens[0] not in expected):
            raise SyntaxError(f"{expected} expected, not {self.tokens[:1]}")
        return self.tokens.pop(0)

    def binary(self, level: int) -> Value:
        if level == len(_LEVELS):
            return self._single()
        left = self.binary(level + 1)
        while self.tokens and self.tokens[0] in _LEVELS[level]:
            left = _combine(self._next(), left, self.binary(level + 1))
        return left

    def _single(self) -> Value:
        token = self._next()
        if token == "(":
            value = self.binary(0)
            self._next(")")
            return value
        if token[0].isdigit():
            return float(token)
        if token == "time":
            self._next("(")
            self._next(")")
            return self._samples.now
        if token in ("max", "sum"):
            self._next("by")
            names = self._list("(", ")")
            self._next("(")
            inner = self.binary(0)
            self._next(")")
            assert isinstance(inner, dict)
            return _grouped(inner, names, max if token == "max" else sum)
        matchers = []
        if self.tokens and self.tokens[0] == "{":
            self._next("{")
            while self.tokens[0] != "}":
                matchers.append((self._next(), self._next("=", "=~"), self._next()[1:]))
                if self.tokens[0] == ",":
                    self._next()
            self._next("}")
        return self._samples.select(token, matchers)

    def _list(self, begin: str, end: str) -> list[str]:
        self._next(begin)
        names = []
        while self.tokens[0] != end:
            names.append(self._next())
            if self.tokens[0] == ",":
                self._next()
        self._next(end)
        return names


def _fits(value: str, how: str, text: str) -> bool:
    return value == text if how == "=" else re.fullmatch(text, value) is not None


def _grouped(vector: Vector, names: list[str], reduce: Callable[[list[float]], float]) -> Vector:
    groups: dict[Labels, list[float]] = {}
    for labels, value in vector.items():
        kept = frozenset((name, text) for name, text in labels if name in names)
        groups.setdefault(kept, []).append(value)
    return {labels: reduce(values) for labels, values in groups.items()}


def _combine(token: str, left: Value, right: Value) -> Value:
    if token in ("and", "unless"):
        assert isinstance(left, dict)
        assert isinstance(right, dict)
        return {key: it for key, it in left.items() if (key in right) == (token == "and")}
    do = _OPERATORS[token]
    if not isinstance(left, dict) and not isinstance(right, dict):
        return do(left, right)
    keys = left.keys() if isinstance(left, dict) else right.keys()  # type: ignore[union-attr]
    found: Vector = {}
    for key in keys:
        a = left.get(key) if isinstance(left, dict) else left
        b = right.get(key) if isinstance(right, dict) else right
        if a is None or b is None:
            continue
        result = do(a, b)
        if not isinstance(result, bool):
            found[key] = result
        elif result:
            found[key] = a if isinstance(left, dict) else b
    return found
