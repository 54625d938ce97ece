"""What the LangChain adapter computes, each against a reference: filters, scores, maximal marginal relevance."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from support import SEED, each

pytest.importorskip("langchain_core", reason="langchain-core is not installed: pip install 'memevolve-gpu[langchain]'")

from langchain_core.documents import Document
from langchain_core.vectorstores.utils import maximal_marginal_relevance as theirs
from langchain_kit import Plain, Words, documents

from memevolve_gpu.errors import InvalidFilterError, InvalidQueryError
from memevolve_gpu.integrations.langchain import MemEvolveVectorStore, maximal_marginal_relevance, relevance
from memevolve_gpu.integrations.langchain.filters import on_units

CONFIG = {"background": False}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemEvolveVectorStore]:
    with MemEvolveVectorStore.open(tmp_path / "m", Words(), storage_config=CONFIG) as one:
        yield one


# Filters

RANGES: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


def wanted(condition: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """What a filter in LangChain's form means, of metadata without lists; written again, with no word of ours."""
    for key, value in condition.items():
        if key == "$and":
            holds = all(wanted(one, metadata) for one in value)
        elif key == "$or":
            holds = any(wanted(one, metadata) for one in value)
        elif key == "$not":
            holds = not wanted(value, metadata)
        elif isinstance(value, dict):
            holds = all(compared(name, operand, key, metadata) for name, operand in value.items())
        else:
            holds = compared("$in" if isinstance(value, list) else "$eq", value, key, metadata)
        if not holds:
            return False
    return True


def compared(name: str, operand: Any, key: str, metadata: Mapping[str, Any]) -> bool:
    there, value = key in metadata, metadata.get(key)
    if name == "$exists":
        return there is operand
    if name in RANGES:
        alike = isinstance(value, str) is isinstance(operand, str) and not isinstance(value, bool | None)
        return there and alike and RANGES[name](value, operand)
    among = operand if name in ("$in", "$nin") else [operand]
    equal = there and any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in among)
    return equal if name in ("$eq", "$in") else not equal


KEYS = ["a", "b", "c"]
VALUES = st.sampled_from([0, 1, 2, 2.0, -1.5, True, False, None, "", "x", "y' OR '1'='1", "$eq", "2"])
ORDERED = st.sampled_from([0, 1, 2.5, "", "x", "y' OR '1'='1"])
METADATA = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)
OPERATORS = (
    st.one_of(
        st.fixed_dictionaries({}, optional={"$eq": VALUES, "$ne": VALUES}),
        st.fixed_dictionaries({}, optional={"$in": st.lists(VALUES, max_size=3), "$nin": st.lists(VALUES, max_size=3)}),
        st.fixed_dictionaries({}, optional=dict.fromkeys(RANGES, ORDERED)),
        st.fixed_dictionaries({"$exists": st.booleans()}),
    )
    .filter(bool)
    .map(dict)
)
LEAVES = st.dictionaries(
    st.sampled_from(KEYS), st.one_of(VALUES, st.lists(VALUES, max_size=3), OPERATORS), min_size=1, max_size=2
)
FILTERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"$or": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries({"$and": st.lists(inner, max_size=2)}),
        st.fixed_dictionaries({"$not": inner}),
        st.tuples(LEAVES, st.lists(inner, min_size=1, max_size=2)).map(lambda pair: {**pair[0], "$or": pair[1]}),
    ),
    max_leaves=4,
)
SAMPLE: list[dict[str, Any]] = [
    {},
    *({"a": value} for value in (0, 1, 2, 2.5, -1.5, True, False, None, "", "x", "y' OR '1'='1", "$eq", "2")),
    *({"a": one, "b": other} for one in (0, "x", True, None) for other in (1, "x", False)),
    *({"b": one, "c": other} for one in (0, "x", 2) for other in (1, None, "")),
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemEvolveVectorStore]:
    with MemEvolveVectorStore.open(tmp_path_factory.mktemp("m") / "m", Words(), storage_config=CONFIG) as store:
        store.add_texts([f"number w{n}" for n in range(len(SAMPLE))], SAMPLE, ids=[str(n) for n in range(len(SAMPLE))])
        yield store


@settings(max_examples=300)
@given(condition=FILTERS)
def test_a_filter_finds_what_it_means_and_nothing_else(filled: MemEvolveVectorStore, condition: dict[str, Any]) -> None:
    expected = {str(n) for n, metadata in enumerate(SAMPLE) if wanted(condition, metadata)}
    found = filled.similarity_search_with_score("number w3", k=len(SAMPLE), filter=condition)
    assert {document.id for document, _ in found} == expected
    assert len(found) == len(expected)
    distances = [distance for _, distance in found]
    assert distances == sorted(distances)
    near = filled.similarity_search("number w3", k=2, filter=condition)
    assert len(near) == min(2, len(expected))


def test_or_gives_the_nearest_of_all_alternatives(store: MemEvolveVectorStore) -> None:
    store.add_documents(documents(40))
    either = {"$or": [{"n": {"$lt": 10}}, {"n": {"$gte": 35}}, {"n": 5}]}
    found = store.similarity_search_with_score("number w5", k=6, filter=either)
    every = store.similarity_search_with_score("number w5", k=40)
    expected = [pair for pair in every if pair[0].metadata["n"] < 10 or pair[0].metadata["n"] >= 35][:6]
    assert [document.metadata for document, _ in found] == [document.metadata for document, _ in expected]
    assert [distance for _, distance in found] == pytest.approx([distance for _, distance in expected])


def test_both_forms_of_filters_hold_together(store: MemEvolveVectorStore) -> None:
    store.add_documents(documents(10))
    found = store.similarity_search(
        "number", k=10, filter={"n": {"gte": 2}}, filters={"metadata.n": {"lt": 5}, "id": {"exists": True}}
    )
    assert sorted(document.metadata["n"] for document in found) == [2, 3, 4]
    assert store.similarity_search("number", filters={"metadata.n": [7]})[0].metadata == {"n": 7}


def test_filters_on_units() -> None:
    assert on_units(None) == {"and": []}
    assert on_units({"a": 1, "b.c": [1, 2]}) == {"and": [{"metadata.a": 1, "metadata.b.c": [1, 2]}]}
    assert on_units({"$or": [{"a": {"$gt": 1}}, {"$not": {"b": 2}}]}, {"type": "x"}) == {
        "and": [{"$or": [{"metadata.a": {"$gt": 1}}, {"$not": {"metadata.b": 2}}]}, {"type": "x"}]
    }


DEEP: dict[str, Any] = {"a": 1}
for _ in range(30):
    DEEP = {"$and": [DEEP]}
CIRCLE: dict[str, Any] = {}
CIRCLE["$or"] = [CIRCLE]
WIDE = {"$and": [{"$or": [{f"k{n}": 1}, {f"k{n}": 2}]} for n in range(60)]}


@each(
    ("condition", "message"),
    [
        ("a = 1", "must be a mapping"),
        ([("a", 1)], "must be a mapping"),
        (lambda document: True, "must be a mapping"),
        ({"$or": {"a": 1}}, "list of filters"),
        ({"$or": "ab"}, "list of filters"),
        ({"$and": [1]}, "must be a mapping"),
        ({"a": {"name": "x"}}, r"a\.name"),
        ({"a": {}}, "no operator"),
        ({"a": {"$gt": True}}, "gt"),
        ({"a": {"$in": 3}}, "in takes a list"),
        ({"a": {"$eq": {"b": 1}}}, "eq"),
        ({"a": float("nan")}, "nan"),
        ({"a": b"bytes"}, "bytes"),
        ({"a": {1, 2}}, "set"),
        ({1: "a"}, "key must be a string"),
        ({"": 1}, "empty"),
        ({"a..b": 1}, "empty"),
        (DEEP, "deep"),
        (CIRCLE, "deep"),
        ({"$nand": []}, "unknown"),
        ({"a": {"$near": "x"}}, r"unknown operator '\$near'"),
        (WIDE, "split the query"),
        ({"a": ["x"] * 40_000}, "values"),
        ({"\ud800": 1}, "surrogate"),
    ],
)
def test_what_is_no_filter_is_refused_with_its_key(store: MemEvolveVectorStore, condition: Any, message: str) -> None:
    ids = store.add_documents(documents(2))
    with pytest.raises(InvalidFilterError, match=message):
        store.similarity_search("number", filter=condition)
    with pytest.raises(InvalidFilterError, match=message):
        store.max_marginal_relevance_search("number", filter=condition)
    with pytest.raises(InvalidFilterError, match=message):
        store.delete(filter=condition)
    assert len(store.get_by_ids(ids)) == 2


def test_filters_of_ours_are_judged_by_the_backend(store: MemEvolveVectorStore) -> None:
    store.add_documents(documents(2))
    with pytest.raises(InvalidFilterError, match=r"filters\[0\] must be a mapping"):
        store.similarity_search("number", filters=[1])


# Relevance

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@settings(max_examples=300)
@given(one=FINITE, other=FINITE)
def test_relevance_lies_between_0_and_1_and_never_grows_with_the_distance(
    metric: str, one: float, other: float
) -> None:
    nearer, farther = sorted((one, other))
    assert 0.0 <= relevance(farther, metric) <= relevance(nearer, metric) <= 1.0


@each(
    ("metric", "distance", "expected"),
    [
        ("l2", 0, 1),
        ("l2", 1, 0.5),
        ("l2", 3, 0.25),
        ("cosine", 0, 1),
        ("cosine", 1, 0.5),
        ("cosine", 2, 0),
        ("cosine", -1e-7, 1),
        ("ip", 0, 0.5),
        ("ip", -1, 0.75),
        ("ip", 1, 0.25),
        ("ip", -9, 0.95),
    ],
)
def test_relevance_of_known_distances(metric: str, distance: float, expected: float) -> None:
    assert relevance(distance, metric) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scores_of_real_searches_lie_between_0_and_1(tmp_path: Path, metric: str, scale: float) -> None:
    rng = np.random.default_rng(SEED)
    vectors = rng.standard_normal((40, 16)) * scale
    words = Words()
    words.embed_query = lambda text: (rng.standard_normal(16) * scale).tolist()  # type: ignore[method-assign]
    with MemEvolveVectorStore.open(tmp_path / "m", words, storage_config={**CONFIG, "metric": metric}) as store:
        store.add_embeddings([(str(n), vector.tolist()) for n, vector in enumerate(vectors)])
        for _ in range(5):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # LangChain warns of scores outside
                scores = [score for _, score in store.similarity_search_with_relevance_scores("x", k=40)]
            assert len(scores) == 40
            assert scores == sorted(scores, reverse=True)
            assert len(set(scores)) > 30
            threshold = scores[10]
            above = store.similarity_search_with_relevance_scores("x", k=40, score_threshold=threshold)
            assert all(score >= threshold for _, score in above)


@pytest.mark.parametrize(("metric", "expected"), [("l2", 2.0), ("cosine", 1.0), ("ip", 0.0)])
def test_scores_are_distances_by_the_metric(tmp_path: Path, metric: str, expected: float) -> None:
    with MemEvolveVectorStore.open(tmp_path / "m", Words(4), storage_config={**CONFIG, "metric": metric}) as store:
        store.add_embeddings([("a", [1, 0, 0, 0])])
        ((_, distance),) = store.similarity_search_with_score_by_vector([0, 1, 0, 0])
        assert distance == pytest.approx(expected, abs=1e-6)
        assert type(distance) is float


def test_a_relevance_function_of_the_callers_own() -> None:
    store = MemEvolveVectorStore(Plain(), Words(), relevance_score_fn=lambda distance: math.exp(-distance))
    store.add_texts(["alpha", "beta"])
    ((_, best), (_, other)) = store.similarity_search_with_relevance_scores("alpha", k=2)
    ((_, _), (_, distance)) = store.similarity_search_with_score("alpha", k=2)
    assert best == pytest.approx(1)
    assert other == pytest.approx(math.exp(-distance))


# Maximal marginal relevance


def by_definition(query: Any, vectors: Any, k: int, share: float) -> list[int]:
    def cosine(one: Any, other: Any) -> float:
        return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))

    chosen: list[int] = []
    while len(chosen) < min(k, len(vectors)):
        worth = {}
        for row in set(range(len(vectors))) - set(chosen):
            like = cosine(query, vectors[row])
            again = max((cosine(vectors[row], vectors[other]) for other in chosen), default=None)
            worth[row] = like if again is None else share * like - (1 - share) * again
        chosen.append(max(sorted(worth), key=worth.__getitem__))
    return chosen


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("count", "dim", "k"), [(1, 3, 1), (5, 4, 9), (30, 8, 10), (60, 32, 20)])
def test_marginal_relevance_agrees_with_its_definition_and_with_langchain(
    share: float, count: int, dim: int, k: int
) -> None:
    rng = np.random.default_rng(SEED + count)
    for scale in (1e-3, 1.0, 1e3):
        vectors, query = rng.standard_normal((count, dim)) * scale, rng.standard_normal(dim)
        chosen = maximal_marginal_relevance(query, vectors, k, share)
        assert chosen == by_definition(query, vectors, k, share)
        assert chosen == theirs(query, [row.tolist() for row in vectors], share, k)


def test_marginal_relevance_at_the_edges() -> None:
    assert maximal_marginal_relevance([1.0, 0.0], [], 3) == []
    assert maximal_marginal_relevance([1.0, 0.0], [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], 9) == [1, 0, 2]
    assert maximal_marginal_relevance([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], 2) == [0, 1]
    huge = [[1e38, 0.0], [1e38, 1e38], [0.0, 1e38]]
    assert maximal_marginal_relevance([1.0, 0.1], huge, 2, 0.3) == [0, 2]
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidQueryError, match="lambda_mult"):
            maximal_marginal_relevance([1.0], [[1.0]], 1, share)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_a_store_chooses_from_the_nearest_that_were_asked_for(tmp_path: Path, metric: str) -> None:
    rng = np.random.default_rng(SEED)
    vectors, query = rng.standard_normal((80, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    with MemEvolveVectorStore.open(tmp_path / "m", Words(8), storage_config={**CONFIG, "metric": metric}) as store:
        store.add_embeddings([(str(n), row.tolist()) for n, row in enumerate(vectors)])
        for k, fetch_k, share in ((5, 20, 0.5), (5, 3, 0.5), (10, 80, 0.1), (100, 100, 0.7)):
            near = store.similarity_search_by_vector(query.tolist(), k=max(k, fetch_k))
            pool = [int(document.page_content) for document in near]
            expected = [pool[row] for row in theirs(query, [vectors[n].tolist() for n in pool], share, k)]
            found = store.max_marginal_relevance_search_by_vector(query.tolist(), k, fetch_k, share)
            assert [int(document.page_content) for document in found] == expected


def test_variety_leaves_out_what_was_said_already(store: MemEvolveVectorStore) -> None:
    texts = ["git rebase onto main"] * 5 + ["git stash pop", "docker build cache"]
    store.add_documents([Document(page_content=text, metadata={"even": n % 2 == 0}) for n, text in enumerate(texts)])
    alike = store.similarity_search("git rebase onto main", k=3)
    varied = store.max_marginal_relevance_search("git rebase onto main", k=3, fetch_k=7, lambda_mult=0.3)
    assert {document.page_content for document in alike} == {texts[0]}
    assert {document.page_content for document in varied} == set(texts)
    kept = store.max_marginal_relevance_search("git rebase", k=9, filter={"even": False})
    assert [document.metadata for document in kept] == [{"even": False}] * 3
