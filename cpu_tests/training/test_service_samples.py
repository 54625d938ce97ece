"""Service sample texts: many, different, repeatable, and shaped like a unit's text."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain

import pytest

from memevolve_gpu.components.store.units import unit_to_text
from memevolve_gpu.errors import ConfigurationError
from memevolve_gpu.training.training_set import DOMAINS, SAMPLE_TYPES, available_texts, sample_texts

SHAPES = {
    "lesson": r"Regular .+ prevents .+",
    "skill": r"Use .+ to achieve .+",
    "tool": r"Create .+ for .+ automation.*",
    "abstraction": r"Balance between .+ and .+ enables .+",
}


def type_of(text: str) -> str:
    return text.rsplit(" ", 1)[1]


def test_thousands_can_be_made_of_each_type_and_all_differ() -> None:
    fewest = min(SAMPLE_TYPES, key=available_texts)
    assert available_texts(fewest) >= 5000
    for kind in SAMPLE_TYPES:
        count = available_texts(kind) if kind == fewest else 5000
        assert len(set(sample_texts(count, seed=1, proportions={kind: 1.0}))) == count


def test_equal_parts_of_every_type_by_default() -> None:
    texts = sample_texts(2000, seed=3)
    assert Counter(map(type_of, texts)) == dict.fromkeys(SAMPLE_TYPES, 500)
    assert len(set(texts)) == 2000


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_types_come_in_the_proportion_of_the_store(count: int) -> None:
    found = Counter(map(type_of, sample_texts(count, seed=3, proportions={"skill": 813, "tool": 187, "recipe": 50})))
    assert sum(found.values()) == count
    assert found["skill"] == pytest.approx(0.813 * count, abs=1)
    assert not found["lesson"]


@pytest.mark.parametrize("proportions", [{}, {"recipe": 3.0}, {"skill": 0.0}])
def test_a_store_without_known_types_gets_equal_parts(proportions: dict[str, float]) -> None:
    assert Counter(map(type_of, sample_texts(8, seed=3, proportions=proportions))) == dict.fromkeys(SAMPLE_TYPES, 2)


def test_the_seed_decides() -> None:
    assert sample_texts(100, seed=5) == sample_texts(100, seed=5)
    assert set(sample_texts(100, seed=5)) != set(sample_texts(100, seed=6))


def test_fewer_are_a_part_of_more() -> None:
    proportions = {"skill": 3.0, "lesson": 1.0}
    few, many = (set(sample_texts(count, seed=5, proportions=proportions)) for count in (400, 2000))
    assert few < many


def test_every_type_has_its_sentence_and_reads_like_a_units_text() -> None:
    names = {topic.name for topic in chain(*DOMAINS.values())} | set(DOMAINS)
    for text in sample_texts(400, seed=7):
        content, *tags, kind = text.rsplit(" ", 3)
        assert re.fullmatch(SHAPES[kind], content)
        assert set(tags) <= names
        assert unit_to_text({"content": content, "tags": tags, "type": kind}) == text


def test_all_domains_and_topics_occur() -> None:
    said = " ".join(sample_texts(2000, seed=9))
    assert list(DOMAINS) == ["technical", "conversational", "practical"]
    for topic in chain(*DOMAINS.values()):
        assert f" {topic.name} " in said


def test_no_phrase_is_listed_twice_in_a_domain() -> None:
    for topics in DOMAINS.values():
        for field in ("activities", "failures", "techniques", "gains", "tools", "chores", "factors"):
            phrases = list(chain(*(getattr(topic, field) for topic in topics)))
            assert len(phrases) == 6 * len(topics)
            assert len(set(phrases)) == len(phrases)
            assert all(re.fullmatch(r"[\w' -]+", phrase) for phrase in phrases)


@pytest.mark.parametrize(
    ("count", "proportions", "named"),
    [
        (-1, None, "count"),
        (10**6, None, "count"),
        (5, {"skill": -1.0}, "proportions"),
        (5, {"tool": float("nan")}, "proportions"),
        (5, {"tool": float("inf")}, "proportions"),
    ],
)
def test_bad_arguments_are_named(count: int, proportions: dict[str, float] | None, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        sample_texts(count, seed=1, proportions=proportions)
