"""Words of every language and kind of name, found by keyword: waiting, merged, in a namespace, without an index."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import as_child, each

from memevolve_gpu import ConfigurationError, HashingEmbedder, StorageConfig, VectorStore
from memevolve_gpu.components.retrieve import KeywordRetrievalStrategy
from memevolve_gpu.components.validation import ScratchStore
from memevolve_gpu.errors import NewerSchemaError
from memevolve_gpu.records import fulltext_buffer
from memevolve_gpu.records.tokenizer import words_of

GOLDEN = Path(__file__).parents[2] / "golden" / "schema-2-snapshot-3.zip"

TEXTS = {
    "zh": "我们用Redis缓存数据库的查询结果",
    "zh2": "今天天气很好",
    "ja": "データベースの移行手順を確認する",
    "th": "ฐานข้อมูลต้องสำรองทุกวัน",
    "ko": "한국어는 형태소가 복잡하다",
    "de": "Die Donaudampfschifffahrtsgesellschaft heißt in der Straße Müller",
    "fr": "Le café de l'hôpital, déjà vu",
    "ru": "Ещё один Тест",
    "hi": "डेटाबेस में खोज",
    "ar": "قَاعِدَة البيانات",
    "emoji": "deploy went well 👍🏽 🚀 from 🇩🇪",
    "camel": "call parseHTTPResponse before the cache",
    "snake": "raise MAX_MEMORY_UNITS when it is full",
    "path": "edit src/memevolve_gpu/records/schema.py carefully",
    "version": "upgrade python to 3.11.7 and node to v20.1",
    "flag": "git reset --hard HEAD~1",
    "hard": "a hard drive is full",
    "cpp": "write it in C++ and C#",
    "net": "ported to .NET and F#",
    "run": "running the migrations",
    "runs": "he runs a migration",
    "quote": "The user said the build doesn't finish",
    "mail": "ask ops@example.com for access",
    "wide": "\uff26\uff35\uff2c\uff2c width \ufb01le",
}

FOUND = [
    ("数据", {"zh"}),
    ("缓存", {"zh"}),
    ("天气", {"zh2"}),
    ("redis", {"zh"}),
    ("查", {"zh"}),
    ("移行", {"ja"}),
    ("ベース", {"ja"}),
    ("ข้อมูล", {"th"}),
    ("สำรอง", {"th"}),
    ("한국어", {"ko"}),
    ("형태소", {"ko"}),
    ("donaudampf*", {"de"}),
    ("strasse", {"de"}),
    ("MULLER", {"de"}),
    ("heisst", {"de"}),
    ("cafe", {"fr"}),
    ("hopital", {"fr"}),
    ("еще тест", {"ru"}),
    ("डेटाबेस", {"hi"}),
    ("قاعدة", {"ar"}),
    ("👍", {"emoji"}),
    ("🚀", {"emoji"}),
    ("🇩🇪", {"emoji"}),
    ("HTTPResponse", {"camel"}),
    ("parsehttpresponse", {"camel"}),
    ("max_memory", {"snake"}),
    ("maxMemoryUnits", {"snake"}),
    ("schema.py", {"path"}),
    ("records/schema.py", {"path"}),
    ("3.11", {"version"}),
    ("20.1", {"version"}),
    ("C++", {"cpp"}),
    ("c#", {"cpp"}),
    ("F#", {"net"}),
    (".net", {"net"}),
    ("run", {"run", "runs"}),
    ("running", {"run", "runs"}),
    ("migration", {"run", "runs"}),
    ("migrations", {"run", "runs"}),
    ("doesn't", {"quote"}),
    ("doesn\u2019t", {"quote"}),
    ("users", {"quote"}),
    ("example.com", {"mail"}),
    ("full file", {"wide", "snake", "hard"}),
    ('"the cache"', {"camel"}),
    ('"cache the"', set()),
    ('"http response before"', {"camel"}),
    ('"running the"', {"run"}),
    ('"runs the"', set()),
    ('"数据库"', {"zh"}),
    ('"用Redis"', {"zh"}),
    ("migration -running", set()),
    ('migration -"a migration"', {"run"}),
    ("hard -drive", {"flag"}),
    ("hard --hard", {"flag", "hard"}),
    ("full -dri*", {"snake", "wide"}),
    ("git -hard", set()),
    ('"full width" fil*', {"wide"}),
]

Find = Callable[[str], set[str]]


def unit(name: str, text: str) -> dict[str, str]:
    return {"id": name, "content": text}


def opened(prefix: Path, **settings: object) -> VectorStore:
    return VectorStore(
        prefix, HashingEmbedder(8), storage_config=StorageConfig(background=False, _env_file=None, **settings)
    )


@pytest.fixture(scope="module", params=["pending", "merged", "namespace", "waiting namespace", "scan"])
def find(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Find]:
    """Finds among the texts, which lie beside the same in another namespace."""
    units = [unit(*pair) for pair in TEXTS.items()]
    if request.param == "scan":
        scratch = ScratchStore(units)
        yield lambda query: {one.unit_id for one in KeywordRetrievalStrategy().retrieve(query, scratch, 100)}
        return
    with opened(tmp_path_factory.mktemp("words") / "s") as store:
        place = store.namespace("org", "alice") if "namespace" in request.param else store
        place.store_batch(units)
        if request.param in ("merged", "namespace"):
            store._open.records.checkpoint()
        store.namespace("other").store_batch([unit(f"foreign {name}", text) for name, text in TEXTS.items()])
        yield lambda query: {unit_id for _, unit_id in place.search_keywords(query, 100)}
        assert store.check() == []


@each(("query", "wanted"), FOUND)
def test_what_is_found(find: Find, query: str, wanted: set[str]) -> None:
    assert find(query) == wanted


def test_a_whole_name_comes_before_its_parts(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        store.store_batch([unit("hard", TEXTS["hard"]), unit("flag", TEXTS["flag"]), unit("c", "the language C")])
        store.store(unit("cpp", TEXTS["cpp"]))
        assert store.search_keywords("--hard")[0][1] == "flag"
        assert store.search_keywords("C++")[0][1] == "cpp"


def test_stop_words_find_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    texts = {"a": "the state of the art", "b": "of all the things that there are", "c": "art"}
    with opened(tmp_path / "s") as store:
        store.store_batch([unit(*pair) for pair in texts.items()])
        assert {unit_id for _, unit_id in store.search_keywords("what is the art of it")} == {"a", "c"}
        assert {unit_id for _, unit_id in store.search_keywords("of the")} == {"a", "b"}
        assert {unit_id for _, unit_id in store.search_keywords('"of the art"')} == {"a"}


HOSTILE = st.text(st.sampled_from("ab\"*-+#/.'_()^:{}\x00\ud800 数据 ÅéͅKสั👍\u200d🏽"), max_size=40)


@given(HOSTILE | st.text(max_size=40) | st.lists(HOSTILE | st.sampled_from(["the", "full"])).map(" ".join))
def test_any_text_is_a_query(find: Find, query: str) -> None:
    assert find(query) <= TEXTS.keys()


WORDS = st.sampled_from(["the", "cache", "run", "hard", "--hard", "full", "数据", "migration", "a"])
ASKED = st.tuples(st.sampled_from(["{}", '"{}"', "-{}", '-"{}"', "{}*"]), st.lists(WORDS, min_size=1, max_size=2)).map(
    lambda pair: pair[0].format(" ".join(pair[1]))
)


@given(st.lists(ASKED, max_size=4).map(" ".join))
def test_an_index_finds_what_reading_every_text_finds(find: Find, query: str) -> None:
    scratch = ScratchStore([unit(*pair) for pair in TEXTS.items()])
    assert find(query) == {one.unit_id for one in KeywordRetrievalStrategy().retrieve(query, scratch, 100)}


def test_long_and_many_words_are_no_burden(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        blob = "QUJD" * 50_000
        store.store(unit("blob", f"needle {blob}"))
        store.store(unit("many", " ".join(f"w{n}" for n in range(20_000))))
        assert store.search_keywords("needle")[0][1] == "blob"
        assert store.search_keywords(f"{blob} w7")
        assert store.search_keywords(" ".join(f'"w{n} w{n + 1}"' for n in range(300)))[0][1] == "many"
        assert store.search_keywords("w7 " + " ".join(f"-x{n}" for n in range(3000)))[0][1] == "many"


# The tokenizer of a file


def taken(tmp_path: Path) -> Path:
    """A store whose index FTS5 made by itself, as before the words were ours."""
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extract("exact.db", tmp_path)
    return tmp_path / "exact"


def tokenizer(prefix: Path) -> bytes | None:
    con = apsw.Connection(f"{prefix}.db", flags=apsw.SQLITE_OPEN_READONLY)
    try:
        value: bytes | None = con.execute("SELECT value FROM meta WHERE key = 'tokenizer'").get
    finally:
        con.close()
    return value


def set_tokenizer(prefix: Path, value: bytes | None) -> None:
    con = apsw.Connection(f"{prefix}.db")
    con.execute("UPDATE meta SET value = ? WHERE key = 'tokenizer'", (value,))
    con.close()


def test_an_older_index_is_made_again_when_it_is_opened(tmp_path: Path) -> None:
    prefix = taken(tmp_path)
    assert tokenizer(prefix) is None
    with VectorStore(prefix, None, storage_config=StorageConfig(background=False)) as store:
        found = {unit_id for _, unit_id in store.search_keywords("憶", 100)}
        assert found == {one["id"] for one in store.units() if "記憶" in one["content"]}
        assert found
        assert store.check() == []
    assert tokenizer(prefix) == b"words-1 light"


def killed_opening(prefix: Path, at: int, stemming: str) -> None:
    """Open the store in a child, which is killed when the ``at``-th text is taken apart."""

    def act() -> None:
        made = itertools.count(1)

        def killing(*given: Any) -> Any:
            if next(made) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return words_of(*given)

        with patch.object(fulltext_buffer, "words_of", killing):
            VectorStore(prefix, None, storage_config=StorageConfig(background=False, keyword_stemming=stemming))

    assert as_child(act) == -signal.SIGKILL


@pytest.mark.parametrize("at", [1, 40])
def test_a_kill_while_the_index_is_made_again_loses_nothing(tmp_path: Path, at: int) -> None:
    prefix = taken(tmp_path)
    killed_opening(prefix, at, "light")
    assert tokenizer(prefix) is None
    with VectorStore(prefix, None, storage_config=StorageConfig(background=False)) as store:
        assert store.check() == []
        assert store.search_keywords("記憶", 100)
    killed_opening(prefix, at, "none")
    assert tokenizer(prefix) == b"words-1 light"


def test_what_a_later_tokenizer_made_is_left_alone(tmp_path: Path) -> None:
    prefix = tmp_path / "s"
    with opened(prefix) as store:
        store.store(unit("a", "needle"))
        held = tokenizer(prefix)
        set_tokenizer(prefix, b"words-99 light")
        with pytest.raises(NewerSchemaError, match="upgrade memevolve-gpu"):
            store.search_keywords("needle")
        for number in range(300):
            store.store(unit(f"n{number}", "needle"))
        assert store.count() == 301
        with pytest.raises(NewerSchemaError, match="upgrade memevolve-gpu"):
            opened(prefix)
        set_tokenizer(prefix, held)
        assert len(store.search_keywords("needle", 400)) == 301
        store.store(unit("last", "needle"))
        assert store.check() == []


def test_stemming_is_a_setting_that_the_file_keeps(tmp_path: Path) -> None:
    def found(store: VectorStore) -> set[str]:
        return {unit_id for _, unit_id in store.search_keywords("run")}

    prefix = tmp_path / "s"
    with opened(prefix, keyword_stemming="none") as first:
        first.store_batch([unit("run", "run"), unit("running", "running"), unit("sprint", "sprint")])
        assert found(first) == {"run"}
        with opened(prefix) as second:
            assert found(second) == {"run"}
        with opened(prefix, keyword_stemming="light") as second:
            assert found(second) == {"run", "running"}
            assert found(first) == {"run", "running"}
            first.store(unit("runs", "runs"))
            assert found(first) == found(second) == {"run", "running", "runs"}
    with opened(prefix) as store:
        assert found(store) == {"run", "running", "runs"}
        assert store.check() == []


def test_a_language_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "snowballstemmer", None)
    with pytest.raises(ConfigurationError, match=r"memevolve-gpu\[stemming\]"):
        opened(tmp_path / "s", keyword_stemming="german")
    assert not (tmp_path / "s.db").exists()


def test_a_language_finds_its_forms(tmp_path: Path) -> None:
    pytest.importorskip("snowballstemmer")
    with opened(tmp_path / "s", keyword_stemming="german") as store:
        store.store_batch([unit("a", "die Häuser brennen"), unit("b", "ein Baum")])
        assert [unit_id for _, unit_id in store.search_keywords("häusern")] == ["a"]
    with pytest.raises(ConfigurationError, match="light, none or one of"):
        opened(tmp_path / "t", keyword_stemming="klingon")


def test_bulk_and_single_writes_make_the_same_words(tmp_path: Path) -> None:
    units = [unit(f"{name} {copy}", text) for copy in range(20) for name, text in TEXTS.items()]
    with opened(tmp_path / "a") as bulk, opened(tmp_path / "b") as single:
        bulk.store_batch(units)
        for one in units:
            single.store(one)
        single._open.records.checkpoint()
        for query, _ in FOUND:
            theirs = {unit_id: pytest.approx(score) for score, unit_id in bulk.search_keywords(query, 1000)}
            assert {unit_id: score for score, unit_id in single.search_keywords(query, 1000)} == theirs, query
