"""The pages for operators: their commands run, their figures are computed, their examples are well formed."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memevolve_gpu import HashingEmbedder, VectorStore, cli

PACKAGE = Path(cli.__file__).resolve().parents[1]


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which memevolve-store is this checkout's, and a store data/memory in the folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "memevolve-store"
    program.write_text(f"#!{sys.executable}\nfrom memevolve_gpu.cli import main\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    for name in ("data", "backups"):
        (tmp_path / name).mkdir()
    with VectorStore(tmp_path / "data" / "memory", HashingEmbedder()) as store:
        store.store_batch([{"id": f"u{number}", "content": f"lesson {number}"} for number in range(20)])
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(PACKAGE.parent), "MEMEVOLVE_STORE": "data/memory"}


def ran(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_restore_drill_runs_as_it_is_written(repository: Path, tmp_path: Path, shell: dict[str, str]) -> None:
    page = (repository / "docs" / "how-to" / "backup.md").read_text(encoding="utf-8")
    drill = page.partition("## Restore drill")[2]
    block = re.search(r"(?s)```bash\n(.*?)```", drill)
    assert block
    said = ran(["bash", "-euc", block[1]], tmp_path, shell)
    assert "restored 20 units" in said
    assert "no problems found" in said
    assert not (tmp_path / "drill").exists()


def test_the_command_lines_of_the_tutorial_run(repository: Path, tmp_path: Path, shell: dict[str, str]) -> None:
    with VectorStore(tmp_path / "tutorial", HashingEmbedder()) as store:
        store.store_batch([{"id": "wt", "content": "git worktree checks out a second branch"}, {"content": "a skill"}])
    page = (repository / "docs" / "tutorial" / "index.md").read_text(encoding="utf-8")
    block = re.search(r"(?s)```bash\n(.*?)```", page.partition("## The same on the command line")[2])
    assert block
    said = ran(["bash", "-euc", block[1]], tmp_path, shell)
    assert "\nid\nwt\n" in said
    assert "would delete 1 unit" in said
    assert "restored 2 units from copy.db" in said


def test_the_backup_script_verifies_and_rotates(repository: Path, tmp_path: Path, shell: dict[str, str]) -> None:
    script = repository / "examples" / "deploy" / "memevolve-backup"
    old = [tmp_path / "backups" / f"memory-2020-01-0{day}T000000.db" for day in (1, 2, 3)]
    for file in old:
        file.write_bytes(b"old")
    said = ran([str(script), "backups", "2"], tmp_path, shell)
    assert "restored 20 units" in said
    assert re.search(r"verified backups/memory-20[\d-]+T\d+\.db", said)
    assert len(list((tmp_path / "backups").glob("*.db"))) == 2
    assert [file.exists() for file in old] == [False, False, True]
    with pytest.raises(AssertionError, match="no store"):
        ran([str(script), "backups"], tmp_path, {**shell, "MEMEVOLVE_STORE": "data/nowhere"})


def test_the_units_of_systemd_are_well_formed(repository: Path, tmp_path: Path) -> None:
    files = [repository / "examples" / "deploy" / f"memevolve-backup.{kind}" for kind in ("service", "timer")]
    for file in files:
        unit = configparser.RawConfigParser(strict=True)
        unit.read(file, encoding="utf-8")
        assert unit.has_option("Unit", "Description")
        shutil.copy(file, tmp_path)
    verify = shutil.which("systemd-analyze")
    if verify is None:
        return
    service = tmp_path / files[0].name
    service.write_text(re.sub(r"ExecStart=.*", "ExecStart=/bin/true", service.read_text(encoding="utf-8")))
    done = subprocess.run(
        [verify, "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_uses_commands_that_exist(repository: Path) -> None:
    lines = (repository / "examples" / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    instructions = [line.split()[0] for line in lines if line and not line.startswith(("#", " "))]
    known = {"FROM", "RUN", "COPY", "USER", "ENV", "VOLUME", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert set(instructions) <= known
    assert instructions[0] == "FROM"
    named = {command.name for command in cli.app.registered_commands}
    assert json.loads(lines[-1].partition(" ")[2])[0] in named
    assert instructions.index("USER") < instructions.index("ENTRYPOINT"), "not as root"


def test_the_sizes_are_those_that_were_measured(repository: Path) -> None:
    results = repository / "benchmarks" / "results"
    sizes = json.loads((results / "record_sizes.json").read_text(encoding="utf-8"))
    memory = json.loads((results / "foundation.json").read_text(encoding="utf-8"))["opening, ivf"]["with snapshot"]
    page = (repository / "docs" / "how-to" / "sizing.md").read_text(encoding="utf-8")
    for units in (10_000, 100_000, 1_000_000):
        figures = [
            units * sizes["database_bytes_per_unit"] / 1e6,
            units * sizes["snapshot_bytes_per_unit"] / 1e6,
            units / 1000 * memory["counted_mb_per_1000"],
        ]
        assert f"| {units:,} | {' | '.join(f'{figure:,.0f} MB' for figure in figures)} |" in page
    assert f"{round(sizes['other_bytes_per_unit'], -1):.0f} bytes for the log" in page


def test_no_message_points_to_a_file_that_the_wheel_lacks() -> None:
    """Docstrings may name files of the checkout; what a user of the wheel reads has links to the documentation."""
    lacking = re.compile(r"(?<![\w/])(?:docs|examples|scripts|benchmarks|cpu_tests)/\w")
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
                found += [f"{path.name}:{node.lineno} {node.value!r}"] if lacking.search(node.value) else []
    assert found == []
