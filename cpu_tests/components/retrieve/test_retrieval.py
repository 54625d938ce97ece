"""Retrieval by meaning, by words and by both, on a store and on a plain backend."""

from __future__ import annotations

import gzip
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_kit import Given, open_scratch, store_at, unit
from support import FakeEmbedder, each

from memevolve_gpu import HalfLife, MemorySystem, MemorySystemConfig, VectorStore
from memevolve_gpu.components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    Ranking,
    RetrievalContext,
    RetrievalMetrics,
    RetrievalResult,
    RetrievalStrategy,
    SemanticRetrievalStrategy,
    strategies,
)
from memevolve_gpu.components.retrieve.strategies import Ranked, reciprocal_ranks, weighted
from memevolve_gpu.components.store import StorageBackend
from memevolve_gpu.components.store import ranking as ranking_module
from memevolve_gpu.errors import ConfigurationError, EmbeddingError, InvalidFilterError, InvalidQueryError
from memevolve_gpu.utils.timestamps import parse_stamp

VECTORS = {
    "undo": [1.0, 0.0, 0.0],
    "revert": [0.9, 0.4359, 0.0],
    "pack": [0.0, 1.0, 0.0],
    "mend": [0.6, 0.0, 0.8],
    "question": [0.8, 0.6, 0.0],
}
UNITS = [
    unit("u", "undo a commit", tags=["git"], metadata={"part": 1}),
    unit("r", "revert a merge commit", tags=["git"], metadata={"part": 2}),
    unit("p", "pack files with tar", tags=["tar"], metadata={"part": 3}),
    unit("m", "mend a broken question mark", tags=["text"], metadata={"part": 4}),
]


@pytest.fixture(params=["store", "plain"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageBackend]:
    if request.param == "plain":
        scratch = open_scratch()
        scratch.store_batch(UNITS)
        yield scratch
    else:
        with store_at(tmp_path, Given(VECTORS), metric="cosine") as store:
            store.store_batch(UNITS)
            yield store


def semantic(**options: Any) -> SemanticRetrievalStrategy:
    return SemanticRetrievalStrategy(Given(VECTORS), **options)


def hybrid(**options: Any) -> HybridRetrievalStrategy:
    return HybridRetrievalStrategy(Given(VECTORS), **options)


STRATEGIES: dict[str, Callable[[], RetrievalStrategy]] = {
    "semantic": semantic,
    "keyword": KeywordRetrievalStrategy,
    "hybrid": hybrid,
}


def ids(results: list[RetrievalResult]) -> list[str]:
    return [one.unit_id for one in results]


# --- each strategy --------------------------------------------------------------------------------------------------


def test_by_meaning_the_nearest_come_first(backend: StorageBackend) -> None:
    results = semantic().retrieve("question of reverting", backend, 3)
    assert ids(results) == ["r", "u", "p"]
    assert results[0].score == pytest.approx(0.9 * 0.8 + 0.4359 * 0.6, abs=1e-3)
    assert results[0].metadata == {"distance": pytest.approx(1 - results[0].score, abs=1e-5)}
    assert results[0].unit == backend.retrieve("r")


def test_by_words_the_rarest_count_most(backend: StorageBackend) -> None:
    strategy = KeywordRetrievalStrategy()
    assert ids(strategy.retrieve("merge commit", backend)) == ["r", "u"]
    assert ids(strategy.retrieve("nowhere", backend)) == []
    assert ids(strategy.retrieve("TAR", backend)) == ["p"]


def test_both_together_find_what_either_finds(backend: StorageBackend) -> None:
    results = hybrid().retrieve("question mark", backend, 4)
    assert ids(results) == ["m", "r", "u", "p"]
    marked = results[0]
    assert marked.metadata is not None
    cosine = 0.8 * 0.6
    assert marked.metadata["semantic_score"] == pytest.approx(cosine, abs=1e-3)
    assert (marked.metadata["semantic_rank"], marked.metadata["keyword_rank"]) == (3, 0)
    words = marked.metadata["keyword_score"]
    assert 0.5 < words <= 1.0
    assert marked.score == pytest.approx(0.5 * cosine + 0.5 * words, abs=1e-3)
    assert results[1].metadata == {
        "semantic_score": pytest.approx(0.9815, abs=1e-3),
        "keyword_score": None,
        "semantic_rank": 0,
        "keyword_rank": None,
    }


def test_ranks_can_be_fused_instead_of_scores(backend: StorageBackend) -> None:
    results = hybrid(fusion="rrf").retrieve("question mark", backend, 4)
    assert ids(results) == ["m", "r", "u", "p"]
    assert results[0].score == pytest.approx((61 / 64 + 1) / 2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_filters_are_pushed_down(backend: StorageBackend, name: str) -> None:
    strategy = STRATEGIES[name]()
    query = "question commit tar mark"
    for filters, allowed in (
        ({"tags": "git"}, {"u", "r"}),
        ({"metadata.part": {"gte": 3}}, {"p", "m"}),
        ({"type": "skill"}, set()),
    ):
        found = ids(strategy.retrieve(query, backend, 10, filters))
        assert set(found) == allowed
        assert len(found) == len(set(found))
    with pytest.raises(InvalidFilterError):
        strategy.retrieve(query, backend, 10, {"tags": {"near": "g"}})


@each("name", STRATEGIES)
@each(("query", "top_k"), [(7, 5), (None, 5), ("x", 0), ("x", 1.5), ("x", True)])
def test_questions_without_a_meaning_are_refused(backend: StorageBackend, name: str, query: Any, top_k: Any) -> None:
    with pytest.raises(InvalidQueryError, match=r"query|top_k"):
        STRATEGIES[name]().retrieve(query, backend, top_k)


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_is_found_in_nothing(tmp_path: Path, name: str) -> None:
    with store_at(tmp_path) as empty:
        for backend in (empty, open_scratch()):
            assert STRATEGIES[name]().retrieve("anything", backend) == []
            assert STRATEGIES[name]().count_relevant("anything", backend) == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_search_and_units_by_id(backend: StorageBackend, name: str) -> None:
    strategy = STRATEGIES[name]()
    assert strategy.search("commit", backend, 2) == strategy.retrieve("commit", backend, 2)
    results = strategy.retrieve_by_ids(["p", "no such", "u", "p"], backend)
    assert [(one.unit_id, one.score) for one in results] == [("p", 1.0), ("u", 1.0)]


def test_what_falls_short_of_the_threshold_is_left_out(backend: StorageBackend) -> None:
    assert ids(semantic(similarity_threshold=0.7).retrieve("question", backend)) == ["r", "u"]
    assert semantic(similarity_threshold=0.7).count_relevant("question", backend) == 2
    assert semantic().count_relevant("question", backend) == 4
    assert ids(hybrid(similarity_threshold=0.45).retrieve("question mark", backend)) == ["m", "r"]
    assert hybrid(similarity_threshold=0.45).count_relevant("question mark", backend) == 2
    assert KeywordRetrievalStrategy().count_relevant("commit", backend) == 2


def test_a_store_embeds_by_itself(tmp_path: Path) -> None:
    with store_at(tmp_path, Given(VECTORS)) as store:
        store.store_batch(UNITS)
        assert ids(SemanticRetrievalStrategy().retrieve("question", store, 1)) == ["r"]
        assert ids(HybridRetrievalStrategy().retrieve("undo", store, 1)) == ["u"]


def test_a_backend_without_an_index_needs_an_embedding_function() -> None:
    plain = open_scratch()
    plain.store_batch(UNITS)
    for strategy in (SemanticRetrievalStrategy(), HybridRetrievalStrategy()):
        with pytest.raises(EmbeddingError, match="ScratchStore cannot search by meaning"):
            strategy.retrieve("question", plain)
    with pytest.raises(EmbeddingError, match="callable"):
        SemanticRetrievalStrategy(3)  # type: ignore[arg-type]


def test_a_plain_backend_s_texts_are_embedded_once() -> None:
    plain, given = open_scratch(), Given(VECTORS)
    plain.store_batch(UNITS)
    strategy = SemanticRetrievalStrategy(given)
    for _ in range(3):
        strategy.retrieve("question", plain)
    assert len(given.texts) == len(UNITS) + 1


def test_a_service_that_fails_is_named(tmp_path: Path) -> None:
    def fail(_text: str) -> Any:
        raise OSError("gone")

    with VectorStore(tmp_path / "m", fail, 4, storage_config={"background": False}) as store:
        store.store_batch([unit("a")], np.ones((1, 4)))
        for strategy in (SemanticRetrievalStrategy(), HybridRetrievalStrategy()):
            with pytest.raises(EmbeddingError, match="gone"):
                strategy.retrieve("a", store)
        assert ids(KeywordRetrievalStrategy().retrieve("a", store)) == ["a"]


def test_only_what_is_given_out_counts_as_read(tmp_path: Path) -> None:
    with store_at(tmp_path, Given(VECTORS)) as store:
        store.store_batch([*UNITS, *(unit(f"x{n}", f"commit {n}") for n in range(20))])
        found = HybridRetrievalStrategy().retrieve("undo commit", store, 2)
        order = store.access_order("lru", 100)
        assert set(order[-2:]) == set(ids(found))
        assert order[0] == next(one["id"] for one in store.units() if one["id"] not in ids(found))
        SemanticRetrievalStrategy(similarity_threshold=0.99).retrieve("pack", store, 5)
        assert store.access_order("lru", 100)[-1] == "p"
        KeywordRetrievalStrategy().retrieve("mark", store)
        assert store.access_order("lru", 100)[-1] == "m"
        HybridRetrievalStrategy().retrieve_by_ids(["r"], store)
        assert store.access_order("lru", 100)[-1] == "r"


def test_units_deleted_while_they_are_fused_are_passed_over(tmp_path: Path) -> None:
    class Vanishing(VectorStore):
        def similarities(self, query: str, ids: Any) -> dict[str, float]:
            found = super().similarities(query, ids)
            self.delete("r")
            return found

    with Vanishing(tmp_path / "m", Given(VECTORS), storage_config={"background": False}) as store:
        store.store_batch(UNITS)
        assert ids(HybridRetrievalStrategy().retrieve("question", store, 2)) == ["m", "u"]


# --- fusion ---------------------------------------------------------------------------------------------------------


def test_weighted_fusion_by_hand() -> None:
    near = [Ranked("a", 0.9), Ranked("b", 0.5), Ranked("c", -0.2)]
    words = [Ranked("b", 1.0), Ranked("d", 0.5)]
    fused = weighted(near, words, (0.7, 0.3), {"d": 0.4})
    assert {one.id: round(one.score, 6) for one in fused} == {"a": 0.63, "b": 0.65, "c": 0.0, "d": 0.43}
    assert [one.id for one in fused] == ["b", "a", "d", "c"]
    assert weighted([], [], (0.7, 0.3), {}) == []
    assert [one.score for one in weighted(near[:1], [], (0.7, 0.3), {})] == [pytest.approx(0.63)]


def test_reciprocal_ranks_by_hand() -> None:
    fused = reciprocal_ranks([Ranked("a", 9), Ranked("b", 8)], [Ranked("b", 1), Ranked("c", 0.5)])
    scores = {one.id: one.score for one in fused}
    assert scores == {
        "a": pytest.approx(0.5),
        "b": pytest.approx((61 / 62 + 1) / 2),
        "c": pytest.approx(61 / 62 / 2),
    }
    assert [one.id for one in fused] == ["b", "a", "c"]


def test_weights_are_shares_of_their_sum() -> None:
    strategy = HybridRetrievalStrategy(semantic_weight=3, keyword_weight=1)
    assert (strategy.semantic_weight, strategy.keyword_weight) == (0.75, 0.25)
    for weights in ((0, 0), (-1, 2), (float("nan"), 1), (float("inf"), 1)):
        with pytest.raises(ConfigurationError, match="semantic_weight"):
            strategy.set_weights(*weights)
    assert (strategy.semantic_weight, strategy.keyword_weight) == (0.75, 0.25)
    with pytest.raises(ConfigurationError, match="fusion"):
        HybridRetrievalStrategy(fusion="max")  # type: ignore[arg-type]


def test_extreme_weights_leave_one_half_alone(backend: StorageBackend) -> None:
    words = hybrid(semantic_weight=0, keyword_weight=1).retrieve("question mark", backend, 1)
    near = hybrid(semantic_weight=1, keyword_weight=0).retrieve("question mark", backend, 1)
    assert (ids(words), ids(near)) == (["m"], ["r"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SemanticRetrievalStrategy(similarity_threshold=0.4), SemanticRetrievalStrategy()),
        (
            HybridRetrievalStrategy(None, 3, 1, 0.2, fusion="rrf", neighbours=0.3, diversity=0.2),
            HybridRetrievalStrategy(),
        ),
        (KeywordRetrievalStrategy(), KeywordRetrievalStrategy()),
    ],
)
def test_state_is_handed_over(one: RetrievalStrategy, other: RetrievalStrategy) -> None:
    state = json.loads(json.dumps(one.save_state()))
    other.restore_state(state)
    assert other.save_state() == one.save_state()


# --- the context ----------------------------------------------------------------------------------------------------


def test_the_context_fills_in_defaults_and_keeps_figures(backend: StorageBackend) -> None:
    context = RetrievalContext(KeywordRetrievalStrategy(), default_top_k=1, default_filters={"tags": "git"})
    assert ids(context.retrieve("undo tar", backend)) == ["u"]
    assert ids(context.search("tar", backend, 3, {})) == ["p"]
    assert context.count_relevant("commit tar", backend) == 2
    assert ids(context.retrieve_by_ids(["m"], backend)) == ["m"]
    context.set_strategy(semantic())
    context.retrieve("question", backend, 2)
    with pytest.raises(InvalidQueryError):
        context.retrieve("question", backend, 0)
    history = context.get_retrieval_history()
    assert history[-1]["query"] == "question"
    assert history[-1]["results_count"] == 2
    assert history[-1]["filters"] == {"tags": "git"}
    assert context.metrics is not None
    summary = context.metrics.summary()
    assert summary["SemanticRetrievalStrategy"]["queries"] == 2
    assert summary["SemanticRetrievalStrategy"]["failures"] == 1
    assert summary["SemanticRetrievalStrategy"]["mean_results"] == 2
    assert 0 < summary["KeywordRetrievalStrategy"]["p50_ms"] <= summary["KeywordRetrievalStrategy"]["p99_ms"]
    context.clear_history()
    context.metrics.clear()
    assert (context.get_retrieval_history(), context.metrics.summary()) == ([], {})


def test_what_the_context_remembers_is_bounded(backend: StorageBackend) -> None:
    context = RetrievalContext(KeywordRetrievalStrategy(), enable_metrics=False)
    assert context.metrics is None
    for number in range(1100):
        context.retrieve(f"w{number}", backend)
    history = context.get_retrieval_history()
    assert len(history) == 1000
    assert history[-1]["query"] == "w1099"


def test_metrics_of_many_threads_add_up() -> None:
    metrics = RetrievalMetrics()

    def work() -> None:
        for number in range(500):
            metrics.record("s", 0.001, None if number % 5 == 0 else number % 2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = metrics.summary()["s"]
    assert (summary["queries"], summary["failures"], summary["empty"]) == (2000, 400, 800)
    assert summary["p50_ms"] == pytest.approx(1.0)


# --- by age and importance ------------------------------------------------------------------------------------------


def rated(count: int) -> list[dict[str, Any]]:
    rng = random.Random(5)
    words = [f"word{n}" for n in range(30)]
    return [
        {
            "id": f"u{n}",
            "content": " ".join(rng.choices(words, k=6)),
            "metadata": {
                "created_at": f"2026-{rng.randrange(1, 12):02d}-{rng.randrange(1, 28):02d}T00:00:00Z",
                **({} if n % 7 == 0 else {"importance": rng.random()}),
            },
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("on", ["store", "plain"])
@pytest.mark.parametrize("name", ["semantic", "keyword", "hybrid"])
def test_ranking_is_that_of_a_full_scan(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: str, name: str
) -> None:
    monkeypatch.setattr(ranking_module, "_FIRST", 4)
    monkeypatch.setattr(strategies, "POOL", 4)
    embedder, units = FakeEmbedder(16), rated(120)
    backend: StorageBackend = open_scratch()
    if on == "store":
        backend = opened = store_at(tmp_path, embedder, metric="cosine")
        request.addfinalizer(opened.close)
    backend.store_batch(units)
    now = 1_796_000_000.0
    ranking = Ranking(HalfLife("60d", now=now), "metadata.importance", {"recency": 0.8})

    def make(ranking: Ranking | None) -> RetrievalStrategy:
        if name == "keyword":
            return KeywordRetrievalStrategy(ranking=ranking)
        kind = SemanticRetrievalStrategy if name == "semantic" else HybridRetrievalStrategy
        return kind(embedder, ranking=ranking)

    for question in ("word3 word7", "word1 word2 word5 word8", "word29"):
        every = make(None).retrieve(question, backend, 120)
        expected = []
        for one in every:
            stamp = parse_stamp(one.unit["metadata"]["created_at"])
            assert stamp is not None
            decay = 0.2 + 0.8 * 0.5 ** (max(0.0, now - stamp) / (60 * 86_400))
            score = max(0.0, one.score) if name == "semantic" else one.score
            expected.append((score * decay * one.unit["metadata"].get("importance", 0.5), one.unit_id))
        expected.sort(key=lambda pair: -pair[0])
        wanted = expected[: min(5, len(expected))]
        for strategy in (make(ranking), make(None).ranked_by(ranking)):
            found = strategy.retrieve(question, backend, 5)
            assert [one.score for one in found] == pytest.approx([score for score, _ in wanted], rel=1e-5)
            assert [one.unit_id for one in found] == [unit_id for _, unit_id in wanted]
        if name == "keyword" and on == "store":
            options = ranking.options
            assert [unit_id for _, unit_id in backend.search_keywords(question, 5, **options)] == [
                unit_id for _, unit_id in wanted
            ]
        system = MemorySystem(MemorySystemConfig(storage_backend=backend, retrieval_strategy=make(None)))
        assert [unit["id"] for unit in system.query_memory(question, 5, **ranking.options)] == [
            one for _, one in wanted
        ]


def test_a_strategy_that_cannot_rank_says_so(backend: StorageBackend) -> None:
    class Newest(RetrievalStrategy):
        def retrieve(self, *_: Any, **__: Any) -> list[RetrievalResult]:
            return []

        def count_relevant(self, *_: Any, **__: Any) -> int:
            return 0

    with pytest.raises(InvalidQueryError, match="Newest does not rank"):
        RetrievalContext(Newest()).retrieve("x", backend, ranking=Ranking(HalfLife("1d")))
    for half_life in ("30", "-1d", 0, "30 years", None, float("nan")):
        with pytest.raises(InvalidQueryError, match="half-life"):
            HalfLife(half_life)  # type: ignore[arg-type]


# --- on real units --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_together_find_real_units_at_least_as_often_as_either_alone(shared_data: Path, tmp_path: Path) -> None:
    """At the scale of a test: the units from which 300 queries were taken, among 3,000 others."""
    with gzip.open(shared_data / "tldr_queries.jsonl.gz", "rt") as lines:
        queries = [json.loads(line) for line in lines][:300]
    with gzip.open(shared_data / "tldr_units.jsonl.gz", "rt") as lines:
        units = [json.loads(line) for line in lines]
    vectors = np.load(shared_data / "tldr_minilm_f16.npy", mmap_mode="r")
    asked = np.load(shared_data / "tldr_queries_minilm_f16.npy").astype(np.float32)
    rows = sorted({query["unit_row"] for query in queries} | set(range(0, len(units), 13)))
    table = {query["query"]: asked[at] for at, query in enumerate(queries)}
    settings = {"background": False}
    with VectorStore(tmp_path / "m", table.__getitem__, 384, storage_config=settings) as store:
        store.store_batch([{**units[at], "id": str(at)} for at in rows], np.asarray(vectors[rows], np.float32))
        store.run_maintenance()
        hits = {}
        for strategy in (SemanticRetrievalStrategy(), KeywordRetrievalStrategy(), HybridRetrievalStrategy()):
            found = [ids(strategy.retrieve(query["query"], store, 5)) for query in queries]
            pairs = zip(queries, found, strict=True)
            hits[type(strategy).__name__] = sum(str(query["unit_row"]) in names for query, names in pairs)
    assert hits["HybridRetrievalStrategy"] >= max(hits.values())
    assert hits["HybridRetrievalStrategy"] > 0.95 * len(queries)


def test_frequent_words_alone_lift_nothing_past_a_threshold(tmp_path: Path) -> None:
    texts = [f"{word}{n} is what the team uses for the {word}" for word in ("alpha", "beta") for n in range(60)]
    with store_at(tmp_path, Given({"what": [1.0], "alpha0": [0, 1.0]})) as store:
        store.store_batch([unit(f"u{n}", text) for n, text in enumerate(texts)])
        found = HybridRetrievalStrategy().retrieve("what is the", store, top_k=5)
        assert max((one.metadata or {})["semantic_score"] for one in found) < 0.9
        lifted = [one.score - 0.5 * max(0.0, (one.metadata or {})["semantic_score"]) for one in found]
        assert max(lifted) < 0.05


@pytest.mark.parametrize("query", ["how do I bake a bread in the oven", "what is in the", "is it on the"])
def test_stop_words_lift_no_unrelated_unit(tmp_path: Path, query: str) -> None:
    texts = ["the server is in a rack on the left", "backups run every night", "use tabs, never spaces"]
    with store_at(tmp_path, Given({query: [0, 1.0]})) as store:
        store.store_batch([unit(f"u{n}", text) for n, text in enumerate(texts)])
        found = HybridRetrievalStrategy().retrieve(query, store)
        scores = {one.unit_id: one.score - 0.5 * max(0.0, one.metadata["semantic_score"]) for one in found}  # type: ignore[index]
        assert scores["u0"] < 0.2


def test_a_score_does_not_depend_on_what_else_is_found(tmp_path: Path) -> None:
    texts = [f"note{n} about topic{n} here" for n in range(40)]
    with store_at(tmp_path, Given({"kernel": [1.0]})) as store:
        store.store_batch([unit(f"u{n}", text) for n, text in enumerate(texts)])
        store.store(unit("part", "compile something today"))
        query = "compile kernel modules twice"
        (before,) = (one for one in HybridRetrievalStrategy().retrieve(query, store) if one.unit_id == "part")
        store.store(unit("whole", "kernel modules twice"))
        (after,) = (one for one in HybridRetrievalStrategy().retrieve(query, store) if one.unit_id == "part")
        assert after.score == pytest.approx(before.score, abs=0.01)
        (_, best), (_, second) = ((n, s) for s, n in store.search_keywords(query, 2, relative=True))
        assert 0.2 < second < 0.4 < best <= 1.0


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("space", [(), ("alice",)])
def test_a_filter_counts_words_as_if_there_were_no_other_units(
    tmp_path: Path, folded: bool, space: tuple[str, ...]
) -> None:
    rng = random.Random(20261129)
    words = [f"word{n}" for n in range(40)]
    mine = [" ".join(rng.choices(words[:25], k=6)) for _ in range(300)]
    others = [" ".join(rng.choices(words, k=6)) for _ in range(600)]
    units = [unit(f"m{n}", text, metadata={"part": 1}) for n, text in enumerate(mine)]
    folders = [tmp_path / name for name in ("every", "alone")]
    for folder in folders:
        folder.mkdir()
    queries = ["word1 word7 word30", "word2", '"word3 word4" word5', "word6 -word7 word8", "word1* nothing"]
    with store_at(folders[0]) as every, store_at(folders[1]) as alone:
        held, only = (store.namespace(*space) if space else store for store in (every, alone))
        held.store_batch([unit(f"o{n}", text, metadata={"part": 2}) for n, text in enumerate(others)])
        for store in (held, only):  # the words of 256 units or more are folded into the index with them
            for rows in [units] if folded else [units[:200], units[200:]]:
                store.store_batch(rows)
        for query in queries:
            for relative in (True, False):
                found = held.search_keywords(query, 300, {"metadata.part": 1}, relative=relative)
                wanted = only.search_keywords(query, 300, relative=relative)
                assert dict(map(reversed, found)) == pytest.approx(dict(map(reversed, wanted)))  # type: ignore[arg-type]
                assert found == [] or wanted
        assert held.search_keywords("word1", 5, {"metadata.part": 3}) == []


def test_words_that_too_many_rows_hold_are_left_out_of_a_filtered_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memevolve_gpu.records.fulltext.MOST_READ", 10)
    with store_at(tmp_path) as store:
        store.store_batch([unit(f"u{n}", f"common rare{n}", metadata={"part": n % 2}) for n in range(300)])
        assert [name for _, name in store.search_keywords("common rare4", 9, {"metadata.part": 0})] == ["u4"]
        assert len(store.search_keywords("common", 9, {"metadata.part": 0})) == 9


def test_the_neighbours_of_what_matches_come_along(tmp_path: Path) -> None:
    vectors = {"ask": [1.0], "hit": [0.9, 0.436], "reply": [0.3, 0, 0.954], "other": [0.4, 0, 0, 0.917]}
    places = {"hit": ("s", 4), "reply": ("s", 5), "other": ("t", 5)}
    with store_at(tmp_path, Given(vectors)) as store:
        store.store_batch(
            [unit(name, metadata={"session": session, "position": at}) for name, (session, at) in places.items()]
        )
        plain = HybridRetrievalStrategy().retrieve("ask", store)
        assert [one.unit_id for one in plain] == ["hit", "other", "reply"]
        found = HybridRetrievalStrategy(neighbours=0.5).retrieve("ask", store)
        assert [one.unit_id for one in found] == ["hit", "reply", "other"]
        assert found[1].score == pytest.approx(plain[2].score + 0.5 * plain[0].score)
        with pytest.raises(ConfigurationError, match="neighbours"):
            HybridRetrievalStrategy(neighbours=-1)


def test_a_reranker_has_the_last_word(backend: StorageBackend) -> None:
    asked: list[tuple[str, list[str]]] = []

    def by_length(query: str, texts: list[str]) -> list[float]:
        asked.append((query, texts))
        return [float(len(text)) for text in texts]

    found = hybrid(rerank=by_length).retrieve("question", backend, 2)
    assert ids(found) == ["m", "r"]
    assert [one.score for one in found] == sorted((float(len(text)) for text in asked[0][1]), reverse=True)[:2]
    assert [(query, len(texts)) for query, texts in asked] == [("question", 4)]
    assert hybrid(rerank=by_length).retrieve("question", backend, 2, {"tags": "none"}) == []
    for wrong in ([1.0], [float("nan")] * 4, ["best"] * 4, None):
        with pytest.raises(InvalidQueryError, match="rerank"):
            hybrid(rerank=lambda _query, _texts, wrong=wrong: wrong).retrieve("question", backend)
    with pytest.raises(ConfigurationError, match="rerank"):
        hybrid(rerank=5)


def test_diversity_passes_over_what_resembles_a_better_result(tmp_path: Path) -> None:
    vectors = {"ask": [1.0], "first": [0.9, 0.436], "copy": [0.899, 0.438], "else": [0.7, -0.714]}
    with store_at(tmp_path, Given(vectors)) as store:
        store.store_batch([unit(name) for name in ("first", "copy", "else")])
        assert ids(HybridRetrievalStrategy().retrieve("ask", store, 2)) == ["first", "copy"]
        found = HybridRetrievalStrategy(diversity=0.5).retrieve("ask", store, 2)
        assert ids(found) == ["first", "else"]
        plain = {one.unit_id: one.score for one in HybridRetrievalStrategy().retrieve("ask", store, 3)}
        assert {one.unit_id: one.score for one in found} == {name: plain[name] for name in ids(found)}
        assert ids(HybridRetrievalStrategy(diversity=1.0).retrieve("ask", store, 3)) == ["first", "else", "copy"]
        assert HybridRetrievalStrategy(diversity=0.5).retrieve("ask", store, 3, {"type": "none"}) == []
    for wrong in (-0.1, 1.1, "much"):
        with pytest.raises(ConfigurationError, match="diversity"):
            HybridRetrievalStrategy(diversity=wrong)  # type: ignore[arg-type]
