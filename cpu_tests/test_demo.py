"""The demo of the old fault, without a checkout of MemEvolve: our side alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memevolve_gpu.demo.corruption import main


def test_our_side_alone_loses_nothing_and_says_that_it_is_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--kills", "3", "--json", str(tmp_path / "figures.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Without MemEvolve's store: no checkout")
    (ours,) = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")).values()
    assert (ours["accepted"], ours["found"], ours["found_reopened"], ours["kills"]) == (200, 200, 200, 3)
    assert ours["acknowledged"] == ours["kept"] == ours["searchable"] >= 150
    assert "200" in shown


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--memevolve", str(tmp_path)])
    assert ended.value.code == 2
    assert "has no src/memevolve" in capsys.readouterr().err


def test_a_store_of_theirs_that_cannot_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src/memevolve").mkdir(parents=True)
    (tmp_path / ".env.example").write_text("MEMEVOLVE_X=1\n", encoding="utf-8")
    assert main(["--memevolve", str(tmp_path), "--kills", "1"]) == 2
    told = capsys.readouterr().err
    assert "MemEvolve's own store could not be run" in told
    assert "needs Python 3.12" in told
