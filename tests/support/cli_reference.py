"""Writes docs/cli.md from the command line's own parser: run it as a program."""

from __future__ import annotations

import argparse
import html
import re
from pathlib import Path
from typing import Final

from walship import cli

__all__ = ["FILE", "cli_reference"]

FILE: Final = Path(__file__).parents[2] / "docs" / "cli.md"

_HEAD: Final = """\
# Commands

<!-- Made from the parser by tests/support/cli_reference.py: change it there (`make docs`). -->

What `walship -h` and `walship COMMAND -h` say. Options are written with one dash or with two.
"""


def cli_reference() -> str:
    """The page."""
    parser = cli._parser()
    (subparsers,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    summaries = {each.dest: each.help or "" for each in subparsers._choices_actions}
    parts = [_HEAD, "| command | what it does |\n|---|---|"]
    for name, summary in summaries.items():
        parts[-1] += f"\n| [`{name}`](#{name}) | {_cell(summary)} |"
    codes = ""
    for name in summaries:
        command = subparsers.choices[name]
        text, _, codes = (command.epilog or "").partition("exit codes:\n")
        parts.append(f"## {name}\n\n{command.description}")
        parts.append(f"```text\n{_usage(command)}\n```")
        parts.append(_table(command))
        if text.strip():
            parts.append(_prose(text))
    whole = re.sub(r"\n {3,}", " ", codes)  # a meaning may go on in the next line
    codes_rows = re.findall(r"^  (\d+) +(.*)$", whole, re.MULTILINE)
    parts.append("## Exit codes\n\n| code | meaning |\n|---|---|")
    for code, meaning in codes_rows:
        parts[-1] += f"\n| {code} | {_cell(meaning)} |"
    parts.append("More about each: [errors](errors.md).")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [each for each in parser._actions if each.help is not argparse.SUPPRESS]


def _usage(parser: argparse.ArgumentParser) -> str:
    places = [_name(each) for each in _shown(parser) if not each.option_strings]
    optional = [each.nargs == "?" for each in _shown(parser) if not each.option_strings]
    words = [f"[{word}]" if o else word for word, o in zip(places, optional, strict=True)]
    return " ".join(["usage:", parser.prog, "[OPTIONS]", *words])


def _name(action: argparse.Action) -> str:
    if action.option_strings:
        name = action.option_strings[0]
        if action.nargs == 0:
            return name
        argument = action.metavar or "|".join(map(str, action.choices or (action.dest.upper(),)))
        return f"{name} {argument}"
    return str(action.metavar or action.dest)


def _table(parser: argparse.ArgumentParser) -> str:
    rows = [
        f"| {_code(_name(each))} | {_cell(each.help or '')} |"
        for each in _shown(parser)
        if "-h" not in each.option_strings
    ]
    return "\n".join(["| | meaning |", "|---|---|", *rows]) if rows else ""


def _prose(text: str) -> str:
    """An epilog: examples, which are indented there, become blocks of code."""
    parts: list[str] = []
    for line in text.strip().splitlines():
        if re.match(r" +walship ", line):
            if parts and parts[-1].startswith("    "):
                parts[-1] += f"\n    {line.strip()}"
            else:
                parts.append(f"    {line.strip()}")
        else:
            parts.append(line.strip())
    found = []
    for part in parts:
        if part.startswith("    "):
            code = "\n".join(each.strip() for each in part.splitlines())
            found.append(
                "\n<!-- parsed: an example of -h, which names no replica that is there -->\n\n"
                f"```sh\n{code}\n```\n"
            )
        else:
            found.append(re.sub(r"^examples:$", "Examples:\n", part))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(found))


def _code(text: str) -> str:
    """Code in a cell: backquotes around an escaped bar are read in two ways."""
    return (
        f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(cli_reference(), encoding="utf-8")
