"""The files for containers and systemd: read, not run."""

from __future__ import annotations

import configparser
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from memevolve_gpu import cli
from memevolve_gpu.cli import serve_commands

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"


def commands() -> set[str]:
    return {str(command.name) for command in cli.app.registered_commands} | {"keys"}


def loaded(path: Path) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_image_serves_as_a_user_of_its_own() -> None:
    lines = (DEPLOY / "Dockerfile.server").read_text(encoding="utf-8").splitlines()
    instructions = [line.split()[0] for line in lines if line and not line.startswith(("#", " "))]
    known = {"FROM", "RUN", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert set(instructions) <= known
    assert instructions[0] == "FROM"
    assert instructions.index("USER") < instructions.index("ENTRYPOINT")
    command = json.loads(lines[-1].partition(" ")[2])
    assert command[0] in commands()
    check = next(line for line in lines if line.startswith("HEALTHCHECK")).partition("CMD ")[2]
    compile(json.loads(check)[2], "HEALTHCHECK", "exec")
    for line in lines:
        if line.startswith("#") and "memevolve-server keys" in line:
            assert shlex.split(line.partition("memevolve-server ")[2])[:2] == ["keys", "add"]


def test_compose_names_files_that_exist_and_opens_nothing_to_the_world() -> None:
    composed = loaded(DEPLOY / "compose.yaml")
    assert set(composed) == {"services", "volumes"}
    memory, prometheus = composed["services"]["memory"], composed["services"]["prometheus"]
    build = memory["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    for service in (memory, prometheus):
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    sources = [volume.split(":")[0] for volume in prometheus["volumes"]]
    assert [(DEPLOY / source).is_file() for source in sources if source != "./prometheus-token"] == [True, True]
    assert set(composed["volumes"]) == {memory["volumes"][0].split(":")[0]}
    scraped = loaded(DEPLOY / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == ["memory:8321"]


def test_the_unit_of_systemd_starts_a_command_that_exists() -> None:
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "memevolve-server.service", encoding="utf-8")
    assert shlex.split(unit["Service"]["ExecStart"])[1] in commands()
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert {str(command.name) for command in serve_commands.keys_app.registered_commands} == {"add", "list", "remove"}
