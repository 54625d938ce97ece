"""The lines of the README, in order, from the wheel and from a fresh clone; nothing is downloaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import STAND_IN

ROOT = Path(__file__).resolve().parents[2]

INSTALLED = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def blocks() -> Iterator[tuple[str, str]]:
    """Language and text of every block of code in the README, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return ((found[1], found[2]) for found in re.finditer(r"(?s)```(bash|python)\n(.*?)```", text))


def environment(folder: Path) -> None:
    """Make a virtual environment that sees the packages installed here, but not this checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "shared.pth").write_text("\n".join(INSTALLED), encoding="utf-8")
    (site / "sentence_transformers.py").write_text(STAND_IN, encoding="utf-8")


def run_readme(folder: Path, programs: Path, skipped: str) -> str:
    """Run every line of the README that does not begin as ``skipped`` does; return what they print."""
    said = []
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "MEMEVOLVE_"))}
    for language, text in blocks():
        if language == "python":
            command = [str(programs / "python"), "-c", text]
        else:
            lines = [line for line in text.splitlines() if not re.match(skipped, line)]
            command = ["bash", "-euc", "\n".join(lines)]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**kept, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
        said.append(done.stdout)
    return "\n".join(said)


def check_what_was_said(said: str) -> None:
    assert "added 300 units" in said
    assert "git-reflog-recovers" in said
    assert re.search(r"(?m)^\d+ acknowledged units, 0 lost, ", said)
    assert "nothing is wrong" in said
    assert "git bisect finds the commit that broke a test." in said


def test_the_readme_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    environment(tmp_path / "venv")
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = tmp_path / "venv" / "bin" / "memevolve-store"
    program.write_text(f"#!{program.parent}/python\nfrom memevolve_gpu.cli import main\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / "work").mkdir()
    said = run_readme(tmp_path / "work", program.parent, r"pip |scripts/")
    check_what_was_said(said)
    assert not (tmp_path / "work" / "src").exists()


def test_the_readme_from_a_fresh_clone(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    clone = tmp_path / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
            (clone / name).chmod((ROOT / name).stat().st_mode)
    environment(clone / ".venv")
    (site,) = (clone / ".venv").glob("lib/python3*/site-packages")
    (site / "first.pth").write_text(str(clone / "src"), encoding="utf-8")  # what pip install -e leaves behind
    program = clone / ".venv" / "bin" / "memevolve-store"
    program.write_text(f"#!{program.parent}/python\nfrom memevolve_gpu.cli import main\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    stamp = "pwd && .venv/bin/python -VV && cksum pyproject.toml scripts/setup"
    done = subprocess.run(["bash", "-c", f"({stamp}) >.venv/setup-stamp"], cwd=clone, check=True)
    assert done.returncode == 0
    said = run_readme(clone, program.parent, r"pip |scripts/test")
    check_what_was_said(said)
    assert said.count("added 300 units") == 2, "memevolve-store demo, and scripts/demo"
