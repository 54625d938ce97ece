"""The demo of the old fault, with MemEvolve's own store beside ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from memevolve_kit import copy_of


def test_the_old_store_and_ours_side_by_side(tmp_path: Path, found: list[tuple[str, str, str]]) -> None:
    tree = copy_of(tmp_path / "demo")
    target = tmp_path / "figures.json"
    command = [sys.executable, "-m", "memevolve_gpu.demo.corruption", "--memevolve", str(tree), "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MemEvolve's own store" in done.stdout
    figures = json.loads(target.read_text(encoding="utf-8"))
    theirs, ours = figures["theirs"], figures["ours"]
    for what, row in (
        ("an id again: of 200 units accepted", "accepted"),
        ("  found by their own text", "found"),
        ("20 kills: acknowledged units", "acknowledged"),
        ("  there afterwards", "kept"),
        ("  found by their own text", "searchable"),
    ):
        found.append((what, str(theirs[row]), str(ours[row])))
    assert (ours["accepted"], ours["found"], ours["found_reopened"], ours["lossy"]) == (200, 200, 200, 0)
    assert ours["acknowledged"] == ours["kept"] == ours["searchable"] > 1_000
    assert theirs["acknowledged"] > 1_000
