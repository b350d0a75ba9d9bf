"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from walship.replica.config.file import SOCKET_PATH
from walship.replica.errors import (
    ConfigError,
    FormatError,
)
from walship.replica.format.types import LEVEL_MAX, parse_txid

__all__ = [
    "HelpFormatter",
    "Parser",
    "add_config",
    "add_json",
    "add_log_level",
    "add_option",
    "add_running",
    "add_socket",
    "add_target",
    "at_least_one",
    "levels_of",
    "parse_txid_option",
]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option in one spelling."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return action.option_strings[0]
        default = self._get_default_metavar_for_optional(action)
        return f"{action.option_strings[0]} {self._format_args(action, default)}"


class Parser(argparse.ArgumentParser):
    """Options with one dash or two, usage errors as one line with exit code 1."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} -h` shows what there is)")


def add_option(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Add an option that is spelled with one dash or with two."""
    parser.add_argument(f"-{name}", f"--{name}", **settings)


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="DB|REPLICA", help="a database, or a URL or directory")


def add_config(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser,
        "config",
        metavar="PATH",
        help="the configuration file (see `walship -h` for where it is looked for)",
    )
    add_option(
        parser,
        "no-expand-env",
        action="store_true",
        help="do not replace $NAME in the configuration file",
    )
    add_option(
        parser,
        "strict",
        action="store_true",
        help="an unknown key in the configuration file is an error",
    )


def add_socket(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser,
        "socket",
        metavar="PATH",
        help=f"the control socket of `walship replicate` (as configured, or {SOCKET_PATH})",
    )


def add_log_level(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser,
        "log-level",
        metavar="LEVEL",
        choices=["debug", "info", "warn", "error"],
        help="how much to say (as configured, or info)",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_option(
        parser,
        "timeout",
        metavar="SECONDS",
        type=at_least_one,
        default=1,
        help="how long to wait for the answer of each process (1)",
    )
    add_option(
        parser,
        "socket",
        metavar="PATH",
        help="ask `walship replicate` on this control socket instead",
    )
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    add_option(parser, "json", action="store_true", help="print JSON")


def at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on is expected, not {text!r}")
    return int(text)


def levels_of(text: str) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(LEVEL_MAX + 1))
    if re.fullmatch(r"[0-9]", text) is None:
        raise argparse.ArgumentTypeError(f"0 to {LEVEL_MAX} or all is expected, not {text!r}")
    return (int(text),)


def parse_txid_option(text: str) -> int:
    try:
        return parse_txid(text.lower())
    except FormatError:
        raise ConfigError(f"-txid: 16 hex digits are expected, not {text!r}") from None
