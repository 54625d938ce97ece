"""Ctrl-C at any point of a bulk write: all or nothing of each transaction, exit code 130, a message that is true."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest

from memevolve_gpu import HashingEmbedder, VectorStore, cli
from memevolve_gpu.errors import MemEvolveError

SEED = 20_261_128
POINTS = 10
HELD = 5
COUNT = 30


class Press:
    """Presses Ctrl-C when the package, or the file of that name, has executed so many lines; ``lines`` counts them."""

    def __init__(self, at: int | None, file: str = "memevolve_gpu") -> None:
        self.at, self.lines, self.file = at, 0, file

    def __enter__(self) -> Press:
        self._before = sys.gettrace()  # that of a tool that measures coverage
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        return self._line if self.file in name and not name.endswith("app.py") else None

    def _line(self, _frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self._line


def units(first: int, count: int) -> list[dict[str, Any]]:
    return [{"id": f"n{n}", "type": "skill", "content": f"fact {n} of many"} for n in range(first, first + count)]


def source_of(kind: str, folder: Path) -> Path:
    """What is written: a file of units, an export with vectors, or a store of MemEvolve's."""
    if kind == "import of an old store":
        path = folder / "old.data"
        path.write_bytes(pickle.dumps({unit["id"]: unit for unit in units(HELD, COUNT)}))
        return path
    if kind == "copy":
        with VectorStore(folder / "source", HashingEmbedder()) as store:
            store.store_batch(units(HELD, COUNT))
        return folder / "source"
    path = folder / "units.jsonl"
    path.write_text("".join(json.dumps(unit) + "\n" for unit in units(HELD, COUNT)))
    return path


SAYS_MORE = re.compile("lines|all or nothing|the same command continues")
WORDS = {"add in batches": ["--batch-size", "10"], "import --from": ["--from", "jsonl"]}


def run(kind: str, source: Path, prefix: Path, at: int | None, file: str = "memevolve_gpu") -> tuple[int, int]:
    """The exit code, and how many lines ran."""
    line = ["memevolve-store", kind.split(maxsplit=1)[0], str(source), *WORDS.get(kind, [])]
    line += [str(prefix)] if kind == "copy" else ["--store", str(prefix), "--embedder", "hashing"]
    with patch.object(sys, "argv", line), Press(at, file) as press, pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), press.lines


def ids_in(prefix: Path) -> set[str] | None:
    """The ids of a store that is in order; None where there is none."""
    try:
        store = VectorStore(prefix, None)
    except MemEvolveError:
        return None
    with store:
        assert store.check() == []
        return {unit["id"] for unit in store}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # a file just opened
@pytest.mark.parametrize("begun", ["a new store", "a store with units"])
@pytest.mark.parametrize("kind", ["add", "add in batches", "import", "import of an old store", "import --from", "copy"])
def test_ctrl_c_at_any_line(kind: str, begun: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    print(f"seed {SEED}")
    rng = random.Random(f"{SEED} {kind} {begun}")
    source = source_of(kind, tmp_path)
    held = units(0, HELD) if begun == "a store with units" else []
    before, every = {unit["id"] for unit in held}, {unit["id"] for unit in units(0, HELD + COUNT)} if held else set()
    every = every or {unit["id"] for unit in units(HELD, COUNT)}

    if held:
        first = tmp_path / "held.jsonl"
        first.write_text("".join(json.dumps(unit) + "\n" for unit in held))
        run("add", first, tmp_path / "held", None)

    def prepared(name: str) -> Path:
        for file in tmp_path.glob("held.[!j]*"):
            shutil.copyfile(file, tmp_path / f"{name}{file.name.removeprefix('held')}")
        return tmp_path / name

    code, lines = run(kind, source, prepared("whole"), None)
    assert (code, ids_in(tmp_path / "whole")) == (0, every)
    interrupted = 0
    for number, at in enumerate(sorted(rng.sample(range(1, lines), POINTS))):
        prefix = prepared(f"s{number}")
        capfd.readouterr()
        code, _ = run(kind, source, prefix, at)
        told = capfd.readouterr()
        said, there = told.err, ids_in(prefix)
        interrupted += code == 130
        assert code in (0, 130), (at, code, said)
        allowed = [before, every]
        if kind == "add in batches":
            allowed += [before | {unit["id"] for unit in units(HELD, upto)} for upto in (10, 20)]
        assert (there or set()) in allowed, (at, said)
        assert there != set(), f"line {at}: an empty store is left behind"
        if code == 130:
            assert "error: interrupted" in said, (at, said)
            assert "Traceback" not in said
            added = len((there or set()) - before)
            assert ("nothing of" not in said) or not added, (at, said)
            ended = f" {added} units from " in told.out  # the result is printed before the store closes
            assert f"{added} units of" in said or not added or ended or SAYS_MORE.search(said), (at, told)
    assert interrupted > POINTS // 3  # the others lie behind the end of the command


@pytest.mark.parametrize("file", ["memevolve_gpu/live/", "live/rebuild.py"])
def test_ctrl_c_outside_the_transaction_of_a_new_store_is_not_forgotten(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """While the store is opened it waits for the transaction; while the index is built it stops that at once."""
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MIN_TRAINING_UNITS", "100")
    source = tmp_path / "units.jsonl"
    source.write_text("".join(json.dumps(unit) + "\n" for unit in units(0, 150)))
    code, _ = run("add", source, tmp_path / "new", 1, file)
    said = capfd.readouterr().err
    assert code == 130, said
    assert "interrupted; 150 units of" in said
    assert ids_in(tmp_path / "new") == {unit["id"] for unit in units(0, 150)}
