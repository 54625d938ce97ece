"""What ``MilvusStore`` asks of a server, and what it makes of answers that fall short."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from milvus_fake import FakeError, FakeMilvus
from support import SEED, FakeEmbedder, each

from memevolve_gpu import MemorySystem, StorageConfig, VectorStore, backends
from memevolve_gpu.backends import open_store, store_exists
from memevolve_gpu.errors import (
    ConfigurationError,
    InvalidUnitError,
    NewerSchemaError,
    NotAStoreError,
    StoreUnavailableError,
)
from memevolve_gpu.milvus.client import Version
from memevolve_gpu.milvus.plan import plan_for, search_params
from memevolve_gpu.milvus.store import MilvusStore
from memevolve_gpu.types import Metric

DIM = 12


def opened(server: FakeMilvus, **settings: Any) -> MilvusStore:
    place = {name: settings.pop(name) for name in ("consistency", "replicas", "timeout") if name in settings}
    return MilvusStore(
        FakeEmbedder(DIM), storage_config=settings, milvus_config={"timeout": 0.3, **place}, client=server.connect
    )


def filled(server: FakeMilvus, count: int, **settings: Any) -> tuple[MilvusStore, Any]:
    store = opened(server, **settings)
    vectors = np.random.default_rng(SEED).standard_normal((count, DIM)).astype("float32")
    store.store_batch([{"id": f"u{i}", "content": f"{i}", "metadata": {"n": i}} for i in range(count)], vectors)
    return store, vectors


def last(server: FakeMilvus, verb: str) -> dict[str, Any]:
    return next(named for name, named in reversed(server.asked) if name == verb)


class TestConsistency:
    def test_a_writer_waits_for_its_own_writes_and_nobody_asks_for_strong(self) -> None:
        server = FakeMilvus()
        store = opened(server)
        store.store({"id": "a", "content": "one"})
        assert store.search("one", 1)[0][1] == "a"
        levels = {named["consistency_level"] for name, named in server.asked if name in ("search", "query")}
        assert levels == {"Customized"}

    def test_a_delete_is_waited_for_although_the_server_reports_no_time_for_it(self) -> None:
        store = opened(FakeMilvus())
        store.store_batch([{"id": "a", "content": "a"}, {"id": "b", "content": "b"}])
        assert store.delete("a")
        assert store.count() == 1
        store.clear()
        assert store.count() == 0

    def test_what_was_acknowledged_before_a_store_was_opened_is_seen_by_it(self) -> None:
        server = FakeMilvus()
        one = opened(server)
        one.store({"id": "a", "content": "one"})
        other = opened(server)
        assert other.exists("a")
        one.store({"id": "b", "content": "two"})
        assert not other.exists("b")
        other.refresh()
        assert other.exists("b")

    @pytest.mark.parametrize(
        ("level", "asked"), [("strong", "Strong"), ("bounded", "Bounded"), ("eventually", "Eventually")]
    )
    def test_other_levels_are_the_server_s(self, level: str, asked: str) -> None:
        server = FakeMilvus()
        store = opened(server, consistency=level)
        store.search("x", 1)
        assert last(server, "search")["consistency_level"] == asked

    def test_without_a_clock_to_ask_reads_are_strong(self) -> None:
        server = FakeMilvus()
        server.has_clock = False
        store = opened(server)
        store.store({"id": "a", "content": "one"})
        assert store.exists("a")
        assert store.statistics()["server"]["consistency"] == "strong"
        assert store.store({"content": "two"}).removeprefix("unit_").isdigit()


class TestRepeating:
    @pytest.mark.parametrize("verb", ["upsert", "search", "query", "delete"])
    def test_a_call_that_fails_twice_is_made_again_and_nothing_is_doubled(self, verb: str) -> None:
        server = FakeMilvus()
        store, vectors = filled(server, 20)
        server.fail(verb, FakeError(65535, "node offline"), FakeError(503, "channel not available"))
        store.store({"id": "u1", "content": "again"})
        store.delete("u2")
        assert store.count() == 19
        assert store.search_vectors(vectors[3:4], 1)[1] == [["u3"]]

    def test_an_answer_that_was_lost_is_no_second_unit(self) -> None:
        server = FakeMilvus()
        store = opened(server)
        real = server.connect(1.0)
        store.store({"id": "a", "content": "first"})
        rows = last(server, "upsert")["arguments"][1]
        real.upsert("memevolve", rows, timeout=1.0)  # the server had it, and the answer got lost: sent again
        assert store.count() == 1

    def test_a_server_that_goes_away_is_an_error_after_the_stated_time(self) -> None:
        server = FakeMilvus()
        store, _ = filled(server, 3)
        server.fail("search", *[FakeError(65535, "gone")] * 99)
        with pytest.raises(StoreUnavailableError, match=r"within 0\.3 s"):
            store.search("x", 1)

    def test_a_batch_that_breaks_off_leaves_whole_rows_and_can_be_sent_again(self) -> None:
        server = FakeMilvus()
        store = opened(server)
        units = [{"id": f"u{i}", "content": "x" * 60_000} for i in range(400)]
        server.fail("upsert", FakeError(1100, "invalid parameter: stand-in"))
        with pytest.raises(RuntimeError, match="stand-in"):
            store.store_batch(units)
        store.store_batch(units)
        assert server.calls["upsert"] > 2
        assert store.count() == 400
        assert store.retrieve("u399") is not None


class TestSearchesThatFallShort:
    def test_few_matching_rows_are_compared_one_by_one(self) -> None:
        server = FakeMilvus()
        store, vectors = filled(server, 300)
        server.most_found = 2
        found = store.search_vectors(vectors[5:6], 10)
        exact = np.argsort(np.square(vectors - vectors[5]).sum(axis=1))[:10]
        assert found[1] == [[f"u{i}" for i in exact]]

    def test_a_range_that_the_server_knows_only_roughly_is_checked(self) -> None:
        server = FakeMilvus()
        store = opened(server)
        texts = [f"{'same beginning of all texts '}{i:04d}" for i in range(3_000)]
        vectors = np.random.default_rng(SEED).standard_normal((3_000, DIM)).astype("float32")
        store.store_batch([{"id": text, "content": text, "key": text} for text in texts], vectors)
        found = store.search_vectors(vectors[0:1], 20, {"key": {"gte": texts[2_990]}})[1][0]
        assert set(filter(None, found)) == set(texts[2_990:])
        assert len(list(store.units({"key": {"lt": texts[5]}}))) == 5

    def test_many_matching_rows_are_searched_with_full_effort_and_then_compared(self) -> None:
        server = FakeMilvus()
        store, vectors = filled(server, 2_500)
        server.most_found = 7
        found = store.search_vectors(vectors[:3], 10, {"metadata.n": {"gte": 0}})
        exact = np.argsort(np.square(vectors[None] - vectors[:3, None]).sum(axis=2), axis=1)[:, :10]
        assert found[1] == [[f"u{i}" for i in row] for row in exact]

    def test_more_than_the_server_gives_at_once_is_put_together_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("search", "collection"):
            monkeypatch.setattr(f"memevolve_gpu.milvus.{module}.WINDOW", 50)
        store, _ = filled(FakeMilvus(), 170)
        distances, ids = store.search_vectors(np.zeros((1, DIM)), 165)
        assert (len(set(ids[0])), None in ids[0]) == (165, False)
        assert (np.diff(distances[0]) >= 0).all()

    def test_an_exact_search_trusts_the_server_only_when_it_compares_all(self) -> None:
        server = FakeMilvus()
        store, vectors = filled(server, 50)
        server.segments = [(900, ""), (40_000, "vector")]
        store.search_vectors(vectors[:1], 5, recall=1.0)
        params = last(server, "search")["search_params"]["params"]
        assert params == {"nprobe": store.index.nlist}
        before = server.calls["search"]
        for held in ((40_000, ""), (900, None)):
            server.segments = [held]
            assert store.search_vectors(vectors[:1], 1, recall=1.0)[1] == [["u0"]]
        assert server.calls["search"] == before
        assert store.get_storage_health()["needs_retraining"]
        store.run_maintenance()
        assert not store.get_storage_health()["needs_retraining"]

    def test_without_an_index_the_server_always_compares_all(self) -> None:
        server = FakeMilvus()
        store, vectors = filled(server, 20, index_type="flat")
        server.segments = [(40_000, "")]
        store.search_vectors(vectors[:1], 1, recall=1.0)
        assert server.calls["search"] == 1
        assert not store.get_storage_health()["needs_retraining"]

    def test_rows_that_still_grow_may_be_too_many_for_an_exact_answer_of_the_server(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("memevolve_gpu.milvus.search._INTERIM_ROWS", 40)
        server = FakeMilvus()
        store, vectors = filled(server, 50)
        assert store.search_vectors(vectors[:1], 1, recall=1.0)[1] == [["u0"]]
        assert server.calls["search"] == 0
        monkeypatch.setattr("memevolve_gpu.milvus.session._IN_FLIGHT", 0)
        store.run_maintenance()
        store.search_vectors(vectors[:1], 1, recall=1.0)
        assert server.calls["search"] == 1
        for i in range(50):
            store.update(f"u{i}", {"content": f"{i}", "note": "an edit is written anew, too"})
        store.search_vectors(vectors[:1], 1, recall=1.0)
        assert server.calls["search"] == 1


class TestPlans:
    @each(
        ("version", "settings", "metric", "index"),
        [
            ("v2.3.5", {}, "l2", "IVF_FLAT"),
            ("v2.3.5", {"index_type": "auto"}, "l2", "IVF_FLAT"),
            ("v2.3.5", {"index_type": "flat"}, "ip", "FLAT"),
            ("v2.6.0", {"index_type": "hnsw"}, "l2", "HNSW"),
            ("v2.3.5-gpu", {}, "l2", "GPU_IVF_FLAT"),
            ("v2.3.5-gpu", {"index_type": "auto"}, "l2", "GPU_IVF_FLAT"),
            ("v2.4.1-gpu", {"index_type": "auto"}, "ip", "GPU_CAGRA"),
            ("v2.4.1-gpu", {"index_type": "flat"}, "l2", "GPU_BRUTE_FORCE"),
            ("v2.4.1-gpu", {}, "cosine", "IVF_FLAT"),
            ("v2.5.0-gpu", {}, "cosine", "GPU_IVF_FLAT"),
            ("v2.4.1-gpu", {"device": "cpu"}, "l2", "IVF_FLAT"),
        ],
    )
    def test_the_index_follows_what_the_server_says_it_is(
        self, version: str, settings: dict[str, Any], metric: Metric, index: str
    ) -> None:
        plan = plan_for(Version.parse(version), 384, metric, StorageConfig(metric=metric, **settings))
        assert plan.index == index
        assert plan.reason

    def test_the_server_is_given_the_planned_index(self) -> None:
        server = FakeMilvus("v2.4.1-gpu")
        store = opened(server, index_type="auto")
        assert store.index.kind == "GPU_CAGRA"
        wanted = last(server, "create_index")["arguments"][1][0]
        assert (wanted["index_type"], wanted["metric_type"]) == ("GPU_CAGRA", "L2")
        assert store.search("x", 1) == []

    @pytest.mark.parametrize("index", ["IVF_FLAT", "GPU_IVF_FLAT"])
    def test_more_recall_probes_more_lists_and_all_of_them_for_one(self, index: str) -> None:
        probes = [search_params(index, 677, recall, 10)["nprobe"] for recall in (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)]
        assert probes == sorted(set(probes))
        assert probes[-1] == 677

    def test_the_beam_is_never_narrower_than_top_k(self) -> None:
        assert search_params("HNSW", 0, 0.5, 900)["ef"] == 900
        assert search_params("GPU_CAGRA", 0, 0.5, 900)["itopk_size"] >= 900
        assert search_params("GPU_CAGRA", 0, 0.95, 10)["itopk_size"] % 32 == 0
        assert search_params("FLAT", 0, 0.5, 900) == {}

    def test_recall_of_a_call_goes_before_the_target(self) -> None:
        server = FakeMilvus()
        store, _ = filled(server, 20, target_recall=0.9)
        store.search("x", 1)
        usual = last(server, "search")["search_params"]["params"]["nprobe"]
        store.search("x", 1, recall=0.98)
        assert last(server, "search")["search_params"]["params"]["nprobe"] > usual


class TestCollections:
    def test_one_of_others_is_left_alone(self) -> None:
        server = FakeMilvus()
        client = server.connect(1.0)
        client.create_collection("memevolve", schema=client.create_schema(description="theirs"), timeout=1.0)
        with pytest.raises(NotAStoreError, match="MEMEVOLVE_MILVUS_COLLECTION"):
            opened(server)
        assert last(server, "describe_collection")

    def test_one_of_a_newer_version_is_refused(self) -> None:
        server = FakeMilvus()
        opened(server)
        held = server.collections["memevolve"]
        held.description = held.description.replace('"format": 1', '"format": 2')
        with pytest.raises(NewerSchemaError, match="format 2"):
            opened(server)

    def test_replicas_that_cannot_be_had_are_named(self) -> None:
        with pytest.raises(ConfigurationError, match="MEMEVOLVE_MILVUS_REPLICAS=2"):
            opened(FakeMilvus(), replicas=2)
        server = FakeMilvus()
        server.query_nodes = 2
        opened(server, replicas=2)
        assert last(server, "load_collection")["replica_number"] == 2

    def test_a_unit_that_no_row_takes_is_refused_before_anything_is_written(self) -> None:
        server = FakeMilvus()
        store = opened(server)
        noise = np.random.default_rng(SEED).bytes(150_000).hex()
        with pytest.raises(InvalidUnitError, match=r"units\[1\].*split it"):
            store.store_batch([{"content": "a"}, {"content": noise}])
        assert server.calls["upsert"] == 0

    def test_is_there_one(self) -> None:
        server = FakeMilvus()
        assert not MilvusStore.exists_at(client=server.connect)
        opened(server)
        assert MilvusStore.exists_at(client=server.connect)
        assert MilvusStore.model_at(client=server.connect) is None


class TestOpening:
    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> FakeMilvus:
        server = FakeMilvus()

        class OnIt(MilvusStore):
            def __init__(self, function: Any, dim: Any = None, config: Any = None, place: Any = None) -> None:
                super().__init__(function, dim, config, place, client=server.connect)

        monkeypatch.setattr(backends, "MilvusStore", OnIt)
        return server

    def test_settings_choose_the_backend(self, server: FakeMilvus, monkeypatch: pytest.MonkeyPatch) -> None:
        with open_store("notes", FakeEmbedder(DIM)) as store:
            assert isinstance(store, VectorStore)
        assert store_exists("notes")
        monkeypatch.setenv("MEMEVOLVE_STORAGE_BACKEND_TYPE", "milvus")
        monkeypatch.setenv("MEMEVOLVE_MILVUS_COLLECTION", "agents")
        with open_store("notes", FakeEmbedder(DIM)) as store:
            assert isinstance(store, MilvusStore)
        assert list(server.collections) == ["agents"]

    def test_an_address_chooses_it_too(self, server: FakeMilvus) -> None:
        with open_store("milvus://localhost/notes", FakeEmbedder(DIM)) as store:
            assert isinstance(store, MilvusStore)
        assert list(server.collections) == ["notes"]

    def test_a_memory_system_follows_the_settings(
        self, server: FakeMilvus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("MEMEVOLVE_STORAGE_BACKEND_TYPE", "milvus")
        monkeypatch.setenv("MEMEVOLVE_EMBEDDING_PROVIDER", "hashing")
        with MemorySystem.from_env("data/memory") as system:
            system.add_units([{"content": "git rebase"}, {"content": "tar archive"}])
            assert system.query_memory("rebase", 1)[0]["content"] == "git rebase"
            assert isinstance(system.storage, MilvusStore)
        assert list(tmp_path.iterdir()) == []


class TestStates:
    def test_units_of_a_store_in_files_are_taken_over(self, tmp_path: Path) -> None:
        store = opened(FakeMilvus())
        with VectorStore(tmp_path / "old", FakeEmbedder(DIM), storage_config={"background": False}) as old:
            old.store_batch([{"id": f"u{i}", "content": f"fact {i}"} for i in range(5)])
            state, units = old.save_state(), old.retrieve_all()
        store.restore_state(state)
        assert store.retrieve_all() == units

    def test_a_state_names_the_store_without_its_token(self) -> None:
        store = opened(FakeMilvus())
        assert store.save_state() == {"milvus": "milvus://localhost:19530/memevolve", "count": 0}
        store.restore_state(store.save_state())
        store.restore_state({})
        assert store.count() == 0


class TestWhatMilvusLacks:
    """Each call and each argument of a ``VectorStore`` works, or is refused with the name of what is missing."""

    CALLS: ClassVar[dict[str, tuple[str, Callable[[MilvusStore], Any]]]] = {
        "namespace": ("namespace", lambda store: store.namespace("org")),
        "namespaces": ("namespace", lambda store: store.namespaces()),
        "delete_namespace": ("namespace", lambda store: store.delete_namespace("org")),
        "set_limits": ("namespace", lambda store: store.set_limits(max_units=3)),
        "search_units(prefix)": ("namespace", lambda store: store.search_units("text", prefix=())),
        "set_expiry": ("set_expiry", lambda store: store.set_expiry(["a"], ttl=3)),
        "store(ttl)": ("set_expiry", lambda store: store.store({"id": "b", "content": "text"}, ttl=3)),
        "store(expires_at)": ("set_expiry", lambda store: store.store({"id": "b", "content": "text"}, expires_at=9e9)),
        "store_batch(ttl)": ("set_expiry", lambda store: store.store_batch([{"id": "b", "content": "text"}], ttl=3)),
        "store_batch(expires_at)": ("set_expiry", lambda store: store.store_batch([], expires_at=[])),
        "update(ttl)": ("set_expiry", lambda store: store.update("a", {"content": "new"}, ttl=3)),
        "update(expires_at)": ("set_expiry", lambda store: store.update("a", {"content": "new"}, expires_at=9e9)),
        "retrieve(ttl)": ("set_expiry", lambda store: store.retrieve("a", ttl=3)),
        "retrieve(as_of)": ("history", lambda store: store.retrieve("a", as_of=1)),
        "units(as_of)": ("history", lambda store: store.units(as_of=1)),
        "operations": ("history", lambda store: store.operations()),
        "history": ("history", lambda store: store.history("a")),
        "undo": ("history", lambda store: store.undo(1)),
        "changes": ("changes", lambda store: store.changes()),
        "watch": ("changes", lambda store: store.watch()),
        "forget_subject": ("forget_subject", lambda store: store.forget_subject({"id": "a"})),
    }

    @each("call", CALLS)
    def test_it_is_refused_by_name_and_nothing_changes(self, call: str) -> None:
        capability, act = self.CALLS[call]
        store = MilvusStore(FakeEmbedder(8), 8, client=FakeMilvus().connect)
        store.store({"id": "a", "content": "text"})
        before = store.retrieve_all()
        assert capability not in store.capabilities
        named = rf"\('{capability}' is not among its capabilities\); use a VectorStore"
        with pytest.raises(ConfigurationError, match=named):
            act(store)
        assert store.retrieve_all() == before

    def test_every_call_and_argument_of_a_store_in_files_is_there_or_concerns_its_file(self) -> None:
        files_only = {"backup", "check", "restore", "snapshot"}
        public = {name for name in dir(VectorStore) if not name.startswith("_")}
        assert {name for name in public if not hasattr(MilvusStore, name)} == files_only
        for name in public - files_only - {"exists_at"}:
            call = getattr(VectorStore, name)
            if inspect.isfunction(call):
                theirs = inspect.signature(getattr(MilvusStore, name)).parameters
                assert set(inspect.signature(call).parameters) <= set(theirs), name

    def test_the_rest_works(self) -> None:
        store = MilvusStore(FakeEmbedder(8), 8, client=FakeMilvus().connect)
        store.store({"id": "a", "content": "text", "metadata": {"n": 1}})
        assert (store.expiry("a"), store.expiries(["a"])) == (None, {})
        assert store.patch("a", {"metadata": {"n": 2}})
        assert store.update_where({"id": "a"}, {"metadata": {"n": 3}}) == 1
        assert store.facets("metadata.n") == [(3, 1)]
        assert store.count({"metadata.n": 3}) == 1
        assert store.store({"id": "b", "content": "new text"}, replaces="a") == "b"
        assert [unit["id"] for unit in store.units(order_by="id", limit=1)] == ["b"]
        assert store.delete_where({"id": "b"}) == 1
