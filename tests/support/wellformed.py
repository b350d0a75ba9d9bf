"""Files and blocks that are not programs: what has to hold of each kind.

Each function raises `Unfit`, with what is wrong, or returns.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import yaml

from walship.replica.config.settings import DatabaseSettings
from walship.replica.config.sources import load_config
from walship.replica.errors import ConfigError

__all__ = [
    "VARIABLES",
    "Unfit",
    "check_configuration",
    "check_dockerfile",
    "check_fly",
    "check_json",
    "check_kubernetes",
    "check_toml",
    "check_unit",
    "check_yaml",
    "command_of_dockerfile",
    "command_of_unit",
]

#: What a reader has set.
VARIABLES: Final = {
    "AWS_ACCESS_KEY_ID": "tid_xxxxxxxxxxxxxxxxxxxx",
    "AWS_SECRET_ACCESS_KEY": "tsec_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "BUCKET_NAME": "my-bucket",
}
#: How long a database needs to be closed: what runs it must not be killed earlier.
CLOSING_S: Final = DatabaseSettings.shutdown_sync_timeout_s
_INSTRUCTIONS: Final = (
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL"),
    *("ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
)
_SHELLS: Final = {"sh", "bash", "dash", "/bin/sh", "/bin/bash", "/usr/bin/env"}


class Unfit(Exception):
    """It would not work, or not well."""


def _require(holds: object, message: str) -> None:
    if not holds:
        raise Unfit(message)


# --- data ----------------------------------------------------------------------------------------


def check_json(text: str) -> None:
    """One JSON value."""
    try:
        json.loads(text)
    except ValueError as error:
        raise Unfit(f"not JSON: {error}") from error


def check_toml(text: str) -> None:
    """TOML; where it is part of a configuration of Fly.io, one that stops applications well."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unfit(f"not TOML: {error}") from error
    _check_stopping(found)


def check_yaml(text: str) -> str:
    """YAML: a configuration of walship, Kubernetes, Compose or Prometheus.  Returns of which."""
    try:
        found = [each for each in yaml.safe_load_all(text) if each is not None]
    except yaml.YAMLError as error:
        raise Unfit(f"not YAML: {error}") from error
    _require(all(isinstance(each, dict) for each in found) and found, "mappings are expected")
    if all("apiVersion" in each for each in found):
        check_kubernetes(text)
        return "kubernetes"
    if "services" in found[0]:
        for service in found[0]["services"].values():
            grace = str(service.get("stop_grace_period", "10s")).removesuffix("s")
            _require(grace.isdigit() and int(grace) > CLOSING_S, "stop_grace_period is too short")
            _require("entrypoint" not in service, "there is an entrypoint")
        return "compose"
    if any(key in found[0] for key in ("groups", "scrape_configs")):
        return "prometheus"
    check_configuration(text)
    return "walship"


def check_configuration(text: str, environ: Mapping[str, str] = VARIABLES) -> None:
    """A configuration file in which walship knows each key."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "walship.yml"
        file.write_text(text, encoding="utf-8")
        try:
            load_config(file, environ=environ, strict=True)
        except ConfigError as error:
            raise Unfit(f"not a configuration: {error}") from error


# --- what runs an application --------------------------------------------------------------------


def _exec_form(words: object) -> list[str]:
    """A command without a shell between SIGTERM and the program."""
    if not (isinstance(words, list) and words and all(isinstance(each, str) for each in words)):
        raise Unfit("the command is not a list of words: a shell would run it, and keep SIGTERM")
    _require(words[0] not in _SHELLS, f"{words[0]} would keep SIGTERM from the application")
    return words


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            word, _, rest = line.strip().partition(" ")
            yield word.upper(), rest.strip()


def command_of_dockerfile(text: str) -> tuple[list[str], dict[str, str]]:
    """What its container runs, and the variables it sets."""
    found = list(_instructions(text))
    _require(not any(word == "ENTRYPOINT" for word, _ in found), "there is an ENTRYPOINT")
    commands = [rest for word, rest in found if word == "CMD"]
    _require(len(commands) == 1, "one CMD is expected")
    try:
        words = json.loads(commands[0])
    except ValueError:
        words = None
    environ: dict[str, str] = {}
    for word, rest in found:
        if word == "ENV":
            environ.update(each.split("=", 1) for each in shlex.split(rest))
    return _exec_form(words), environ


def check_dockerfile(text: str) -> None:
    """One program, which gets SIGTERM; a volume for the database; hadolint has nothing to say."""
    command_of_dockerfile(text)
    found = list(_instructions(text))
    _require(any(word == "VOLUME" for word, _ in found), "there is no VOLUME for the database")
    signals = {rest for word, rest in found if word == "STOPSIGNAL"}
    _require(signals <= {"SIGTERM"}, "another signal than SIGTERM stops it")
    unknown = {word for word, _ in found}.difference(_INSTRUCTIONS)
    _require(not unknown, f"no instructions: {', '.join(sorted(unknown))}")
    _require(found[0][0] in ("ARG", "FROM"), "it does not begin with FROM")
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists() and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return  # there is none to install; these checks are made elsewhere
    said = _output_of([str(hadolint), "--no-color", "-"], given=text)
    _require(not said, f"hadolint: {said}")


def _unit(text: str) -> dict[str, dict[str, list[str]]]:
    sections: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
            continue
        name, equals, value = line.partition("=")
        _require(equals and section, f"not a line of a unit: {line}")
        sections.setdefault(section, {}).setdefault(name, []).append(value)
    return sections


def command_of_unit(text: str) -> tuple[list[str], dict[str, str]]:
    """What it runs, and the variables it sets."""
    service = _unit(text).get("Service", {})
    starts = service.get("ExecStart", [])
    _require(len(starts) == 1, "one ExecStart is expected")
    variables = [each for line in service.get("Environment", []) for each in shlex.split(line)]
    return _exec_form(shlex.split(starts[0])), dict(each.split("=", 1) for each in variables)


def check_unit(text: str) -> None:
    """A service that gets SIGTERM, and time to close its databases; its settings are systemd's."""
    words, _ = command_of_unit(text)
    unit = _unit(text)
    service = unit["Service"]
    _require(service.get("KillSignal", ["SIGTERM"]) == ["SIGTERM"], "KillSignal is not SIGTERM")
    seconds = service.get("TimeoutStopSec", ["90"])[-1]
    _require(seconds.isdigit(), "TimeoutStopSec is expected in seconds")
    _require(int(seconds) > CLOSING_S, f"TimeoutStopSec has to be longer than {CLOSING_S:.0f} s")
    _require("WantedBy" in unit.get("Install", {}), "nothing starts it: WantedBy is missing")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "checked.service"
        file.write_text(text, encoding="utf-8")
        said = _output_of([sys.executable, "-m", "systemdlint", "--norootfs", str(file)])
        # Whether to hand on control groups is a matter of taste.
        faults = [line for line in said.splitlines() if line.strip() and "[Security." not in line]
        _require(not faults, "systemdlint: " + "; ".join(faults))
        analyze = shutil.which("systemd-analyze")
        if analyze is None:
            return  # it comes with systemd, and only there
        # It wants the program to be there, and its user.
        known = text.replace(words[0], sys.executable)
        known = re.sub(r"^(User|Group)=.*$", r"\1=root", known, flags=re.MULTILINE)
        file.write_text(known, encoding="utf-8")
        said = _output_of([analyze, "verify", "--man=no", "--generators=no", str(file)])
    faults = [line for line in said.splitlines() if "checked.service" in line]
    _require(not faults, "systemd-analyze: " + "; ".join(faults))


def check_fly(text: str) -> None:
    """SIGTERM, time to close, a volume, and one machine at a time."""
    check_toml(text)
    found = tomllib.loads(text)
    for name in ("kill_signal", "kill_timeout", "mounts", "deploy", "env"):
        _require(name in found, f"{name} is missing")
    destination = found["mounts"][0]["destination"]
    inside = any(str(value).startswith(f"{destination}/") for value in found["env"].values())
    _require(inside, f"the database is not on the volume {destination}")


def _check_stopping(found: Mapping[str, Any]) -> None:
    """What a fly.toml, or a part of one, says about how an application is stopped."""
    _require(found.get("kill_signal", "SIGTERM") == "SIGTERM", "kill_signal is not SIGTERM")
    timeout = str(found.get("kill_timeout", "300s")).removesuffix("s")
    _require(timeout.isdigit(), "kill_timeout is expected in seconds")
    _require(CLOSING_S < int(timeout) <= 300, "kill_timeout has to be 31 s to 5 min")
    strategy = found.get("deploy", {}).get("strategy", "rolling")
    _require(strategy in ("rolling", "immediate"), f"{strategy} runs two machines at once")


def check_kubernetes(text: str) -> None:
    """Objects that fit their schemas; one pod with the database, with a volume, and time to end."""
    objects = [each for each in yaml.safe_load_all(text) if each is not None]
    for each in objects:
        _check_schema(each)
    for each in objects:
        template = each.get("spec", {}).get("template") if isinstance(each, dict) else None
        if template is None:
            continue
        _require(each["kind"] == "StatefulSet", "two pods run at once when a Deployment rolls")
        spec = each["spec"]
        _require(spec.get("replicas") == 1, "one replica: a database has one writer")
        pod = template["spec"]
        grace = pod.get("terminationGracePeriodSeconds", 30)
        _require(grace > CLOSING_S, f"terminationGracePeriodSeconds: more than {CLOSING_S:.0f}")
        claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            paths = [mounts[name] for name in mounts if name in claims]
            values = [str(given.get("value")) for given in container.get("env", ())]
            inside = any(value.startswith(f"{path}/") for value in values for path in paths)
            _require(inside, "the database is not on the claimed volume")
            _require("lifecycle" not in container, "preStop takes from the time to end")
            if "command" in container:
                _exec_form(container["command"])


def _check_schema(found: dict[str, Any]) -> None:
    try:
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        raise Unfit(f"{found.get('kind')}: {error.message}") from error


def _output_of(command: list[str], given: str = "") -> str:
    """All that a program writes about what it is given."""
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError as error:
        raise Unfit(f"{command[0]} is missing: make dev installs it") from error
    return f"{done.stdout}{done.stderr}".strip()
