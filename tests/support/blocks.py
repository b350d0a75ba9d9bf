"""The blocks of code in README.md and docs/, and what is to be done with each.

A block is fenced and has a language.  With ``title="NAME"`` it is a file of that name.  HTML
comments directly above it, which no reader sees, say more:

    <!-- not run: REASON -->     it cannot be run here
    <!-- parsed: REASON -->      the same for commands of walship: their options are looked at
    <!-- before: COMMANDS -->    run first, to bring about what the text around it takes for given
    <!-- after: COMMANDS -->     run afterwards: checks what the block has done
    <!-- exit: N -->             it ends with this exit code (0)
    <!-- serves: URL -->         it is a server, which answers there once it is up
    <!-- until: COMMAND -->      it runs until this command succeeds; then SIGTERM has to end it

COMMANDS are those of a shell, or one line of Python after ``>>> ``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

__all__ = ["PAGES", "ROOT", "BadPage", "Block", "blocks_of"]

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE: Final = re.compile(r'( *)(`{3,})(\w*)(?: title="([^"]+)")?\s*')
_COMMENT: Final = re.compile(
    r"\s*<!-- (not run|parsed|before|after|exit|serves|until): (.+?) -->\s*"
)
_LIST_ITEM: Final = re.compile(r"\s*(?:[*+-]|\d+\.) ")


class BadPage(Exception):
    """A page has code that nobody knows how to treat; the message says where."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block.

    Attributes:
        page: the file it is in, from the project's root.
        line: of its first line of code, from 1.
        language: as after the fence.
        title: the name of the file that it is, or empty.
        directives: what the comments above it say, by their first word.
    """

    page: str
    line: int
    language: str
    text: str
    title: str = ""
    directives: dict[str, list[str]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """All blocks of a page, in order.

    Raises:
        BadPage: code that is indented rather than fenced, without a language, or without an end.
    """
    name = os.path.relpath(page, ROOT)
    lines = page.read_text(encoding="utf-8").splitlines()
    directives: dict[str, list[str]] = {}
    in_list = False
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        comment = _COMMENT.fullmatch(line)
        if comment is not None:
            directives.setdefault(comment[1], []).append(comment[2])
            continue
        fence = _FENCE.fullmatch(line)
        if fence is None:
            if not line.strip():
                continue
            blank_above = number < 2 or not lines[number - 2].strip()
            if _LIST_ITEM.match(line):
                in_list = True
            elif not line.startswith(" "):
                in_list = False
            if line.startswith("    ") and blank_above and not in_list:
                raise BadPage(f"{name}:{number}: fence this code, with a language")
            if directives:
                raise BadPage(f"{name}:{number}: a comment about a block, and no block")
            continue
        indent, ticks, language, title = fence.groups()
        if not language:
            raise BadPage(f"{name}:{number}: give this block a language")
        first = number
        while number < len(lines) and lines[number].strip() != ticks:
            number += 1
        if number == len(lines):
            raise BadPage(f"{name}:{first}: this block has no end")
        text = "".join(f"{each.removeprefix(indent)}\n" for each in lines[first:number])
        number += 1
        yield Block(name, first + 1, language, text, title or "", directives)
        directives = {}
