"""Keyword search: what is found, in which order, folded or not."""

from __future__ import annotations

import math
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records_kit import DIM, foreign_connection, put

from memevolve_gpu.errors import CorruptStoreError
from memevolve_gpu.records import Records
from memevolve_gpu.records.fulltext_buffer import FOLD_AT

TEXTS = {
    "once": "the red fox",
    "twice": "red red fox",
    "long": "red " + "filler " * 60,
    "none": "a blue whale",
    "accent": "Crème brûlée in ПРИВЕТ",
    "path": "run tests/unit-case.py --flag=on foo_bar",
}


def found(records: Records, text: str, limit: int = 10, **filters: object) -> list[str]:
    return [unit_id for _, unit_id in records.keyword(text, limit, filters or None)]


@pytest.fixture(params=["pending", "folded", "half"])
def shelf(records: Records, request: pytest.FixtureRequest) -> Records:
    """The texts, with none, all or some of them in the index."""
    for number, (unit_id, text) in enumerate(TEXTS.items()):
        put(records, unit_id, text, rank=number)
        if request.param == "half" and number == 2:
            records.checkpoint()
    if request.param == "folded":
        records.checkpoint()
    return records


def test_more_and_nearer_matches_come_first(shelf: Records) -> None:
    assert found(shelf, "red")[-1] == "long"
    assert found(shelf, "red fox")[:2] in (["twice", "once"], ["once", "twice"])
    assert set(found(shelf, "red whale")) == {"once", "twice", "long", "none"}
    assert found(shelf, "whale red")[0] == "none"
    assert found(shelf, "green") == []


def test_scores_fall_and_are_positive(shelf: Records) -> None:
    scores = [score for score, _ in shelf.keyword("red fox whale", 10)]
    assert scores == sorted(scores, reverse=True)
    assert all(score > 0 and math.isfinite(score) for score in scores)


def test_the_limit_and_filters_hold(shelf: Records) -> None:
    assert len(found(shelf, "red", 2)) == 2
    assert found(shelf, "red", 0) == []
    assert found(shelf, "red", -1) == []
    assert found(shelf, "red fox whale", 10, rank={"gte": 2}) in (["long", "none"], ["none", "long"])
    assert found(shelf, "red fox whale", 1, rank=0) == ["once"]


def test_case_accents_and_punctuation_do_not_matter(shelf: Records) -> None:
    assert found(shelf, "creme BRULEE") == ["accent"]
    assert found(shelf, "привет") == ["accent"]
    assert found(shelf, "unit-case.py") == ["path"]
    assert found(shelf, "(flag) OR") == ["path"]


HOSTILE = [
    *("", "   ", '"', "'", 'red"', "text:red", "red*", "^red", "(red", "NEAR(red fox)", "NOT", "AND OR NOT"),
    *("{red}", "\x00", "\ud800", "red\x00fox", "🙂", "%_", "; DROP TABLE words", "a" * 40_000),
    " ".join(f"w{n}" for n in range(3000)),
]


def test_any_text_is_safe(shelf: Records) -> None:
    with_red = {unit_id for unit_id, words in TEXTS.items() if "red" in words.split()}
    for text in HOSTILE:
        assert set(found(shelf, text)) >= (with_red if "red" in text else set()), text[:40]


@given(st.text(max_size=30))
def test_hypothesis_finds_no_unsafe_text(shared_shelf: Records, text: str) -> None:
    for score, unit_id in shared_shelf.keyword(text, 3):
        assert unit_id in TEXTS
        assert score > 0


@pytest.fixture(scope="module")
def shared_shelf(tmp_path_factory: pytest.TempPathFactory) -> object:
    with Records.open(tmp_path_factory.mktemp("shelf") / "s", dim=DIM) as opened:
        for unit_id, text in TEXTS.items():
            put(opened, unit_id, text)
            if unit_id == "long":
                opened.checkpoint()
        yield opened


def test_folding_changes_no_score(records: Records) -> None:
    for number in range(40):
        put(records, f"u{number}", " ".join(["common", f"rare{number}", *["word"] * (number % 7)]))
    before = records.keyword("rare3 word common", 40)
    records.checkpoint()
    after = records.keyword("rare3 word common", 40)
    assert {unit_id: pytest.approx(score) for score, unit_id in before} == {unit_id: score for score, unit_id in after}


def test_the_index_keeps_step_with_replacing_dropping_and_clearing(records: Records) -> None:
    for _ in range(2):
        put(records, "a", "first version")
        put(records, "b", "other row")
        assert found(records, "first") == ["a"]
        put(records, "a", "second version")
        assert found(records, "first") == []
        assert found(records, "version") == ["a"]
        with records.write() as tx:
            tx.drop("b")
        assert found(records, "other") == []
        records.checkpoint()
        assert found(records, "first other") == []
        assert found(records, "second") == ["a"]
        put(records, "c", "third")
        with records.write() as tx:
            tx.clear()
        assert found(records, "first second third other version") == []
        assert records.check() == []


def test_the_notes_are_folded_when_they_are_many(records: Records) -> None:
    def backlog() -> int:
        return int(records._rows("SELECT backlog FROM counters")[0][0])

    for number in range(FOLD_AT - 1):
        put(records, f"u{number}", f"word{number}")
    assert backlog() == FOLD_AT - 1
    put(records, "last", "word")
    assert backlog() == 0
    assert found(records, "word7") == ["u7"]
    for number in range(FOLD_AT - 1):
        with records.write() as tx:
            tx.drop(f"u{number}")
    assert backlog() == FOLD_AT - 1
    assert found(records, "word7") == []
    with records.write() as tx:
        tx.drop("last")
    assert backlog() == 0
    assert records.check() == []


def test_a_damaged_unit_hinders_no_merge(records: Records) -> None:
    for number in range(3):
        put(records, f"u{number}", f"word{number}")
    with closing(foreign_connection(records.path)) as con:
        con.execute("UPDATE units SET unit = '{broken' WHERE id = 'u1'")
    with pytest.raises(CorruptStoreError, match="'u1'"):
        found(records, "word0")
    records.checkpoint()
    assert [found(records, f"word{number}") for number in range(3)] == [["u0"], [], ["u2"]]
    assert {finding.code for finding in records.check()} == {"unreadable_units", "wrong_checksums"}
