"""Frequent words of a keyword query: what is looked up, what is found, and what a query reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memevolve_gpu.records import Records, fulltext
from memevolve_gpu.records.connections import first_row

DIM = 4
VECTOR = np.ones(DIM, np.float32).tobytes()
WORDS = {"every": 1, "half": 2, "tenth": 10, "fiftieth": 50, "rare": 500}
ROWS = 2000


def text_of(unit: dict[str, Any]) -> str:
    return str(unit["content"])


def texts() -> list[str]:
    """Each word in every so manieth row, and a word of its own in each."""
    return [" ".join([*(w for w, n in WORDS.items() if number % n == 0), f"own{number}"]) for number in range(ROWS)]


def put_all(records: Records, contents: list[str], first: int = 0) -> None:
    with records.write() as tx:
        rows = enumerate(contents, first)
        tx.put_many(({"content": text, "id": f"u{n}"}, text, VECTOR, f"u{n}") for n, text in rows)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Records]:
    with Records.open(tmp_path_factory.mktemp("frequency") / "s", dim=DIM) as opened:
        put_all(opened, texts())
        yield opened


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a store of two thousand rows behave like a large one."""
    monkeypatch.setattr(fulltext, "FREQUENT_ROWS", 20)


def found(records: Records, text: str, limit: int = 10_000) -> list[str]:
    return [unit_id for _, unit_id in records.keyword(text, limit)]


def scores(records: Records, text: str) -> dict[str, float]:
    return {unit_id: score for score, unit_id in records.keyword(text, 10_000)}


def rows_with(*words: str) -> set[str]:
    return {f"u{n}" for n, text in enumerate(texts()) if not set(words).isdisjoint(text.split())}


def test_a_frequent_word_finds_nothing_beside_a_telling_one(records: Records) -> None:
    assert set(found(records, "every half fiftieth")) == rows_with("fiftieth")
    assert set(found(records, "tenth rare own7")) == rows_with("rare", "own7")
    assert set(found(records, "every own7")) == {"u7"}


def test_frequent_words_are_looked_up_when_nothing_else_is_left(records: Records) -> None:
    assert set(found(records, "half every")) == rows_with("half")
    assert set(found(records, "every unheard")) == rows_with("every")
    assert found(records, "unheard") == []


def test_few_rows_are_no_reason_to_drop_a_word(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fulltext, "FREQUENT_ROWS", 500)
    assert set(found(records, "tenth rare")) == rows_with("tenth", "rare")


def test_what_a_query_reads_is_bounded(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fulltext, "MOST_ROWS", 43)
    assert set(found(records, "fiftieth rare own7")) == rows_with("rare", "own7")
    monkeypatch.setattr(fulltext, "MOST_ROWS", 45)
    assert set(found(records, "fiftieth rare own7")) == rows_with("fiftieth", "rare", "own7")


def test_dropped_words_score_what_the_others_find(records: Records) -> None:
    """By the formula itself, over all words of the query."""
    docs = {f"u{n}": Counter(text.split()) for n, text in enumerate(texts())}
    average = sum(counts.total() for counts in docs.values()) / ROWS
    query = ["every", "half", "fiftieth", "own100"]

    def bm25(counts: Counter[str]) -> float:
        norm = 1.2 * (0.25 + 0.75 * counts.total() / average)
        holding = {word: sum(word in other for other in docs.values()) for word in query}
        idf = {word: max(1e-6, math.log((ROWS - n + 0.5) / (n + 0.5))) for word, n in holding.items()}
        return sum(idf[word] * counts[word] * 2.2 / (counts[word] + norm) for word in query)

    got = records.keyword(" ".join(query), 12)
    assert got[0][1] == "u100"
    for score, unit_id in got:
        assert score == pytest.approx(bm25(docs[unit_id]))
    best = sorted((bm25(docs[unit_id]) for unit_id in rows_with("fiftieth", "own100")), reverse=True)
    assert [score for score, _ in got] == pytest.approx(best[:12])


def test_rows_that_are_not_folded_yet_are_scored_alike(tmp_path: Path) -> None:
    with Records.open(tmp_path / "a", dim=DIM) as whole, Records.open(tmp_path / "b", dim=DIM) as part:
        put_all(whole, texts())
        whole.checkpoint()
        put_all(part, texts()[:1900])
        part.checkpoint()
        put_all(part, texts()[1900:], first=1900)
        for query in ("every half fiftieth", "rare half", "own1950 every", "half every"):
            ours, theirs = scores(part, query), scores(whole, query)
            assert ours.keys() == theirs.keys()
            assert ours == {unit_id: pytest.approx(score, rel=0.02) for unit_id, score in theirs.items()}


def test_filters_hold_for_what_is_proposed(records: Records) -> None:
    ids = [f"u{n}" for n in range(0, 1000, 100)]
    got = [unit_id for _, unit_id in records.keyword("every half fiftieth", 50, {"id": ids})]
    assert set(got) == set(ids)


def test_counts_follow_the_store(tmp_path: Path) -> None:
    with Records.open(tmp_path / "s", dim=DIM) as opened:
        put_all(opened, ["new word"] * 10 + ["other"] * 300)
        assert len(found(opened, "word other")) == 10
        put_all(opened, ["word"] * 2000, first=400)
        assert len(found(opened, "word other")) == 300


def test_a_query_of_very_many_words_is_cut(records: Records) -> None:
    many = " ".join(f"own{n}" for n in range(ROWS))
    assert set(found(records, many)) == {f"u{n}" for n in range(256)}


def test_known_words_are_not_counted_again(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    def count(con: Any, sql: str, parameters: Any = ()) -> Any:
        if "MATCH" in sql:
            counted.append(parameters)
        return first_row(con, sql, parameters)

    monkeypatch.setattr(fulltext, "first_row", count)
    found(records, "every own1234")
    assert len(counted) <= 2
    counted.clear()
    found(records, "own1234 every")
    assert counted == []


def test_a_frequent_word_helps_to_choose_what_the_rare_one_finds(tmp_path: Path) -> None:
    """More rows hold the rare word than are scored; the only one that holds both words is longer than they are."""
    with Records.open(tmp_path / "s", dim=DIM) as opened:
        others = ["eight other words that make texts longer here"] * 1000
        put_all(opened, ["scarce"] * 150 + ["usual"] * 300 + others + ["scarce usual more"])
        assert found(opened, "scarce usual", 1) == ["u1450"]


@pytest.mark.parametrize("gone", ["deleted", "expired"])
def test_rows_that_are_gone_take_no_place_of_those_that_are_found(tmp_path: Path, gone: str) -> None:
    with Records.open(tmp_path / "s", dim=DIM) as opened:
        with opened.write() as tx:
            for number in range(400):
                until = opened.clock() - 1 if gone == "expired" and number < 100 else None
                tx.put({"content": "word", "id": f"u{number}"}, VECTOR, f"u{number}", expires_at=until)
        if gone == "deleted":
            with opened.write() as tx:
                tx.drop_many([f"u{number}" for number in range(100)])
        assert found(opened, "word other", 5) == [f"u{number}" for number in range(100, 105)]


def test_the_form_that_is_asked_for_comes_first(tmp_path: Path) -> None:
    with Records.open(tmp_path / "s", dim=DIM) as opened:
        put_all(opened, ["one directory of many"] * 3 + ["two directories of many"] + ["nothing of it"] * 20)
        assert found(opened, "directories") == ["u3", "u0", "u1", "u2"]
