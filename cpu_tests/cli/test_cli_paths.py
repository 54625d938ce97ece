"""Every line of the table of good and bad paths in docs/reference/cli.md, run as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import apsw
import pytest
from typer.testing import CliRunner

from memevolve_gpu import HashingEmbedder, VectorStore, cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
UNITS = [
    {"id": "wal", "type": "lesson", "content": "copy the write-ahead log too", "tags": ["sqlite"]},
    {"id": "bisect", "type": "skill", "content": "bisect finds the bad commit", "tags": ["git"]},
    {"id": "worktree", "type": "tool", "content": "worktree checks out a second branch", "tags": ["git"]},
]


def lines() -> list[tuple[str, int, str]]:
    """Command line, exit code and what it says, of every row of the table."""
    text = PAGE.read_text(encoding="utf-8").partition("| line | code | what it says |\n|---|---|---|\n")[2]
    rows = text.partition("\n\n")[0].splitlines()
    found = [re.fullmatch(r"\| `(.+?)`(?: \(.+\))? \| (\d+) \| (.+) \|", row) for row in rows]
    assert all(found), [row for row, match in zip(rows, found, strict=True) if not match]
    return [(match[1], int(match[2]), match[3]) for match in found if match]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in ("memory", "flipped", "damaged"):
        with VectorStore(folder / name, HashingEmbedder(), storage_config={"background": False}) as store:
            store.store_batch(UNITS)
            if name == "memory":
                store.backup(folder / "backup.db")
        for derived in folder.glob(f"{name}.[!d]*"):
            derived.unlink()
    with apsw.Connection(str(folder / "flipped.db")) as con:
        con.execute("UPDATE units SET unit = CAST(x'7b2261ff' AS TEXT) WHERE id = 'wal'")
    con.close()
    with VectorStore(folder / "flipped", None) as store, pytest.raises(RuntimeError, match="damaged"):
        store.retrieve("wal")
    with (folder / "damaged.db").open("r+b") as file:
        file.truncate(8192)
    text = "\n".join(map(json.dumps, UNITS))
    (folder / "units.jsonl").write_text(text + "\n", encoding="utf-8")
    (folder / "bad.jsonl").write_text(json.dumps(UNITS[0]) + "\nnot JSON\n", encoding="utf-8")
    (folder / "unit.json").write_text(json.dumps({"content": "a new text"}), encoding="utf-8")
    (folder / "text.db").write_text("this is a text and no database " * 200, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("line", "code", "said"), lines(), ids=[line for line, _, _ in lines()])
def test_a_line_of_the_table(
    line: str, code: int, said: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    for missing in ("pymilvus", "sentence_transformers", "fastembed"):
        monkeypatch.setitem(sys.modules, missing, None)
    words = shlex.split(line)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    assert words.pop(0) == "memevolve-store"
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == code, result.output
    assert said in " ".join(result.output.split()), result.output
    if code:
        assert "Traceback" not in result.output


def test_every_command_has_a_good_and_a_bad_path() -> None:
    groups = {"manage": ("prune", "consolidate", "deduplicate", "forget"), "keys": ("add", "list", "remove")}
    named = {str(command.name) for command in cli.app.registered_commands}
    wanted = named | {f"{group} {name}" for group, names in groups.items() for name in names}
    for name in wanted:
        codes = {code for line, code, _ in lines() if re.search(rf"memevolve-store {name}( |$)", line)}
        assert 0 in codes, name
        assert codes - {0}, name
    assert {code for _, code, _ in lines()} >= {0, 1, 2, 3, 4, 5, 6}
