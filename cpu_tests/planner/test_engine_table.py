"""A table of engines that a user measured: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_kit import table_at

from memevolve_gpu import VectorStore
from memevolve_gpu.errors import ConfigurationError
from memevolve_gpu.planner.engine_table import SETTING, TABLE, Band, read_engine_table
from memevolve_gpu.utils.config import StorageConfig

GOOD: dict[str, Any] = {
    "bands": [[40_000, ["cpu", "torch"]], [1_000_000, ["torch", "cpu"]], [None, ["torch", "faiss", "cpu"]]],
    "source": "our card,\n 2026-05-01",
}


def written(folder: Path, value: object) -> str:
    path = folder / "measured.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_a_table_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_engine_table(written(tmp_path, GOOD))
    assert table.bands[0] == Band(40_000, ("cpu", "torch"))
    assert [table.band(count).engines[0] for count in (1, 40_000, 40_001, 10**9)] == ["cpu", "cpu", "torch", "torch"]
    assert table.trust == "measured: our card, 2026-05-01"
    assert read_engine_table(written(tmp_path, table.as_dict())) == table
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_engine_table(str(marked)) == table
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_engine_table("~/measured.json") == table


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "not a JSON table"),
        ("[" * 100_000, "cannot be read|not a JSON table"),
        ("\x00", "not a JSON table"),
        ([], 'must be an object with "bands" and "source"'),
        ({"bands": GOOD["bands"]}, 'must be an object with "bands" and "source"'),
        (GOOD | {"source": " "}, "source must be a text of 1 to 300 characters"),
        (GOOD | {"source": "x" * 301}, "source must be a text"),
        (GOOD | {"bands": []}, "bands must be a list"),
        (GOOD | {"bands": {"1": ["cpu"]}}, "bands must be a list"),
        (GOOD | {"bands": [[None]]}, r"band 1 must be \[rows, engines\]"),
        (GOOD | {"bands": [[1, ["cpu"]], [True, ["cpu"]]]}, "band 2: rows must be a whole number"),
        (GOOD | {"bands": [[0, ["cpu"]], [None, ["cpu"]]]}, "band 1: rows must be a whole number of at least 1"),
        (GOOD | {"bands": [[1.5, ["cpu"]], [None, ["cpu"]]]}, "rows must be a whole number.*got 1.5"),
        (GOOD | {"bands": [[None, "cpu"]]}, "engines must be a list of names"),
        (GOOD | {"bands": [[None, [1]]]}, "engines must be a list of names"),
        (GOOD | {"bands": [[None, ["cuvs", "cpu"]]]}, "unknown engine 'cuvs'; known are cpu, torch, faiss"),
        (GOOD | {"bands": [[None, ["cpu", "cpu"]]]}, "named twice"),
        (GOOD | {"bands": [[10, ["cpu"]], [None, ["torch"]]]}, "band 2: cpu is missing"),
        (GOOD | {"bands": [[10, ["cpu"]]]}, "the last band must be open"),
        (GOOD | {"bands": [[None, ["cpu"]], [None, ["cpu"]]]}, "only the last band may be open"),
        (GOOD | {"bands": [[9, ["cpu"]], [9, ["cpu"]], [None, ["cpu"]]]}, "must ascend"),
    ],
)
def test_a_wrong_table_is_refused_with_setting_file_and_remedy(value: object, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, value)
    with pytest.raises(ConfigurationError, match=said) as caught:
        read_engine_table(path)
    assert str(caught.value).startswith(f"{SETTING}={path!r}: ")
    assert "/docs/how-to/gpu/#measure-your-card" in str(caught.value)
    assert "unset the setting" in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    long, binary = tmp_path / "long.json", tmp_path / "binary.json"
    long.write_text("[" + " " * 2_000_000 + "]")
    binary.write_bytes(b"\xff\xfe")
    cases = [
        (tmp_path / "missing", "No such file"),
        (tmp_path, "cannot be read"),
        (long, "not a JSON table"),
        (binary, "not a"),
    ]
    for path, said in cases:
        with pytest.raises(ConfigurationError, match=said):
            read_engine_table(str(path))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_engine_table("~nobody-of-that-name/table.json")


def test_a_store_with_a_wrong_table_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=SETTING):
        VectorStore(
            tmp_path / "memory",
            None,
            4,
            storage_config={"gpu_engine_table": written(tmp_path, {}), "background": False},
        )
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"]


def test_the_setting_reaches_the_store_and_is_shown(tmp_path: Path) -> None:
    for table, trust in ((table_at(tmp_path, 5), "measured: a test"), (None, TABLE.trust)):
        config = {"gpu_engine_table": table, "background": False} if table else {"background": False}
        with VectorStore(tmp_path / "memory", None, 4, storage_config=config) as store:
            assert store.statistics()["device"]["engine_table"] == trust
    assert StorageConfig(gpu_engine_table=Path("a.json")).gpu_engine_table == "a.json"
