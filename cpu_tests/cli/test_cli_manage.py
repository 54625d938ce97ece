"""``memevolve-store manage``, ``search --hybrid | --keyword`` and ``embed`` through its entry point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.test_cli import bad, ids, ok, run, write
from memory_kit import days_ago
from support import each

from memevolve_gpu import HashingEmbedder, VectorStore, cli
from memevolve_gpu.cli.app import ExitCode
from memevolve_gpu.errors import ConflictError

UNITS: list[dict[str, Any]] = [
    {"id": "old", "type": "lesson", "content": "copy the write-ahead log", "metadata": {"created_at": days_ago(9)}},
    {"id": "twin", "type": "lesson", "content": "copy the write-ahead log", "metadata": {"created_at": days_ago(5)}},
    {"id": "undated", "type": "skill", "content": "bisect finds the commit", "metadata": {"created_at": "long ago"}},
    {
        "id": "new",
        "type": "skill",
        "content": "a worktree has a second branch",
        "metadata": {"created_at": days_ago(1)},
    },
]


@pytest.fixture
def store(tmp_path: Path) -> str:
    prefix = str(tmp_path / "memory")
    ok("add", write(tmp_path / "units.jsonl", UNITS), "--store", prefix, "--embedder", "hashing")
    return prefix


def manage(store: str, operation: str, *options: str) -> Any:
    return ok("manage", operation, "--store", store, *options)


@pytest.mark.parametrize(
    ("operation", "options", "gone", "notes"),
    [
        ("prune", ["--max-age", "7"], ["old"], {"undated": 1}),
        ("prune", ["--max-count", "1"], ["old", "twin", "undated"], {}),
        ("prune", ["--filter", "type=skill"], ["undated", "new"], {}),
        ("prune", ["--filter", "type=skill", "--max-count", "1"], ["undated"], {}),
        ("prune", ["--filters", '{"id": "twin"}'], ["twin"], {}),
        ("deduplicate", ["--keep", "oldest"], ["twin"], {"groups": 1}),
        ("deduplicate", ["--threshold", "0.999", "--keep", "oldest"], ["twin"], {"groups": 1}),
        ("forget", ["--count", "2"], ["old", "twin"], {}),
        ("forget", [], ["old"], {}),
    ],
)
def test_units_go(store: str, operation: str, options: list[str], gone: list[str], notes: dict[str, int]) -> None:
    said = manage(store, operation, *options, "--dry-run")
    assert (said["notes"].pop("pairs", []) == []) == (operation != "deduplicate")
    assert said == {"operation": operation, "count": len(gone), "ids": gone, "dry_run": True, "notes": notes}
    assert len(ids(store)) == 4
    done = manage(store, operation, *options)
    assert done == {**said, "dry_run": False}
    assert ids(store) == [unit["id"] for unit in UNITS if unit["id"] not in gone]


def test_what_was_read_is_forgotten_last(store: str) -> None:
    ok("get", "old", "--store", store)
    ok("search", "worktree", "--keyword", "--store", store)
    assert manage(store, "forget", "--count", "2")["ids"] == ["twin", "undated"]
    ok("get", "new", "--store", store)
    assert manage(store, "forget", "--strategy", "lfu", "--count", "1")["ids"] == ["old"]


def test_random_follows_its_seed(store: str) -> None:
    options = ["--strategy", "random", "--count", "2", "--seed", "5", "--dry-run"]
    assert manage(store, "forget", *options) == manage(store, "forget", *options)


def test_units_are_merged(store: str) -> None:
    said = manage(store, "consolidate", "--dry-run")
    assert (said["count"], said["sources"]) == (1, 2)
    assert len(ids(store)) == 4
    done = manage(store, "consolidate")
    (merged,) = done["merged"]
    assert merged["metadata"]["consolidated_from"] == ["old", "twin"]
    assert ids(store) == ["undated", "new", merged["id"]]
    done = manage(store, "consolidate", "undated", "new", "--by", "type", "--max-characters", "100")
    assert done["merged"][0]["content"] == "bisect finds the commit\n\na worktree has a second branch"
    assert manage(store, "consolidate", "--threshold", "0.99")["count"] == 0


def test_management_for_people(store: str) -> None:
    assert run("manage", "prune", "--max-age", "7", "--dry-run", "--store", store).stdout.splitlines() == [
        "would delete 1 unit: old",
        "kept 1 unit without a time stamp",
    ]
    assert "would merge 2 units into 1\n" in run("manage", "consolidate", "--dry-run", "--store", store).stdout
    assert run("manage", "consolidate", "new", "--dry-run", "--store", store).stdout == "nothing to merge\n"
    assert run("manage", "forget", "--count", "2", "--store", store).stdout == "deleted 2 units: old, twin\n"
    assert run("manage", "deduplicate", "--store", store).stdout == "deleted 0 units\n"


@each(
    ("arguments", "said"),
    [
        (["prune"], "give --max-age"),
        (["prune", "--max-age", "-1"], "max-age"),
        (["prune", "--filter", "type"], "KEY=VALUE"),
        (["consolidate", "--by", "colour"], "colour"),
        (["consolidate", "--threshold", "1.5", "--dry-run"], "similarity_threshold"),
        (["deduplicate", "--threshold", "0"], "similarity_threshold"),
        (["forget", "--strategy", "fifo"], "fifo"),
        (["forget", "--count", "-1"], "count"),
        (["compress"], "compress"),
    ],
)
def test_wrong_usage_of_manage(store: str, arguments: list[str], said: str) -> None:
    command, *options = arguments
    assert said in bad(ExitCode.USAGE, "manage", command, *options, *(["--store", store] if options else []))
    assert len(ids(store)) == 4


def test_managing_what_is_not_there(tmp_path: Path) -> None:
    for command in (["prune", "--max-count", "1"], ["consolidate"], ["deduplicate"], ["forget"]):
        assert "there is no store" in bad(ExitCode.NOT_FOUND, "manage", *command, "--store", str(tmp_path / "none"))


def test_a_conflict_has_a_code(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_more: Any) -> Any:
        raise ConflictError(["another"])

    monkeypatch.setattr(VectorStore, "replace_batch", refuse)
    assert "changed since" in bad(ExitCode.FAILED, "manage", "consolidate", "--store", store)


def test_search_by_words_needs_no_embedder(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_BASE_URL", "http://127.0.0.1:1/v1")
    document = ok("search", "second worktree", "--keyword", "--store", store, "--embedder", "openai")
    assert [hit["id"] for hit in document["hits"]] == ["new"]
    assert document["hits"][0]["score"] > 0
    assert document["hits"][0]["unit"]["content"] == "a worktree has a second branch"
    assert ok("search", "zebra", "--keyword", "--store", store)["hits"] == []
    assert "nothing found" in run("search", "zebra", "--keyword", "--store", store).stdout


def test_search_by_both(store: str) -> None:
    document = ok("search", "second branch", "--hybrid", "-k", "2", "--store", store)
    first = document["hits"][0]
    assert first["id"] == "new"
    assert set(first) == {"id", "score", "unit", "semantic_score", "keyword_score", "semantic_rank", "keyword_rank"}
    assert len(document["hits"]) == 2
    filtered = ok("search", "second branch", "--hybrid", "--filter", "type=lesson", "--store", store)
    assert {hit["id"] for hit in filtered["hits"]} == {"old", "twin"}
    assert "a worktree has a second branch" in run("search", "branch", "--hybrid", "--store", store).stdout


def test_flags_of_search_that_clash(store: str) -> None:
    assert "give one" in bad(ExitCode.USAGE, "search", "x", "--hybrid", "--keyword", "--store", store)
    assert "--recall" in bad(ExitCode.USAGE, "search", "x", "--hybrid", "--recall", "1", "--store", store)


def test_embed_shows_what_the_embedder_does(store: str) -> None:
    document = ok("embed", "one text", "another", "--store", store)
    assert document["model"] == "hashing-lexical-384"
    assert document["dimension"] == 384
    assert document["vectors"] == HashingEmbedder(384).embed_batch(["one text", "another"]).tolist()
    told = run("embed", "one text", "one text", "--store", store).stdout
    assert "hashing-lexical-384: 384 numbers" in told
    assert told.count("1.0000\t1.0000") == 2
    assert len(ids(store)) == 4


def test_embed_says_when_the_embedder_does_not_fit_the_store(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = str(tmp_path / "other")
    with VectorStore(other, None, 384) as opened:
        opened.store_batch([{"id": "a", "content": "x"}], [[1.0] * 384])
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_DIMENSION", "32")
    said = bad(ExitCode.ENGINE, "embed", "x", "--store", other, "--embedder", "hashing")
    assert "expected 384, got 32" in said
    assert ok("embed", "x", "--store", str(tmp_path / "none"), "--embedder", "hashing")["dimension"] == 32
    monkeypatch.setattr(cli.read_commands, "choose_embedder", lambda *_: Renamed(384))
    assert "was filled by" in bad(ExitCode.ENGINE, "embed", "x", "--store", store)


class Renamed(HashingEmbedder):
    def __init__(self, dimension: int) -> None:
        super().__init__(dimension)
        self.model_name = "another"


def test_help_of_the_new_commands() -> None:
    for command in (["manage", name] for name in ("prune", "consolidate", "deduplicate", "forget")):
        assert "--dry-run" in run(*command, "--help").stdout
    assert "--json" in run("embed", "-h").stdout
    for name in ("prune", "consolidate", "deduplicate", "forget"):
        assert name in run("manage", "--help").stdout
    assert json.loads(run("manage", "prune", "--json").stdout)["type"] == "InputError"
