"""Filters as the server sees them: exact where it can be, never too narrow, and without a word of the user's."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_fake import FakeMilvus, _Collection, _Json, _Schema

from memevolve_gpu.milvus.filters import (
    MAX_FACTS_BYTES,
    digits_above,
    digits_below,
    facts_of,
    filter_expression,
    ids_expression,
    joined,
    quoted,
)
from memevolve_gpu.records.filters import conditions_of, matches, parse

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([2**53, 2**53 + 1, 2**63, 2.0**63, -0.0, 0, 1, 1.0]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
KEYS = st.sampled_from(["a", "b", "é", 'q"', "x.y"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)
UNITS = st.dictionaries(KEYS, VALUES, max_size=4)
CONDITIONS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.sampled_from(["eq", "ne"]), SCALARS, min_size=1, max_size=2),
    st.dictionaries(st.sampled_from(["in", "nin"]), st.lists(SCALARS, max_size=4), min_size=1, max_size=2),
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), st.one_of(NUMBERS, TEXTS), min_size=1, max_size=2),
    st.fixed_dictionaries({"exists": st.booleans()}),
    st.dictionaries(st.sampled_from(["contains", "startswith", "ieq"]), TEXTS, min_size=1, max_size=1),
    st.fixed_dictionaries({"size": st.integers(0, 3)}),
    st.fixed_dictionaries({"all": st.lists(SCALARS, min_size=1, max_size=2)}),
)
PATHS = st.lists(st.sampled_from(["a", "b", "é", 'q"']), min_size=1, max_size=3).map(".".join)
FILTERS = st.recursive(
    st.dictionaries(PATHS, CONDITIONS, max_size=3),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"or": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries({"not": inner}),
        st.tuples(inner, inner).map(lambda two: {"and": list(two)}),
    ),
    max_leaves=4,
)


def server_matches(filters: Any, unit: dict[str, Any]) -> bool:
    """Does the expression hold of the unit's row?"""
    facts, vague = facts_of(unit)
    held = _Collection(_Schema(""))
    held.rows["x"] = {"facts": _Json(json.loads(json.dumps(facts))), "vague": vague, "born": 1, "id": "x"}
    return bool(held.matching(filter_expression(filters)))


def can_be_sure(filters: Any) -> bool:
    """Without ranges the expression means exactly what the filter does."""
    return all(one.op in ("in", "exists") for one in conditions_of(parse(filters).root))


@given(FILTERS, UNITS)
def test_no_unit_that_matches_is_missed_and_without_ranges_none_is_added(
    filters: dict[str, Any], unit: dict[str, Any]
) -> None:
    said, meant = server_matches(filters, unit), matches(filters, unit)
    assert said or not meant
    if can_be_sure(filters):
        assert said == meant


@given(FILTERS)
def test_an_expression_holds_nothing_but_our_words_and_hashes(filters: dict[str, Any]) -> None:
    bare = re.sub(r'"[0-9A-Za-z_-]*"', "X", filter_expression(filters))
    words = set(re.findall(r"[a-z_]+", bare)) - {"X"}
    assert words <= {"and", "or", "not", "json_contains_any", "facts", "vague", "true", "born"}
    assert set(bare) <= set("X()[]<>=, 0") | set("abcdefghijklmnopqrstuvwxyz_")


@given(NUMBERS, NUMBERS)
def test_digits_order_numbers(one: float, other: float) -> None:
    assert digits_below(one) <= digits_above(one)
    if one < other:
        assert digits_below(one) <= digits_above(other)
        assert digits_below(one) <= digits_below(other)
        assert digits_above(one) <= digits_above(other)


@given(TEXTS)
def test_a_quoted_text_is_plain_and_reads_as_the_text(text: str) -> None:
    literal = quoted(text)
    assert re.fullmatch(r'"([A-Za-z0-9 _.:/@-]|\\u[0-9a-f]{4}|\\U[0-9a-f]{8})*"', literal)
    assert eval(literal) == text


def test_parts_are_put_together_with_brackets() -> None:
    assert ids_expression(["a", 'b"']) == 'id in ["a", "b\\u0022"]'
    assert joined("", "a or b", "c") == "(a or b) and (c)"
    assert joined("", "") == ""


def test_a_unit_with_too_many_facts_is_let_through() -> None:
    facts, vague = facts_of({"many": list(range(3_000))})
    assert (facts, vague) == ({"has": []}, True)
    assert server_matches({"many": {"gt": 5_000}}, {"many": list(range(3_000))})
    facts, vague = facts_of({"few": list(range(100))})
    assert not vague
    assert len(json.dumps(facts)) < MAX_FACTS_BYTES


@pytest.mark.parametrize(("filters", "nothing"), [({"a": []}, True), ({"a": {"nin": []}}, False), ({}, False)])
def test_filters_that_match_nothing_or_all(filters: dict[str, Any], *, nothing: bool) -> None:
    assert filter_expression(filters) == ("born < 0" if nothing else "")


def test_the_fake_server_refuses_what_the_real_one_does() -> None:
    client = FakeMilvus().connect(1.0)
    with pytest.raises(ConnectionError, match="not found"):
        client.describe_collection("none", timeout=1.0)
