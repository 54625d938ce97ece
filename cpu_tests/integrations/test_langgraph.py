"""The LangGraph store: what its own suites do not ask. ``scripts/conformance`` runs those suites."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SEED, each

pytest.importorskip("langgraph.store.base", reason="langgraph is not installed: pip install 'memevolve-gpu[langgraph]'")

from langchain_kit import AsyncOnly, Words
from langgraph.store.base import GetOp, PutOp, SearchOp

from memevolve_gpu import VectorStore
from memevolve_gpu.errors import ConfigurationError, InvalidFilterError, InvalidQueryError, InvalidUnitError
from memevolve_gpu.integrations.langgraph import MemEvolveStore

USER = ("users", "alice")
CONFIG = {"background": False, "metric": "cosine"}


def opened(path: Path, embed: Any = None, fields: list[str] | None = None, **arguments: Any) -> MemEvolveStore:
    index: Any = None if embed is None else {"dims": 16, "embed": embed, "fields": fields}
    return MemEvolveStore(path / "memory", index=index, storage_config=CONFIG, **arguments)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemEvolveStore]:
    with opened(tmp_path, Words(), ["text", "notes[*]"]) as one:
        yield one


def keys(found: list[Any]) -> list[str]:
    return [item.key for item in found]


def test_items_are_there_after_opening_again_and_keep_when_they_were_made(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(USER, "prefs", {"theme": "dark"})
        made = store.get(USER, "prefs")
    with opened(tmp_path) as store:
        assert store.get(USER, "prefs") == made
        store.put(USER, "prefs", {"theme": "light"})
        again = store.get(USER, "prefs")
        assert made is not None
        assert again is not None
        assert (again.value, again.created_at) == ({"theme": "light"}, made.created_at)
        assert again.updated_at > made.updated_at


def test_an_item_is_found_by_each_of_its_texts_and_by_none_of_its_old_ones(store: MemEvolveStore) -> None:
    store.put(USER, "a", {"text": "git bisect", "notes": ["tar archive", "zip file", "cpio stream"]})
    store.put(USER, "b", {"text": "red apple"})
    for query in ("git bisect", "tar archive", "zip file", "cpio stream"):
        found = store.search(("users",), query=query)
        assert keys(found) == ["a", "b"]
        assert found[0].score == pytest.approx(1.0, abs=1e-5)
    assert store.store.count() == 5
    store.put(USER, "a", {"text": "green pear"})
    assert store.store.count() == 2
    assert store.search(USER, query="zip file", limit=1)[0].score < 0.9
    store.delete(USER, "a")
    assert store.store.count() == 1
    assert keys(store.search(USER, query="green pear")) == ["b"]


def test_an_item_without_vectors_is_kept_and_never_found_by_meaning(store: MemEvolveStore) -> None:
    store.put(USER, "hidden", {"text": "git bisect"}, index=False)
    store.put(USER, "other", {"unrelated": 1})
    store.put(USER, "empty", {"text": "  "})
    for number in range(3):
        store.put(USER, f"shown {number}", {"text": f"git bisect {number}"})
    assert keys(store.search(USER, query="git bisect", limit=3)) == ["shown 0", "shown 1", "shown 2"]
    found = store.search(USER, query="git bisect", limit=10)
    assert [item.score is None for item in found] == [False] * 3 + [True] * 3
    pages = [store.search(USER, query="git bisect", limit=2, offset=offset) for offset in (0, 2, 4, 6)]
    assert [key for page in pages for key in keys(page)] == keys(found)
    assert store.get(USER, "hidden") is not None


def test_a_search_finds_enough_however_many_texts_an_item_has(store: MemEvolveStore) -> None:
    store.put(USER, "many", {"notes": [f"git bisect {number}" for number in range(50)]})
    store.put(USER, "one", {"text": "red apple"})
    assert keys(store.search(USER, query="git bisect", limit=2)) == ["many", "one"]


def test_a_search_agrees_with_a_comparison_of_all_items(tmp_path: Path) -> None:
    rng, words = np.random.default_rng(SEED), Words()
    print("seed", SEED)
    items: dict[str, dict[str, Any]] = {
        str(number): {"text": f"w{rng.integers(40)} w{rng.integers(40)}", "n": int(rng.integers(10))}
        for number in range(300)
    }
    with opened(tmp_path, words, ["text"]) as store:
        store.batch([PutOp(("t", str(int(key) % 3)), key, value) for key, value in items.items()])
        for least in range(10):
            query = f"w{rng.integers(40)}"
            vector = words.fake.vector(query)
            want = [
                (float(words.fake.vector(value["text"]) @ vector), key)
                for key, value in items.items()
                if value["n"] >= least and int(key) % 3 == 1
            ]
            norms = {key: float(np.linalg.norm(words.fake.vector(items[key]["text"]))) for _, key in want}
            size = float(np.linalg.norm(vector))
            best = sorted((score / norms[key] / size for score, key in want), reverse=True)[:7]
            found = store.search(("t", "1"), query=query, filter={"n": {"$gte": least}}, limit=7)
            assert [item.score for item in found] == pytest.approx(best, abs=1e-4)


@each(
    ("wanted", "found"),
    [
        ({"n": 1}, ["int"]),
        ({"n": True}, ["bool"]),
        ({"n": "1"}, ["text"]),
        ({"n": None}, ["null", "list", "deep"]),
        ({"n": {"$ne": 1}}, ["bool", "text", "null", "list", "deep"]),
        ({"n": {"$gte": "1"}}, ["text"]),
        ({"n": {"$gt": 0, "$lt": float("inf")}}, ["int"]),
        ({"tags": ["a", "b"]}, ["list"]),
        ({"tags": ["b", "a"]}, []),
        ({"tags": "a"}, []),
        ({"user.name": "x"}, ["deep"]),
        ({"user": {"name": "x"}}, ["deep"]),
        ({"user": {"age": {"$lte": 5}}}, ["deep"]),
        ({"a.b": 1}, ["list"]),
        ({"n": {"$eq": 1, "$ne": 1}}, []),
        ({"é": "é"}, ["null"]),
        ({"e\u0301": "é"}, []),
    ],
)
def test_a_filter_compares_json_values(store: MemEvolveStore, wanted: dict[str, Any], found: list[str]) -> None:
    values: dict[str, dict[str, Any]] = {
        "int": {"n": 1},
        "bool": {"n": True},
        "text": {"n": "1"},
        "null": {"n": None, "é": "é"},
        "list": {"tags": ["a", "b"], "a.b": 1},
        "deep": {"user": {"name": "x", "age": 5}},
    }
    store.batch([PutOp(USER, key, {"text": key, **value}) for key, value in values.items()])
    assert keys(store.search(USER, filter=wanted)) == found
    assert sorted(keys(store.search(USER, filter=wanted, query="text"))) == sorted(found)


def test_what_cannot_be_used_is_refused_and_nothing_is_written(store: MemEvolveStore, tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, call: Callable[[], object]) -> None:
        with pytest.raises(error, match=re.escape(words)):
            call()

    refused(
        InvalidFilterError, "Invalid filter operator '$like'", lambda: store.search(USER, filter={"a": {"$like": 1}})
    )
    refused(InvalidFilterError, "Invalid filter key 'a..b'", lambda: store.search(USER, filter={"a..b": 1}))
    refused(InvalidQueryError, "limit must be a whole number", lambda: store.search(USER, limit=-1))
    refused(InvalidQueryError, "ops[0] must be a GetOp", lambda: store.batch(["get"]))
    good, bad = PutOp(USER, "good", {"text": "x"}), PutOp(USER, "bad", {"text": object()})
    refused(InvalidUnitError, "value of 'bad' must be a mapping of JSON values", lambda: store.batch([good, bad]))
    assert store.search(()) == []
    refused(ConfigurationError, "index['embed'] is missing", lambda: MemEvolveStore(tmp_path / "x", index={"dims": 3}))
    refused(ConfigurationError, "sweep_interval_minutes", lambda: store.start_ttl_sweeper(-1))
    index: Any = {"dims": 3, "embed": Words()}
    refused(ConfigurationError, "index['dims'] must be", lambda: MemEvolveStore(store.store, index=index))
    refused(
        ConfigurationError, "storage_config is for a path", lambda: MemEvolveStore(store.store, storage_config=CONFIG)
    )


def test_an_open_store_keeps_other_units_apart_and_stays_open(tmp_path: Path) -> None:
    with VectorStore(tmp_path / "shared", Words().fake.vector, 16, storage_config=CONFIG) as shared:
        shared.store({"id": "mine", "content": "git bisect"})
        with MemEvolveStore(shared, index={"fields": ["text"]}) as store:
            store.put(USER, "a", {"text": "git bisect"})
            assert keys(store.search((), query="git bisect")) == ["a"]
            assert keys(store.search(())) == ["a"]
            assert store.list_namespaces() == [USER]
        assert shared.retrieve("mine") is not None
        with MemEvolveStore(shared.namespace("org")) as apart:
            assert apart.search(()) == []


def test_expired_items_are_gone_at_once_and_reads_let_items_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with opened(tmp_path, Words(), ["notes[*]"], ttl={"default_ttl": 2}) as store:
        value = {"notes": ["git bisect", "tar archive"]}
        store.batch([PutOp(USER, key, value, ttl=2) for key in ("read", "unread")])
        store.put(("other",), "kept", value, ttl=None)
        for _ in range(15):
            now[0] += 10
            assert store.get(USER, "read") is not None
        assert store.get(USER, "unread") is None
        assert keys(store.search(USER)) == ["read"]
        assert keys(store.search((), query="git bisect")) == ["read", "kept"]
        assert store.sweep_ttl() == 1
        assert store.store.count() == 4
        now[0] += 130
        assert store.list_namespaces() == [("other",)]


def test_a_sweeper_deletes_and_ends_with_the_store(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(USER, "a", {"x": 1}, ttl=0.05 / 60)
        store.start_ttl_sweeper(0.05 / 60)
        deadline = time.monotonic() + 10
        while store.store.count() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert store.store.count() == 0
    assert not any(thread.name == "ttl" for thread in threading.enumerate())


async def test_asynchronous_calls_use_the_asynchronous_model(tmp_path: Path) -> None:
    with opened(tmp_path, AsyncOnly(), ["text"]) as store:
        await asyncio.gather(*(store.aput(USER, str(number), {"text": f"w{number}"}) for number in range(10)))
        found = await store.asearch(USER, query="w3", limit=1)
        assert keys(found) == ["3"]
        results = await store.abatch([GetOp(USER, "1"), PutOp(USER, "1", None), SearchOp(USER, limit=20)])
        assert results[0].value == {"text": "w1"}
        assert len(results[2]) == 10
        assert await store.aget(USER, "1") is None


def test_two_stores_on_one_file_see_each_other(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        one.put(USER, "a", {"x": 1})
        assert other.get(USER, "a") is not None
        other.delete(USER, "a")
        assert one.list_namespaces() == []


def test_the_quick_start_of_the_page_runs(repository: Path, tmp_path: Path) -> None:
    page = (repository / "docs" / "how-to" / "langgraph.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "MemEvolveStore(" in block)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(repository / "src"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "rebase 1\n"), done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("langgraph.graph") is None, reason="the package langgraph is not installed"
)
def test_a_graph_remembers_across_threads(tmp_path: Path) -> None:
    graph = __import__("langgraph.graph", fromlist=["graph"])

    def remember(state: dict[str, Any], *, store: Any) -> dict[str, Any]:
        known = [item.value["text"] for item in store.search(USER, query=state["text"])]
        store.put(USER, state["text"], {"text": state["text"]})
        return {"known": known}

    remember.__annotations__["store"] = __import__("langgraph.store.base", fromlist=["base"]).BaseStore
    with opened(tmp_path, Words(), ["text"]) as store:
        builder = graph.StateGraph(dict)
        builder.add_node("remember", remember)
        builder.add_edge(graph.START, "remember")
        app = builder.compile(store=store)
        assert app.invoke({"text": "git bisect"})["known"] == []
        assert app.invoke({"text": "git"})["known"] == ["git bisect"]
