"""``memevolve-store`` through its entry point: every command, every mistake, every exit code."""

from __future__ import annotations

import base64
import contextlib
import errno
import inspect
import json
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest
from forks import COMMAND, SOURCE, Forks
from rich.cells import cell_len
from support import as_child, each
from typer.testing import CliRunner, Result

from memevolve_gpu import HashingEmbedder, StorageConfig, VectorStore, cli
from memevolve_gpu.cli.app import MEANING, ExitCode
from memevolve_gpu.errors import MemEvolveError

SAMPLE = Path(__file__).resolve().parents[2] / "examples" / "memory_units.jsonl"
COMMANDS = [
    *("init", "add", "search", "get", "update", "delete", "list", "stats", "health", "check", "maintain"),
    *("snapshot", "backup", "restore", "export", "import"),
]

UNITS: list[dict[str, Any]] = [
    {"id": "wal", "type": "lesson", "content": "copy the write-ahead log too", "tags": ["sqlite", "backup"]},
    {
        "id": "bisect",
        "type": "skill",
        "content": "bisect finds the bad commit",
        "tags": ["git"],
        "metadata": {"score": 0.9},
    },
    {"type": "tool", "content": "worktree checks out a second branch", "tags": ["git"], "metadata": {"score": 0.4}},
]

SEPARATE: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
RUNNER = CliRunner(**SEPARATE)  # older runners put both streams into one unless told not to


def run(*arguments: str, text: str | None = None) -> Result:
    """Run one command line in this process."""
    result = RUNNER.invoke(cli.app, list(arguments), input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def ok(*arguments: str, text: str | None = None) -> Any:
    """Run a command that has to succeed, with --json; its document."""
    result = run(*arguments, "--json", text=text)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def bad(code: ExitCode, *arguments: str, text: str | None = None) -> str:
    """Run a command that has to fail with ``code``, for people and as JSON; its message."""
    told, shown = run(*arguments, text=text), run(*arguments, "--json", text=text)
    assert (told.exit_code, shown.exit_code) == (code, code), told.output + shown.output
    assert "Traceback" not in told.output + shown.output
    (line,) = [line for line in told.stderr.splitlines() if line.startswith("error: ")]
    document = json.loads(shown.stdout)
    assert document["type"]
    assert line == f"error: {' '.join(document['error'].split())}"
    return str(document["error"])


def write(path: Path, units: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(unit) + "\n" for unit in units), encoding="utf-8")
    return str(path)


def ids(store: str) -> list[str]:
    return [unit["id"] for unit in ok("list", "--store", store, "--limit", "1000")["units"]]


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A store with ``UNITS``, filled by the hashing embedder."""
    prefix = str(tmp_path / "memory")
    ok("add", write(tmp_path / "units.jsonl", UNITS), "--store", prefix, "--embedder", "hashing")
    return prefix


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the sample; for tests that only read."""
    prefix = str(tmp_path_factory.mktemp("sample") / "memory")
    ok("add", str(SAMPLE), "--store", prefix, "--embedder", "hashing")
    return prefix


# The program


def test_the_exit_codes_stand_in_table_and_help() -> None:
    text = run("--help").stdout
    assert set(MEANING) == set(ExitCode)
    for meaning in MEANING.values():
        assert " ".join(meaning.split()[:3]) in text


def test_help_of_every_command() -> None:
    for command in COMMANDS:
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout


def test_the_module_runs_and_lists_the_exit_codes() -> None:
    done = process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert command in done.stdout
    for code, meaning in MEANING.items():
        assert re.search(rf"(?m)^ *{code:d} +{re.escape(meaning[:40])}", done.stdout)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("memevolve-gpu")


@each(
    ("arguments", "said"),
    [
        (["serach", "x"], "serach"),
        (["search"], "TEXT"),
        (["get"], "ID"),
        (["--frob", "list"], "--frob"),
        (["list", "--frob"], "--frob"),
        (["list", "--limit", "many"], "--limit"),
        (["list", "--limit", "0"], "--limit"),
        (["search", "x", "--top-k", "0"], "--top-k"),
        (["search", "x", "--recall", "high"], "--recall"),
        (["search", "x", "--embedder", "oracle"], "oracle"),
        (["init", "--metric", "manhattan"], "manhattan"),
        (["init", "--index-type", "tree"], "tree"),
        (["add", "x.jsonl", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments: list[str], said: str) -> None:
    message = bad(ExitCode.USAGE, *arguments)
    assert said in message
    assert "--help" in message


@pytest.mark.parametrize(("arguments", "named"), [([], "search"), (["manage"], "prune")])
def test_without_a_command_the_help_is_shown(arguments: list[str], named: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (ExitCode.USAGE, "")
    assert result.stdout == run(*arguments, "--help").stdout
    assert named in result.stdout


def test_the_package_runs_as_the_command() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "memevolve_gpu", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("memevolve-gpu")


def test_the_environment_names_the_store(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORE", store)
    assert len(ok("list")["units"]) == 3
    assert "'other'" in bad(ExitCode.NOT_FOUND, "list", "--store", "other")
    monkeypatch.setenv("MEMEVOLVE_STORE", "nowhere")
    assert "'nowhere'" in bad(ExitCode.NOT_FOUND, "list")


def test_the_database_file_in_place_of_the_prefix(store: str) -> None:
    message = bad(ExitCode.NOT_FOUND, "list", "--store", f"{store}.db")
    assert f"use --store {store}," in message
    assert "init --store nowhere," in bad(ExitCode.NOT_FOUND, "list", "--store", "nowhere.db")


def test_the_home_folder_is_expanded(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(ok("list", "--store", "~/memory")["units"]) == 3
    ok("export", "~/out.jsonl", "--store", store)
    ok("import", "~/out.jsonl", "--store", "~/second", "--embedder", "hashing")
    ok("copy", "~/second", "~/third")
    ok("backup", "~/saved.db", "--store", store)
    ok("restore", "~/saved.db", "--store", "~/fourth")
    for name in ("second.db", "third.db", "saved.db", "fourth.db"):
        assert (tmp_path / name).is_file()
    ok("add", "-", "--store", store, text=json.dumps({"id": "home", "content": "in ~ there is a folder"}))
    assert ok("search", "~", "--store", store, "--keyword")["query"] == "~"


@each(
    "arguments",
    [
        ["search", "x"],
        ["get", "a"],
        ["update", "a", "--content", "x"],
        ["delete", "a"],
        ["list"],
        ["stats"],
        ["health"],
        ["check", "--fix"],
        ["maintain"],
        ["snapshot"],
        ["backup", "copy.db"],
        ["export", "out.jsonl"],
    ],
)
def test_commands_on_a_store_that_is_not_there(arguments: list[str], tmp_path: Path) -> None:
    message = bad(ExitCode.NOT_FOUND, *arguments, "--store", "nowhere")
    assert "'nowhere'" in message
    assert "init" in message
    assert list(tmp_path.iterdir()) == []


def database(prefix: str) -> Path:
    """The store's database file."""
    folder, name = Path(prefix).parent, Path(prefix).name
    (found,) = [path for path in folder.glob(f"{name}.*") if path.read_bytes()[:6] == b"SQLite"]
    return found


@pytest.mark.parametrize("command", [["list"], ["search", "x"], ["add", str(SAMPLE)], ["init"], ["check"]])
def test_a_file_that_is_no_store(store: str, command: list[str]) -> None:
    path = database(store)
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    path.write_text("dear diary, " * 1000, encoding="utf-8")
    before = path.read_bytes()
    assert str(path) in bad(ExitCode.STORAGE, *command, "--store", store, *embedder_for(command))
    assert path.read_bytes() == before


def embedder_for(command: list[str]) -> list[str]:
    return ["--embedder", "hashing"] if command[0] in ("add", "init", "search") else []


def test_an_empty_prefix() -> None:
    for command in (["list"], ["init"], ["add", str(SAMPLE)]):
        assert "--store" in bad(ExitCode.USAGE, *command, "--store", "")


def test_a_missing_folder_is_created_with_the_store(tmp_path: Path) -> None:
    ok("init", "--store", "demo/first/memory", "--embedder", "hashing")
    ok("add", str(SAMPLE), "--store", "demo/second/memory", "--embedder", "hashing")
    assert VectorStore.exists_at("demo/first/memory")
    assert VectorStore.exists_at("demo/second/memory")


def test_a_file_where_the_folder_of_the_store_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    place = str(tmp_path / "taken" / "memory")
    assert str(tmp_path / "taken") in bad(ExitCode.FAILED, "init", "--store", place, "--embedder", "hashing")


def test_milvus_without_pymilvus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    address = "milvus://127.0.0.1:1/units"
    for command in (["list"], ["init"]):
        assert "pymilvus" in bad(ExitCode.ENGINE, *command, "--store", address)


# init


def test_init_makes_an_empty_store(tmp_path: Path) -> None:
    made = ok("init", "--store", "memory", "--embedder", "hashing", "--metric", "cosine")
    assert made["count"] == 0
    assert made["dim"] == 384
    assert made["metric"] == "cosine"
    assert made["model"] == "hashing-lexical-384"
    assert ok("stats", "--store", "memory")["metric"] == "cosine"


def test_the_store_is_memory_in_this_folder_where_none_is_named() -> None:
    ok("init", "--embedder", "hashing")
    assert VectorStore.exists_at("memory")


def test_init_leaves_a_store_alone(store: str) -> None:
    assert "already" in bad(ExitCode.FAILED, "init", "--store", store, "--embedder", "hashing")
    assert ids(store)[:2] == ["wal", "bisect"]
    assert len(ids(store)) == 3


def test_init_says_how_to_keep_an_index_type() -> None:
    result = run("init", "--store", "memory", "--embedder", "hashing", "--index-type", "hnsw")
    assert "MEMEVOLVE_STORAGE_INDEX_TYPE=hnsw" in result.stdout


def test_another_metric_than_the_store_has(store: str, tmp_path: Path) -> None:
    file = write(tmp_path / "more.jsonl", [{"content": "more"}])
    assert "metric" in bad(ExitCode.USAGE, "add", file, "--store", store, "--metric", "ip")


# add


def test_add_the_sample() -> None:
    added = ok("add", str(SAMPLE), "--store", "memory", "--embedder", "hashing")
    assert added["added"] == added["count"] == len(added["ids"]) == 300
    assert added["replaced"] == 0
    again = ok("add", str(SAMPLE), "--store", "memory")
    assert again["replaced"] == 288
    assert again["count"] == 312


def test_add_for_people(tmp_path: Path) -> None:
    file = write(tmp_path / "units.jsonl", UNITS)
    result = run("add", file, "--store", "memory", "--embedder", "hashing")
    assert result.stdout == f"added 3 units from {file}; the store holds 3\n"
    assert result.stderr == ""


def test_add_from_stdin_with_a_byte_order_mark_and_empty_lines() -> None:
    text = "\ufeff" + json.dumps(UNITS[0]) + "\n\n   \n" + json.dumps(UNITS[1])
    assert ok("add", "-", "--store", "memory", "--embedder", "hashing", text=text)["ids"] == ["wal", "bisect"]


def test_add_nothing(tmp_path: Path) -> None:
    assert ok("add", write(tmp_path / "empty.jsonl", []), "--store", "memory", "--embedder", "hashing")["added"] == 0


BAD_LINES = [
    ('{"content": "half', "not JSON"),
    ('{"content": "x", "n": NaN}', "NaN"),
    ('["content"]', "dict"),
    ("7", "dict"),
    ('{"content": "x", "id": ""}', "id"),
    ('{"content": "x", "id": 7}', "id"),
    ('{"content": "x", "metadata": []}', "metadata"),
    ('{"content": "  "}', "content"),
    ('{"type": "skill"}', "content"),
    ('{"content": "x", "id": "u3"}', "line 4"),
    ('{"content": "\\ud800"}', "JSON"),
    ('{"unit": {}, "vector": []}', "import"),
    ('{"a":' * 100_000, "deep"),
]


@each(("line", "said"), BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_stored(line: str, said: str, tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"u{n}", "content": f"unit {n}"}) for n in range(10)]
    lines[6] = line
    file = tmp_path / "units.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    message = bad(ExitCode.USAGE, "add", str(file), "--store", "memory", "--embedder", "hashing")
    assert f"{file} line 7: " in message
    assert said in message
    assert f"nothing of {file} was stored" in message
    assert not VectorStore.exists_at("memory")


@pytest.mark.parametrize("command", ["add", "import"])
def test_files_that_cannot_be_read(command: str, tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"content": "a"}\n{"content": "caf\xe9"}\n')
    options = ["--store", "memory", "--embedder", "hashing"]
    assert f"{latin} line 2: not UTF-8" in bad(ExitCode.USAGE, command, str(latin), *options)
    assert "absent.jsonl: cannot be read: No such file" in bad(ExitCode.USAGE, command, "absent.jsonl", *options)
    assert "directory" in bad(ExitCode.USAGE, command, str(tmp_path), *options)
    assert not VectorStore.exists_at("memory")


def test_batches_before_a_bad_line_stay(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"u{n}", "content": f"unit {n}"}) for n in range(1, 12)]
    lines[8] = "{"
    file = tmp_path / "units.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    result = run("add", str(file), "--store", "memory", "--embedder", "hashing", "--batch-size", "3")
    assert result.exit_code == ExitCode.USAGE
    assert f"{file} line 9: " in result.stderr
    assert f"6 units of {file} (lines 1 to 6) are in the store" in result.stderr
    assert ids("memory") == [f"u{n}" for n in range(1, 7)]


def test_batches(tmp_path: Path) -> None:
    file = write(tmp_path / "units.jsonl", UNITS)
    added = ok("add", file, "--store", "memory", "--embedder", "hashing", "--batch-size", "2")
    assert added["added"] == added["count"] == 3


def test_a_full_store_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS", "4")
    file = write(tmp_path / "units.jsonl", [{"content": f"unit {n}"} for n in range(5)])
    options = ["--store", "memory", "--embedder", "hashing"]
    message = bad(ExitCode.CAPACITY, "add", file, *options)
    assert "MAX_MEMORY_UNITS" in message
    assert f"nothing of {file} was stored" in message
    assert ids("memory") == []
    message = run("add", file, *options, "--batch-size", "2").stderr
    assert f"4 units of {file} (lines 1 to 4) are in the store" in message
    assert len(ids("memory")) == 4


def test_a_bad_setting_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_TARGET_RECALL", "95")
    message = bad(ExitCode.USAGE, "init", "--store", "memory", "--embedder", "hashing")
    assert "MEMEVOLVE_STORAGE_TARGET_RECALL" in message


# search


def test_search_finds_what_is_meant(sample: str) -> None:
    found = ok("search", "database is locked with two writers", "--store", sample, "--top-k", "3")
    assert found["hits"][0]["id"] == "sqlite-busy"
    assert len(found["hits"]) == 3
    distances = [hit["distance"] for hit in found["hits"]]
    assert distances == sorted(distances)
    assert found["hits"][0]["unit"]["type"] == "lesson"


def test_search_for_people(sample: str) -> None:
    result = run("search", "database is locked with two writers", "--store", sample)
    lines = result.stdout.splitlines()
    assert "sqlite-busy" in lines[1]
    assert "lesson" in lines[1]
    assert "two writers in spite of" in lines[1]
    assert len(lines) == 6
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout, "a pipe gets everything"
    assert {line.count("\t") for line in lines} == {4}


def test_search_in_an_empty_store() -> None:
    ok("init", "--store", "memory", "--embedder", "hashing")
    assert ok("search", "anything", "--store", "memory")["hits"] == []
    assert run("search", "anything", "--store", "memory").stdout == "nothing found\n"


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        (["-f", "type=skill"], lambda unit: unit["type"] == "skill"),
        (["-f", "tags=git", "-f", "tags=shell"], lambda unit: {"git", "shell"} & {*unit["tags"]}),
        (["-f", 'tags=["git", "shell"]'], lambda unit: {"git", "shell"} & {*unit["tags"]}),
        (["-f", "type!=lesson", "-f", "tags=git"], lambda unit: unit["type"] != "lesson" and "git" in unit["tags"]),
        (
            ["-f", "metadata.score>=0.8", "-f", "metadata.score<0.85"],
            lambda unit: 0.8 <= unit["metadata"]["score"] < 0.85,
        ),
        (["-f", 'id="git-worktree"'], lambda unit: unit["id"] == "git-worktree"),
        (["--filters", '{"query": {"exists": true}}'], lambda unit: "query" in unit),
        (["--filters", '{"tags": "git"}', "-f", "type=tool"], lambda unit: unit["type"] == "tool"),
    ],
)
def test_filters(options: list[str], holds: Any, sample: str, tmp_path: Path) -> None:
    every = [unit for unit in ok("list", "--store", sample, "--limit", "1000")["units"] if holds(unit)]
    if "--filters" in options and "-f" in options:
        every = [unit for unit in every if "git" in unit["tags"]]
    wanted = {unit["id"] for unit in every}
    assert wanted
    hits = ok("search", "anything", "--store", sample, "--top-k", "300", *options)["hits"]
    assert {hit["id"] for hit in hits} == wanted
    assert {unit["id"] for unit in ok("list", "--store", sample, "-n", "300", *options)["units"]} == wanted
    for more in ([], ["--vectors"]):
        assert ok("export", "out.jsonl", "--force", "--store", sample, *options, *more)["exported"] == len(wanted)


@each(
    ("options", "said"),
    [
        (["--filter", "skill"], "KEY=VALUE"),
        (["--filter", "=skill"], "KEY=VALUE"),
        (["--filter", "a..b=1"], "a..b"),
        (["--filter", "a=1", "--filter", "a>2"], "a>2"),
        (["--filter", "a>2", "--filter", "a=1"], "a=1"),
        (["--filter", "a>2", "--filter", "a>3"], "a>3"),
        (["--filter", "a>true"], "a"),
        (["--filters", "{"], "not JSON"),
        (["--filters", "[1]"], "object"),
        (["--filters", '{"a": {"near": 1}}'], "near"),
    ],
)
def test_bad_filters(options: list[str], said: str, sample: str, tmp_path: Path) -> None:
    assert said in bad(ExitCode.USAGE, "search", "x", "--store", sample, *options)
    assert said in bad(ExitCode.USAGE, "list", "--store", sample, *options)
    assert said in bad(ExitCode.USAGE, "export", "out.jsonl", "--vectors", "--store", sample, *options)
    assert list(tmp_path.iterdir()) == []


@each("recall", ["0", "1.5", "-1", "nan"])
def test_bad_recall(recall: str, sample: str) -> None:
    assert "recall" in bad(ExitCode.USAGE, "search", "x", "--store", sample, "--recall", recall)


def test_recall(sample: str) -> None:
    exact = ok("search", "slow query", "--store", sample, "--recall", "1")
    assert exact["hits"] == ok("search", "slow query", "--store", sample)["hits"]


# Which model


def test_a_store_goes_on_with_the_hashing_embedder_that_filled_it() -> None:
    with VectorStore("memory", HashingEmbedder(96)) as made:
        made.store({"id": "a", "content": "alpha beta"})
    assert ok("search", "alpha", "--store", "memory")["hits"][0]["id"] == "a"
    assert ok("add", "-", "--store", "memory", text='{"content": "gamma"}')["count"] == 2


def test_another_model_than_the_store_was_filled_by(monkeypatch: pytest.MonkeyPatch) -> None:
    class Named:
        model_name = "some-model"

        def __call__(self, text: str) -> Any:
            return HashingEmbedder(384)(text)

    with VectorStore("memory", Named()) as made:
        made.store({"id": "a", "content": "alpha beta"})
    message = bad(ExitCode.ENGINE, "search", "alpha", "--store", "memory", "--embedder", "hashing")
    assert "some-model" in message
    assert ids("memory") == ["a"]


def test_reading_needs_no_embedder(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_PROVIDER", "openai")
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_BASE_URL", "http://127.0.0.1:9")
    for command in (
        ["get", "wal"],
        ["list"],
        ["stats"],
        ["health"],
        ["check"],
        ["maintain"],
        ["snapshot"],
        ["backup", str(tmp_path / "copy.db")],
        ["export", str(tmp_path / "out.jsonl"), "--vectors"],
        ["delete", "wal"],
    ):
        ok(*command, "--store", store)


# get, list, update, delete


def test_get(store: str) -> None:
    found = ok("get", "bisect", "wal", "bisect", "--store", store)
    assert [unit["id"] for unit in found["units"]] == ["bisect", "wal"]
    assert found["units"][0]["content"] == UNITS[1]["content"]
    assert found["missing"] == []
    assert json.loads(run("get", "wal", "--store", store).stdout)["tags"] == ["sqlite", "backup"]


def test_get_what_is_not_there(store: str) -> None:
    assert "'nobody'" in bad(ExitCode.NOT_FOUND, "get", "wal", "nobody", "--store", store)
    result = run("get", "wal", "nobody", "--store", store, "--json")
    document = json.loads(result.stdout)
    assert [unit["id"] for unit in document["units"]] == ["wal"]
    assert document["missing"] == ["nobody"]


def test_list_by_pages(sample: str) -> None:
    first = ok("list", "--store", sample, "--limit", "7")
    second = ok("list", "--store", sample, "--limit", "7", "--offset", "7")
    both = ok("list", "--store", sample, "--limit", "14")
    assert first["units"] + second["units"] == both["units"]
    assert first["more"]
    assert not ok("list", "--store", sample, "--offset", "290", "--limit", "10")["more"]
    assert ok("list", "--store", sample, "--offset", "300")["units"] == []
    text = run("list", "--store", sample, "--limit", "7", "--offset", "7").stdout
    assert text.splitlines()[-1] == "8 to 14 of 300; continue with --offset 14"


def test_update_by_content_unit_file_and_stdin(store: str, tmp_path: Path) -> None:
    changed = ok("update", "wal", "--content", "use the backup interface", "--store", store)["unit"]
    assert changed["content"] == "use the backup interface"
    assert changed["tags"] == ["sqlite", "backup"]
    assert changed["metadata"]["updated_at"]
    assert ok("search", "backup interface", "--store", store)["hits"][0]["id"] == "wal"
    assert ok("update", "wal", "--unit", '{"content": "b"}', "--store", store)["unit"].keys() == {
        "id",
        "content",
        "metadata",
    }
    file = tmp_path / "unit.json"
    file.write_text(json.dumps({"id": "wal", "content": "c"}, indent=2), encoding="utf-8")
    assert ok("update", "wal", str(file), "--store", store)["unit"]["content"] == "c"
    assert ok("update", "wal", "-", "--store", store, text='{"content": "d"}')["unit"]["content"] == "d"
    assert ok("get", "wal", "--store", store)["units"][0]["content"] == "d"


@each(
    ("arguments", "code", "said"),
    [
        (["wal"], ExitCode.USAGE, "exactly one"),
        (["wal", "--content", "x", "--unit", "{}"], ExitCode.USAGE, "exactly one"),
        (["wal", "--unit", "{"], ExitCode.USAGE, "--unit: not JSON"),
        (["wal", "--unit", "[]"], ExitCode.USAGE, "object"),
        (["wal", "--unit", '{"id": "bisect", "content": "x"}'], ExitCode.USAGE, "bisect"),
        (["wal", "absent.json"], ExitCode.USAGE, "absent.json"),
        (["nobody", "--content", "x"], ExitCode.NOT_FOUND, "nobody"),
        (["nobody", "--unit", '{"content": "x"}'], ExitCode.NOT_FOUND, "nobody"),
    ],
)
def test_bad_updates(arguments: list[str], code: ExitCode, said: str, store: str) -> None:
    before = ok("list", "--store", store)
    assert said in bad(code, "update", *arguments, "--store", store)
    assert ok("list", "--store", store) == before


def test_delete(store: str) -> None:
    assert ok("delete", "wal", "bisect", "wal", "--store", store) == {"deleted": 2, "missing": []}
    (left,) = ids(store)
    assert left.startswith("unit_")
    result = run("delete", left, "nobody", "--store", store, "--json")
    assert result.exit_code == ExitCode.NOT_FOUND
    assert json.loads(result.stdout)["deleted"] == 1
    assert ids(store) == []
    assert "'nobody'" in bad(ExitCode.NOT_FOUND, "delete", "nobody", "--store", store)


def test_a_unit_cannot_steer_the_terminal() -> None:
    text = json.dumps({"id": "a\u202eb", "content": "\x1b[2Jgone \x9b and\r\nmore"})
    ok("add", "-", "--store", "memory", "--embedder", "hashing", text=text)
    for command in (["list"], ["get", "a\u202eb"], ["search", "gone"]):
        shown = run(*command, "--store", "memory").stdout
        assert "gone" in shown
        assert not {"\x1b", "\x9b", "\r", "\u202e"} & set(shown)


# stats, health, check, maintain, snapshot, backup, restore


def test_stats(sample: str) -> None:
    figures = ok("stats", "--store", sample)
    assert figures["count"] == 300
    assert figures["plan"]["reason"]
    text = run("stats", "--store", sample).stdout
    assert "units\t300" in text
    assert len(text.splitlines()) <= 11
    assert "device" not in text, "there is no GPU, and none was requested"
    assert figures["plan"]["reason"] in text
    assert "plan.kind\texact" in run("stats", "--store", sample, "--all").stdout


def test_health(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ok("health", "--store", sample)["current_count"] == 300
    assert "Nothing needs to be done." in run("health", "--store", sample).stdout
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS", "310")
    advice = ok("health", "--store", sample)["recommendations"]
    assert advice
    assert f"- {advice[0]}" in run("health", "--store", sample).stdout
    assert "training.min_training_units" in run("health", "--store", sample, "--all").stdout


def test_health_of_a_full_store(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS", "300")
    told = run("health", "--store", sample)
    assert told.exit_code == run("health", "--store", sample, "--json").exit_code == ExitCode.CAPACITY
    assert "100 % 300 of 300" in told.stdout
    assert len(told.stdout.splitlines()) <= 10


def test_check_finds_nothing_in_a_sound_store(store: str) -> None:
    assert ok("check", "--store", store) == {"ok": True, "findings": []}
    assert run("check", "--store", store).stdout == "no problems found\n"


def test_check_names_an_old_file_that_it_cannot_take_over(store: str) -> None:
    Path(f"{store}.data").write_bytes(b"\x80\x04garbage")
    result = run("check", "--store", store, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == ExitCode.FAILED
    assert not document["ok"]
    assert ".data" in document["findings"][0]["message"]
    assert run("check", "--store", store).exit_code == ExitCode.FAILED


def test_maintain_builds_what_is_due(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    units = [{"id": f"u{n}", "content": f"unit {n}"} for n in range(1200)]
    with VectorStore("memory", HashingEmbedder(64), storage_config=StorageConfig(background=False)) as made:
        made.store_batch(units, rng.standard_normal((1200, 64)).astype(np.float32))
    done = ok("maintain", "--store", "memory", "--index-type", "hnsw")
    assert done["actions"]
    assert "nothing was due" in run("maintain", "--store", "memory", "--index-type", "hnsw").stdout
    assert ok("stats", "--store", "memory")["index"]["kind"] == "hnsw"


def test_adding_much_builds_the_index(tmp_path: Path) -> None:
    file = write(tmp_path / "units.jsonl", [{"content": f"unit {n} {n * 7919 % 1009}"} for n in range(1100)])
    ok("add", file, "--store", "memory", "--embedder", "hashing", "--index-type", "hnsw")
    figures = ok("stats", "--store", "memory")
    assert (figures["index"]["kind"], figures["index"]["rows"]) == ("hnsw", 1100)


def test_snapshot(store: str) -> None:
    path = ok("snapshot", "--store", store)["snapshot"]
    assert Path(path).stat().st_size > 0
    assert path in run("snapshot", "--store", store).stdout


def test_backup_is_a_store(store: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / database(store).name
    copy.parent.mkdir()
    assert ok("backup", str(copy), "--store", store)["backup"] == str(copy)
    assert ids(str(copy.parent / "memory")) == ids(store)


def test_backup_into_a_missing_folder(store: str) -> None:
    assert "no/such" in bad(ExitCode.USAGE, "backup", "no/such/copy.db", "--store", store)


def test_backup_onto_an_existing_file(store: str) -> None:
    Path("copy.db").write_text("mine", encoding="utf-8")
    for name in ("copy.db", "copy"):
        assert "copy.db exists" in bad(ExitCode.USAGE, "backup", name, "--store", store)
    assert Path("copy.db").read_text(encoding="utf-8") == "mine"


def test_backup_names_the_file_that_it_wrote(store: str) -> None:
    assert ok("backup", "units.jsonl", "--store", store)["backup"] == "units.jsonl.db"
    assert Path("units.jsonl.db").is_file()
    assert run("backup", "other", "--store", store).stdout == "copied the records to other.db\n"


def kill_a_writer(prefix: str) -> None:
    """A process of its own stores 30 units and is killed; its log stays behind."""
    dim = ok("stats", "--store", prefix)["dim"]

    def act() -> None:
        store = VectorStore(prefix, HashingEmbedder(dim), storage_config=StorageConfig(background=False))
        for number in range(30):
            store.store({"id": f"later{number}", "content": f"written later {number}"})
        os.kill(os.getpid(), signal.SIGKILL)

    assert as_child(act) == -signal.SIGKILL
    assert database(prefix).with_name(f"{database(prefix).name}-wal").stat().st_size > 30 * 4096


def test_a_restore_by_cp_beside_the_log_of_a_killed_writer_is_noticed_and_restore_helps(store: str) -> None:
    before = ids(store)
    ok("backup", "copy.db", "--store", store)
    kill_a_writer(store)
    shutil.copyfile("copy.db", database(store))
    refused = run("health", "--store", store)
    assert refused.exit_code == ExitCode.STORAGE
    assert "does not belong" in refused.stderr
    kill_a_writer(store)
    shown = ok("restore", "copy.db", "--store", store)
    assert shown["count"] == len(before)
    assert ids(store) == before
    assert len(ids(shown["replaced"].removesuffix(".db"))) == len(before) + 30
    assert ok("check", "--store", store)["ok"]
    assert ok("health", "--store", store)["damage"] is None
    text = run("restore", "copy.db", "--store", store).stdout
    assert "the old store is kept as " in text


def test_restore_of_what_is_no_backup(store: str) -> None:
    assert "no backup" in bad(ExitCode.USAGE, "restore", "nowhere.db", "--store", store)
    Path("garbage.db").write_bytes(b"garbage" * 1000)
    assert "garbage.db" in bad(ExitCode.STORAGE, "restore", "garbage.db", "--store", store)
    with VectorStore(store, None, storage_config=StorageConfig(background=False)) as opened:
        opened.backup("copy.db")
        assert "is open" in bad(ExitCode.STORAGE, "restore", "copy.db", "--store", store)
    assert "Milvus" in bad(ExitCode.USAGE, "restore", "copy.db", "--store", "milvus://localhost:1/x")


def test_damage_that_was_met_stays_in_health_until_a_check_is_clean(store: str) -> None:
    file = database(store)
    with apsw.Connection(str(file)) as con:
        con.execute("UPDATE units SET unit = CAST(x'7b2261ff' AS TEXT) WHERE id = 'wal'")
    con.close()
    bad(ExitCode.STORAGE, "get", "wal", "--store", store)
    shown = run("health", "--store", store, "--json")
    assert shown.exit_code == ExitCode.FAILED
    document = json.loads(shown.stdout)
    assert "'wal'" in document["damage"]
    assert "check --fix" in document["recommendations"][0]
    assert run("health", "--store", store).exit_code == ExitCode.FAILED
    assert run("check", "--store", store).exit_code == ExitCode.FAILED
    assert run("health", "--store", store).exit_code == ExitCode.FAILED
    ok("delete", "wal", "--store", store)
    ok("check", "--fix", "--store", store)
    assert ok("health", "--store", store)["damage"] is None


# export and import


@pytest.mark.parametrize("vectors", [True, False])
def test_a_round_trip_keeps_everything(store: str, vectors: bool) -> None:
    ok("update", "wal", "--content", "déjà vu 💡", "--store", store)
    ok("export", "out.jsonl", "--store", store, *(["--vectors"] if vectors else []))
    options = [] if vectors else ["--embedder", "hashing"]
    taken = ok("import", "out.jsonl", "--store", "copy", *options)
    assert taken["imported"] == taken["count"] == 3
    assert ok("list", "--store", "copy") == ok("list", "--store", store)
    rows = {prefix: exported_rows(prefix) for prefix in (store, "copy")}
    assert rows[store] == rows["copy"]
    assert ok("search", "vu", "--store", "copy")["hits"] == ok("search", "vu", "--store", store)["hits"]


def exported_rows(prefix: str) -> list[tuple[str, bytes]]:
    with VectorStore(prefix, None) as opened:
        return [(unit["id"], vector.tobytes()) for unit, vector in opened.export_rows()]


def test_vectors_are_taken_over_without_their_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vector = np.arange(5, dtype=np.float32)
    lines: list[dict[str, Any]] = [
        {"unit": {"id": "a", "content": "x"}, "vector": base64.b64encode(vector.tobytes()).decode(), "model": "far"},
        {"unit": {"id": "b", "content": "y"}, "vector": [4, 3, 2, 1, 0.5], "model": "far"},
    ]
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_PROVIDER", "openai")
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_BASE_URL", "http://127.0.0.1:9")
    ok("import", write(tmp_path / "in.jsonl", lines), "--store", "memory")
    assert dict(exported_rows("memory"))["a"] == vector.tobytes()
    other = write(tmp_path / "other.jsonl", [{**lines[0], "model": "near"}])
    assert "far" in bad(ExitCode.ENGINE, "import", other, "--store", "memory")
    longer = write(tmp_path / "longer.jsonl", [{**lines[0], "vector": [1.0] * 6}])
    assert "expected 5, got 6" in bad(ExitCode.ENGINE, "import", longer, "--store", "memory")
    ok("export", "out.jsonl", "--vectors", "--store", "memory")
    assert json.loads(Path("out.jsonl").read_text(encoding="utf-8").splitlines()[0])["model"] == "far"


@each(
    ("second", "said"),
    [
        ({"unit": {"content": "x"}, "vector": "!!!", "model": "m"}, "vector"),
        ({"unit": {"content": "x"}, "vector": "AAA=", "model": "m"}, "vector"),
        ({"unit": {"content": "x"}, "vector": [[1, 2]], "model": "m"}, "vector"),
        ({"unit": {"content": "x"}, "vector": ["a", "b"], "model": "m"}, "vector"),
        ({"unit": {"content": "x"}, "vector": [1e60, 0], "model": "m"}, "vector"),
        ({"unit": {"content": "x"}, "vector": [1, 2, 3], "model": "m"}, "3 numbers"),
        ({"unit": {"content": "x"}, "vector": [1, 2], "model": "n"}, "'n'"),
        ({"unit": {"content": "x"}, "vector": [1, 2], "model": 5}, "model"),
        ({"unit": 5, "vector": [1, 2], "model": "m"}, "dict"),
        ({"vector": [1, 2]}, "dict"),
        ({"content": "no vector"}, "--vectors"),
        ({"unit": {"id": "a"}, "vector": [1, 2], "model": "m"}, "line 1"),
    ],
)
def test_bad_lines_of_an_export(second: object, said: str, tmp_path: Path) -> None:
    first = {"unit": {"id": "a", "content": "x"}, "vector": [1, 2], "model": "m"}
    file = write(tmp_path / "in.jsonl", [first, second])
    message = bad(ExitCode.USAGE, "import", file, "--store", "memory", "--embedder", "hashing")
    assert f"{file} line 2: " in message
    assert said in message
    assert not VectorStore.exists_at("memory")


def test_import_an_old_store(tmp_path: Path) -> None:
    old = {"a": {"id": "a", "content": "alpha"}, "b": {"id": "b", "content": "beta", "bad": float("nan")}}
    old["c"] = {"id": "c", "text": "gamma"}
    Path("old.data").write_bytes(pickle.dumps({"data": old}))
    taken = ok("import", "old.data", "--store", "memory", "--embedder", "hashing")
    assert taken["ids"] == ["a"]
    assert "'b'" in taken["problems"][0]
    assert re.search("'c'.*use 'content'", taken["problems"][1])
    assert ok("search", "alpha", "--store", "memory")["hits"][0]["id"] == "a"
    Path("old.pkl").write_bytes(Path("old.data").read_bytes())
    assert ".data" in bad(ExitCode.USAGE, "import", "old.pkl", "--store", "memory")
    assert "gone.data" in bad(ExitCode.USAGE, "import", "gone.data", "--store", "memory")


def test_a_hostile_old_store_is_refused() -> None:
    Path("evil.data").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    message = bad(ExitCode.FAILED, "import", "evil.data", "--store", "memory", "--embedder", "hashing")
    assert "evil.data" in message
    assert sorted(path.name for path in Path().iterdir()) == ["evil.data"]


def test_export_to_stdout(store: str) -> None:
    result = run("export", "-", "--store", store)
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ids(store)
    assert "exported 3 units" in result.stderr


def test_export_replaces_a_file_only_when_it_is_complete(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, folder = tmp_path / "out.jsonl", tmp_path / "closed"
    target.write_text("old\n", encoding="utf-8")
    link = tmp_path / "link.jsonl"
    link.symlink_to(target)
    assert "--force" in bad(ExitCode.USAGE, "export", str(link), "--store", store)
    assert target.read_text(encoding="utf-8") == "old\n"
    ok("export", str(link), "--store", store, "--force")
    assert link.is_symlink()
    whole = target.read_bytes()
    assert whole.count(b"\n") == 3

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        result = run("export", str(target), "--store", store, "--force")
    assert result.exit_code == ExitCode.CAPACITY
    assert f"error: {target}: No space left on device" in result.stderr
    assert target.read_bytes() == whole
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert "create it first" in bad(ExitCode.USAGE, "export", str(folder / "out.jsonl"), "--store", store)
    assert "regular file" in bad(ExitCode.USAGE, "export", str(tmp_path), "--store", store)


@pytest.mark.parametrize("width", [30, 60, 160])
def test_a_table_on_a_terminal_keeps_ids_and_numbers(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memevolve_gpu.cli.output._is_terminal", lambda stream: stream is sys.stdout)
    monkeypatch.setenv("COLUMNS", str(width))
    prefix, wide = str(tmp_path / "memory"), "a-rather-long-id-that-somebody-gave"
    units = [{"id": wide, "content": "\N{CJK UNIFIED IDEOGRAPH-8A9E}" * 200}, {"id": "short", "content": "a word"}]
    ok("add", write(tmp_path / "units.jsonl", units), "--store", prefix, "--embedder", "hashing")
    lines = run("list", "--store", prefix).stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["id", wide, "short"]
    assert [line for line in lines if line != line.rstrip()] == []
    assert lines[1].endswith("\N{CJK UNIFIED IDEOGRAPH-8A9E}\N{HORIZONTAL ELLIPSIS}")
    assert "a word" in lines[2]
    if width > len(wide) + 30:
        assert max(map(cell_len, lines)) <= width
    for hit in ok("search", "word", "--store", prefix)["hits"]:
        assert f"{hit['distance']:.4f}" in run("search", "word", "--store", prefix).stdout


def test_the_usage_line_has_one_pair_of_brackets() -> None:
    for command in (["update"], ["manage", "deduplicate"]):
        usage = next(line for line in run(*command, "--help").stdout.splitlines() if "Usage:" in line)
        assert "[[" not in usage


# As a process: signals, pipes, encodings


def process(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "160", **more.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "memevolve_gpu.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
        **more,
    )


def test_a_process_keeps_its_streams_apart(store: str, commands: Forks) -> None:
    done = commands(COMMAND, "search", "bad commit", "--store", store, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["hits"][0]["id"] == "bisect"
    failed = commands(COMMAND, "get", "nobody", "--store", store)
    assert (failed.returncode, failed.stdout) == (3, "")
    assert failed.stderr == "error: no unit with the id 'nobody'\n"


def test_a_terminal_that_knows_only_ascii(store: str) -> None:
    ok("update", "wal", "--content", "déjà vu", "--store", store)
    done = process("list", "--store", store, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "d\\xe9j\\xe0 vu" in done.stdout


UNREAD = [
    *("export -", "list -n 300", "list --json", "get sqlite-busy", "stats", "health", "search a", "check", "maintain"),
    *("snapshot", "devices", "doctor", "embed a", "update sqlite-busy --content a", "delete sqlite-busy", "backup b"),
    *("add units.jsonl", "import units.jsonl", "export o.jsonl", "copy memory n", "restore b.db -s n"),
    *("init -s n -e hashing", "manage prune --max-count 9", "manage forget --count 1", "manage deduplicate"),
    *("manage consolidate", "--help", "add --help", "manage --help", "--version", "manage", ""),
    *("get absent --json", "add absent.jsonl --json", "list --unknown --json", "unknown --json", "search --json"),
]


@pytest.mark.slow
def test_a_broken_pipe_is_quiet(sample: str, tmp_path: Path, commands: Forks) -> None:
    for number, arguments in enumerate(UNREAD):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(f"{sample}.db", folder / "memory.db")
        shutil.copy(f"{sample}.db", folder / "b.db") if "restore" in arguments else None
        write(folder / "units.jsonl", UNITS)
        done = commands(COMMAND, *arguments.split(), folder=folder, unread=True)
        assert (done.returncode, done.stderr) == (ExitCode.BROKEN_PIPE, ""), arguments


def test_the_help_needs_no_engine() -> None:
    lines = [["--help"], ["add", "--help"], ["search", "--help"], ["manage", "--help"], ["--version"]]
    code = """
import contextlib, io, json, os, sys
from memevolve_gpu import cli
for line in json.loads(sys.argv[1]):
    if not os.fork():
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            cli.app(line)
        print(sorted({"apsw", "faiss", "numpy", "pydantic_settings", "torch"} & set(sys.modules)))
        sys.exit()
    os.wait()
"""
    # of newer versions typer itself uses pydantic where a command is named
    command = [sys.executable, "-c", code, json.dumps(lines)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert done.stdout.splitlines() == ["[]"] * len(lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@each("arguments", [["list"], ["get", "absent"], ["list", "--unknown"]])
def test_a_full_disk_behind_stdout(store: str, arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "memevolve_gpu.cli", *arguments, "--store", store, "--json"]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=120, check=False)
    assert done.returncode == ExitCode.CAPACITY
    assert done.stderr == b"error: stdout: No space left on device\n"


def test_out_of_descriptors_is_a_limit(store: str) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6)); from memevolve_gpu import cli; cli.main()"
    )
    command = [sys.executable, "-c", code, "stats", "--store", store]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == ExitCode.CAPACITY, done.stderr
    assert "too many files open" in done.stderr


def test_mcp_without_its_package_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    result = run("mcp", "--store", "memory")
    assert result.exit_code == ExitCode.ENGINE
    assert "memevolve-gpu[mcp]" in result.stderr
    assert not list(tmp_path.iterdir())


SLOW_ADD = """
import sys, time
from memevolve_gpu import HashingEmbedder, cli
plain = HashingEmbedder.embed_batch
def slow(self, texts):
    print("embedding", file=sys.stderr, flush=True)
    time.sleep(0.2)
    return plain(self, texts)
HashingEmbedder.embed_batch = slow
cli.main()
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_the_middle_of_add_leaves_all_or_nothing(presses: int, tmp_path: Path) -> None:
    file = write(tmp_path / "units.jsonl", [{"content": f"unit {n}"} for n in range(5000)])
    command = [sys.executable, "-c", SLOW_ADD, "add", file, "--store", "memory", "--embedder", "hashing"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for _ in range(3):
            assert child.stderr.readline() == "embedding\n"
        for _ in range(presses):
            child.send_signal(signal.SIGINT)
            time.sleep(0.02)
        said = child.stderr.read()
        assert child.stdout.read() == ""
    assert child.returncode == ExitCode.INTERRUPTED
    assert f"error: interrupted; nothing of {file} was stored" in said
    assert "Traceback" not in said
    assert not VectorStore.exists_at("memory")
    assert not list(tmp_path.glob("memory*"))


def test_ctrl_c_between_batches_says_what_is_in(tmp_path: Path) -> None:
    file = write(tmp_path / "units.jsonl", [{"content": f"unit {n}"} for n in range(2000)])
    command = [sys.executable, "-c", SLOW_ADD, "add", file, "--store", "memory", "--embedder", "hashing"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command += ["--batch-size", "100", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for _ in range(3):
            assert child.stderr.readline() == "embedding\n"
        child.send_signal(signal.SIGINT)
        document = json.loads(child.stdout.read())
    assert child.returncode == ExitCode.INTERRUPTED
    assert document["type"] == "Interrupted"
    count = len(ids("memory"))
    assert 0 < count < 2000
    assert f"{count} units of {file} (lines 1 to {count}) are in the store" in document["error"]


WAITING_ADD = """
import sys, time
from memevolve_gpu import cli
class Waiting:
    buffer = property(lambda self: self)
    def readline(self, _most):
        print("reading", file=sys.stderr, flush=True)
        time.sleep(60)
sys.stdin = Waiting()
cli.main()
"""


def test_ctrl_c_while_reading_is_one_line() -> None:
    command = [sys.executable, "-c", WAITING_ADD, "add", "-", "--store", "memory", "--embedder", "hashing"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "reading\n"
        child.send_signal(signal.SIGINT)
        assert child.stderr.read() == "error: interrupted; nothing of stdin was stored\n"
    assert child.returncode == ExitCode.INTERRUPTED
    assert not VectorStore.exists_at("memory")


def test_progress_is_drawn_on_a_terminal_only(store: str) -> None:
    script = shutil.which("script")
    if script is None:
        pytest.skip("no program to make a pseudo terminal with")
    command = f"{sys.executable} -m memevolve_gpu.cli export out.jsonl --store {store} > said.txt"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "xterm"}
    done = subprocess.run(
        [script, "-qec", command, "/dev/null"], capture_output=True, timeout=120, check=True, env=environment
    )
    assert b"exporting" in done.stdout
    assert Path("said.txt").read_text(encoding="utf-8") == "exported 3 units to out.jsonl\n"


@pytest.mark.parametrize(
    ("answer", "code", "replaced"),
    [(b"y\n", ExitCode.OK, True), (b"n\n", ExitCode.USAGE, False), (b"\x03", ExitCode.INTERRUPTED, False)],
)
def test_export_asks_on_a_terminal_before_it_replaces(
    answer: bytes, code: ExitCode, replaced: bool, store: str, tmp_path: Path
) -> None:
    target, said = tmp_path / "out.jsonl", b""
    target.write_text("old\n", encoding="utf-8")
    command = [sys.executable, "-m", "memevolve_gpu.cli", "export", str(target), "--store", store]
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": str(SOURCE)})
    with contextlib.suppress(OSError):  # Linux ends a terminal that nobody has open any more with an error
        while part := os.read(terminal, 4096):
            said += part
            if b"Replace it? [y/N]" in said and answer:
                os.write(terminal, answer)
                answer = b""
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code, said
    assert b"Traceback" not in said
    assert (target.read_text(encoding="utf-8") != "old\n") is replaced


def test_every_error_of_the_package_has_a_code() -> None:
    from memevolve_gpu import errors
    from memevolve_gpu.cli.app import exit_code_of

    kinds = [getattr(errors, name) for name in errors.__all__]
    codes = {kind.__name__: exit_code_of(kind.__new__(kind)) for kind in kinds if issubclass(kind, MemEvolveError)}
    assert codes["InvalidUnitError"] == codes["ConfigurationError"] == ExitCode.USAGE
    assert codes["CapacityError"] == codes["StorageFullError"] == ExitCode.CAPACITY
    assert codes["CorruptStoreError"] == codes["ReadOnlyError"] == ExitCode.STORAGE
    assert codes["ModelMismatchError"] == codes["EngineError"] == codes["DimensionMismatchError"] == ExitCode.ENGINE
    assert codes["LegacyImportError"] == ExitCode.FAILED


@pytest.mark.parametrize("depth", [1_500, 100_000])
def test_a_line_that_is_nested_too_deep_is_named(depth: int) -> None:
    nested = '{"content": "text", "deep": ' + "[" * depth + "]" * depth + "}"
    Path("deep.jsonl").write_text('{"content": "one"}\n' + nested + "\n", encoding="utf-8")
    for command in ("add", "import"):
        message = bad(ExitCode.USAGE, command, "deep.jsonl", "--store", "memory", "--embedder", "hashing")
        assert "deep.jsonl line 2" in message
        assert "nested too deep" in message


# demo, doctor, completion


@pytest.mark.slow
def test_a_crash_is_shown_and_nothing_is_lost(tmp_path: Path) -> None:
    document = ok("demo", "crash", "--crash")
    assert (document["lost"], document["problems"], document["restored"]) == (0, [], 100)
    assert document["acknowledged"] >= 240
    with VectorStore(document["replaced"], None) as before:
        assert before.count() >= 100 + document["acknowledged"]
    assert len(ids("crash/memory")) == 100


def test_doctor_says_what_is_wrong_and_what_to_do(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ok("doctor", "--store", store)["ok"] is True

    def finding(check: str, *arguments: str) -> str:
        result = run("doctor", *arguments, "--json")
        assert result.exit_code == ExitCode.FAILED
        (found,) = (one for one in json.loads(result.stdout)["checks"] if one["check"] == check)
        assert found["state"] == "wrong", found
        return str(found["finding"])

    def clash() -> dict[str, str]:
        return {"faiss-cpu": "1.11", "faiss-gpu": "1.11"}

    with monkeypatch.context() as patched:
        patched.setattr("memevolve_gpu.index.faiss_support.installed_distributions", clash)
        patched.setattr("memevolve_gpu.index.faiss_support._module", None)
        assert "pip uninstall -y faiss-cpu faiss-gpu" in finding("faiss", "--store", store)
    with monkeypatch.context() as patched:
        patched.setattr("memevolve_gpu.records.file_lock.filesystem_of", lambda *_: "nfs4")
        assert "network file system (nfs4)" in finding("file system", "--store", store)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
        assert "free some" in finding("disk", "--store", store)
    with monkeypatch.context() as patched:
        patched.setenv("MEMEVOLVE_STORAGE_DEVICE", "cuda")
        assert "MEMEVOLVE_STORAGE_DEVICE=auto" in finding("gpu", "--store", store)
    embedder = HashingEmbedder(384)
    embedder.model_name = "another-model"
    VectorStore("other", embedder).close()
    assert "another-model" in finding("model", "--store", "other")


def test_tab_completion_offers_commands_options_and_stores(store: str, commands: Forks) -> None:
    def offered(shell: str, *words: str) -> list[str]:
        line = " ".join(("memevolve-store", *words))
        environment = {"_MEMEVOLVE_STORE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
        environment |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words)), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        return re.findall(r"[-/\w.]+", commands(COMMAND, environment=environment).stdout)

    for shell in ("bash", "zsh", "fish"):
        assert "health" in offered(shell, "hea")
        assert "--filters" in offered(shell, "list", "--filt")
        assert store in offered(shell, "list", "--store", store[:-1])
