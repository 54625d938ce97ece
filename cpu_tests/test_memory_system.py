"""``MemorySystem``: MemEvolve's calls, room made in time, parts replaced in operation."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_kit import DIM, Given, days_ago, ids_of, open_scratch, store_at, unit
from support import HANGS, as_child, each

from memevolve_gpu import VectorStore
from memevolve_gpu.components.manage import MemoryManager, SimpleManagementStrategy
from memevolve_gpu.components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    RetrievalResult,
    SemanticRetrievalStrategy,
)
from memevolve_gpu.components.store import StorageBackend, StorageHealth
from memevolve_gpu.components.validation import ScratchStore
from memevolve_gpu.errors import (
    CapacityError,
    ConfigurationError,
    EmbeddingError,
    InvalidQueryError,
    InvalidUnitError,
    MemEvolveError,
    StoreClosedError,
)
from memevolve_gpu.memory_system import Capacity, ComponentType, Memory, MemorySystem, MemorySystemConfig


class Encoder:
    """Makes units of experiences as MemEvolve's encoder does: one, several or none."""

    def encode_experience(self, experience: Mapping[str, Any]) -> Any:
        parts = experience.get("parts")
        if parts is None:
            return {"type": "lesson", "content": f"{experience['action']}: {experience['result']}", "tags": ["made"]}
        return [{"type": "skill", "content": part} for part in parts]

    def encode_trajectory(self, trajectory: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{"type": "lesson", "content": str(step["action"])} for step in trajectory]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with store_at(tmp_path) as opened:
        yield opened


@pytest.fixture(params=["store", "plain"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageBackend]:
    if request.param == "plain":
        yield open_scratch()
    else:
        with store_at(tmp_path) as opened:
            yield opened


def system_on(backend: StorageBackend, encoder: Any = None, **settings: Any) -> MemorySystem:
    return MemorySystem(MemorySystemConfig(storage_backend=backend, **settings), encoder)


def contents(units: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["content"] for one in units]


# --- keeping and finding --------------------------------------------------------------------------------------------


def test_experiences_and_trajectories_become_units(backend: StorageBackend) -> None:
    system = system_on(backend, Encoder())
    first = system.add_experience({"id": "e1", "action": "ran tests", "result": "two failed"})
    assert first is not None
    assert backend.retrieve(first) == {
        "id": first,
        "type": "lesson",
        "content": "ran tests: two failed",
        "tags": ["made"],
        "metadata": backend.get_metadata(first),
    }
    several = system.add_experience({"parts": ["one", "two"]})
    assert several is not None
    assert backend.count() == 3
    assert system.add_experience({"parts": []}) is None
    assert len(system.add_trajectory([{"action": "a"}, {"action": "b"}])) == 2
    assert len(system.add_trajectory_batch([{"action": "c"}])) == 1
    assert system.add_units([unit("mine")]) == ["mine"]
    assert system.add_units([]) == []
    assert contents(backend.retrieve_all())[1:] == ["one", "two", "a", "b", "c", "mine"]
    operations = [entry["operation"] for entry in system.get_operation_log()]
    assert operations == [*["add_experience"] * 3, "add_trajectory", "add_trajectory_batch", *["add_units"] * 2]
    assert system.get_operation_log()[0]["details"] == {"experience_id": "e1", "unit_count": 1, "unit_ids": [first]}
    system.clear_operation_log()
    assert system.get_operation_log() == []


def test_a_batch_encoder_is_used_where_there_is_one(backend: StorageBackend) -> None:
    class Batching(Encoder):
        def encode_trajectory_batch(self, trajectory: Any, max_workers: int, batch_size: int) -> list[Any]:
            return [{"content": f"{step['action']} by {max_workers} of {batch_size}"} for step in trajectory]

    system = system_on(backend, Batching())
    system.add_trajectory_batch([{"action": "x"}], max_workers=3, batch_size=7)
    system.add_trajectory_batch([{"action": "y"}], use_parallel=False)
    assert contents(backend.retrieve_all()) == ["x by 3 of 7", "y"]


def test_given_embeddings_spare_the_embedding_function(store: VectorStore) -> None:
    given = store.embedding_function
    assert isinstance(given, Given)
    system_on(store).add_units([unit("a"), unit("b")], np.eye(2, DIM))
    assert given.texts == []
    assert store.search_vectors(np.eye(1, DIM), 1)[1] == [["a"]]


def test_units_are_found_with_score_and_origin(backend: StorageBackend) -> None:
    system = system_on(backend, default_retrieval_top_k=2)
    system.add_units([unit(f"w{n}", f"word{n} shared", tags=[f"t{n % 2}"]) for n in range(6)])
    found = system.query_memory("word3 shared")
    assert len(found) == 2
    assert found[0]["id"] == "w3"
    assert found[0]["content"] == "word3 shared"
    assert found[0]["score"] > found[1]["score"] > 0
    assert isinstance(found[0]["retrieval_metadata"], dict)
    assert {one["id"] for one in system.query_memory("shared", 10, {"tags": "t1"})} == {"w1", "w3", "w5"}
    by_id = system.retrieve_by_ids(["w5", "none", "w0"])
    assert [(one["id"], one["score"]) for one in by_id] == [("w5", 1.0), ("w0", 1.0)]
    with pytest.raises(InvalidQueryError):
        system.query_memory("x", 0)


def test_the_default_strategy_follows_the_backend(store: VectorStore) -> None:
    assert isinstance(system_on(store).retrieval_context.strategy, HybridRetrievalStrategy)
    assert isinstance(system_on(open_scratch()).retrieval_context.strategy, KeywordRetrievalStrategy)


def test_an_empty_store_that_was_given_is_the_one_that_is_used(store: VectorStore, tmp_path: Path) -> None:
    system = system_on(store)
    assert system.storage is store
    system.close()
    assert store.count() == 0
    assert not (tmp_path / "memory.db").exists()


def test_without_an_encoder_units_are_the_only_way_in(backend: StorageBackend) -> None:
    system = system_on(backend)
    calls: list[Callable[[Any], Any]] = [
        system.add_experience,
        system.add_trajectory,
        system.add_trajectory_batch,
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match="encoder"):
            call([])


def test_what_an_encoder_gets_wrong_keeps_nothing(backend: StorageBackend) -> None:
    class Wrong(Encoder):
        def encode_experience(self, experience: Mapping[str, Any]) -> Any:
            if experience["action"] == "raise":
                raise LookupError("the model is gone")
            return [{"content": "fine"}, experience["action"]]

    system = system_on(backend, Wrong())
    with pytest.raises(LookupError, match="the model is gone"):
        system.add_experience({"action": "raise"})
    with pytest.raises(InvalidUnitError, match=r"encoded\[1\]"):
        system.add_experience({"action": "text"})
    assert backend.count() == 0
    assert system.get_operation_log() == []


# --- callbacks and settings -----------------------------------------------------------------------------------------


def test_callbacks_are_told_when_all_is_done(backend: StorageBackend) -> None:
    heard: list[Any] = []
    system = system_on(
        backend,
        Encoder(),
        on_encode_complete=lambda unit_id, one: heard.append((backend.exists(unit_id), one["content"])),
        on_retrieve_complete=lambda query, results: heard.append((query, [type(one) for one in results])),
        on_manage_complete=lambda operation, result: heard.append((operation, result[0])),
    )
    system.add_experience({"parts": ["one", "two"]})
    system.query_memory("one", 1)
    system.manage_memory("prune", criteria={"max_count": 1})
    assert heard == [(True, "one"), (True, "two"), ("one", [RetrievalResult]), ("prune", 1)]


def test_a_callback_that_fails_undoes_nothing(backend: StorageBackend, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_arguments: Any) -> None:
        raise RuntimeError("a listener broke")

    system = system_on(backend, Encoder(), on_encode_complete=fail, on_retrieve_complete=fail, on_manage_complete=fail)
    with caplog.at_level(logging.ERROR):
        unit_id = system.add_experience({"action": "a", "result": "b"})
        assert unit_id is not None
        assert system.query_memory("a") != []
        assert system.manage_memory("forget", count=0) == (0, [])
    assert backend.exists(unit_id)
    assert caplog.text.count("RuntimeError: a listener broke") == 3


def test_a_callback_may_use_the_system(tmp_path: Path) -> None:
    with store_at(tmp_path, max_memory_units=20) as store:
        system = system_on(store)

        def remember(operation: str, result: Any) -> None:
            system.add_units([unit(f"{operation} of {result[0]}")])

        system.config.on_manage_complete = remember
        for number in range(18):
            system.add_units([unit(f"n{number}")])
        assert store.exists("auto_prune of 4")


def test_a_child_forked_while_room_is_made_makes_room_itself(tmp_path: Path) -> None:
    inside, go_on, parent = threading.Event(), threading.Event(), os.getpid()

    class Slow(SimpleManagementStrategy):
        def prune(self, *arguments: Any, **named: Any) -> Any:
            if os.getpid() == parent:
                inside.set()
                go_on.wait(HANGS)
            return super().prune(*arguments, **named)

    with store_at(tmp_path, max_memory_units=20) as store:
        system = system_on(store, management_strategy=Slow(), prune_policy="oldest")

        def add(name: str) -> None:
            for number in range(30):
                system.add_units([unit(f"{name}{number}")])

        thread = threading.Thread(target=add, args=("parent",))
        thread.start()
        try:
            assert inside.wait(HANGS)
            assert as_child(lambda: add("child")) == 0
        finally:
            go_on.set()
            thread.join()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prune_policy": "fifo"}, "prune_policy"),
        ({"prune_to": 1.0}, "prune_to"),
        ({"prune_to": -0.1}, "prune_to"),
        ({"auto_prune_threshold": 0}, "auto_prune_threshold"),
        ({"log_level": "LOUD"}, "log_level"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        system_on(open_scratch(), **settings)


def test_the_log_level_is_that_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("memevolve_gpu")
    monkeypatch.setattr(logger, "level", logger.level)
    system_on(open_scratch(), log_level="debug")
    assert logger.level == logging.DEBUG


def test_a_key_is_not_shown() -> None:
    assert "sk-secret" not in repr(MemorySystemConfig(memory_api_key="sk-secret"))


# --- from the environment -------------------------------------------------------------------------------------------


def test_a_system_can_be_made_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_PROVIDER", "hashing")
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_DIMENSION", "32")
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS", "77")
    with MemorySystem.from_env(tmp_path / "mine", Encoder(), default_retrieval_top_k=1) as system:
        system.add_experience({"action": "compile", "result": "it links"})
        assert system.get_storage_health()["max_units"] == 77
        assert contents(system.query_memory("compile")) == ["compile: it links"]
        storage = system.storage
    with pytest.raises(StoreClosedError):
        storage.count()
    with MemorySystem.from_env(tmp_path / "mine") as system:
        assert system.storage.count() == 1
    with MemorySystem() as system:
        system.add_units([unit("a")])
    assert (tmp_path / "memory.db").exists()  # the tests work in a folder of their own
    with pytest.raises(ConfigurationError):
        MemorySystem.from_env(tmp_path / "mine", prune_policy="fifo")
    with VectorStore(tmp_path / "mine", None) as store:
        assert store.count() == 1


# --- managing -------------------------------------------------------------------------------------------------------


def test_management_goes_through_one_call(backend: StorageBackend) -> None:
    system = system_on(backend)
    system.add_units([unit(f"n{n}", f"word{n // 2}", metadata={"created_at": days_ago(9 - n)}) for n in range(10)])
    assert system.manage_memory("deduplicate", similarity_threshold=0.99, dry_run=True)[0] == 5
    assert system.manage_memory("deduplicate", keep="oldest") == (5, ["n1", "n3", "n5", "n7", "n9"])
    assert system.manage_memory("prune", criteria={"max_age": 8.5}) == (1, ["n0"])
    assert system.manage_memory("forget", strategy="random", count=1, seed=4)[0] == 1
    assert len(system.manage_memory("consolidate", by="type")) == 1
    assert system.manage_memory("prune") == (0, [])
    assert backend.count() == 1
    log = system.get_operation_log()
    assert [entry["operation"] for entry in log[1:]] == [
        *["manage_deduplicate"] * 2,
        "manage_prune",
        "manage_forget",
        "manage_consolidate",
        "manage_prune",
    ]
    assert log[3]["details"] == {"criteria": {"max_age": 8.5}, "count": 1}
    with pytest.raises(ConfigurationError, match="operation must be one of"):
        system.manage_memory("compress")
    with pytest.raises(TypeError, match="colour"):
        system.manage_memory("prune", colour="blue")


def test_health_comes_from_the_backend(backend: StorageBackend) -> None:
    system = system_on(backend)
    system.add_units([unit("a"), unit("b")])
    assert system.get_health_metrics().total_units == 2
    assert system.get_storage_health()["current_count"] == 2


# --- room -----------------------------------------------------------------------------------------------------------


@each(
    ("count", "new", "excess"),
    [
        (0, 10, 0),
        (88, 1, 0),
        (89, 1, 20),  # 90 of 100 would be held: down to 70, the new one included
        (100, 1, 31),
        (50, 45, 25),
        (60, 69, 59),
        (60, 75, 46),  # more than 70 at once: only as much as keeps below the threshold
        (60, 95, 55),  # and only as much as fits at all
        (60, 100, 60),
        (60, 101, 0),  # nothing is deleted for a batch that will be refused
    ],
)
def test_excess_by_the_limits_of_the_backend(count: int, new: int, excess: int) -> None:
    class Limited(ScratchStore):
        def get_storage_health(self) -> StorageHealth:
            return {"current_count": count, "max_units": 100, "memory_usage_mb": 1.0, "max_memory_mb": 100.0}

    assert Capacity().excess(Limited(), new).units == excess


def test_excess_by_a_threshold_of_one_s_own() -> None:
    plain = open_scratch()
    plain.store_batch([unit(f"n{n}") for n in range(20)])
    assert Capacity(threshold=21).excess(plain, 1).units == 0
    assert Capacity(threshold=20).excess(plain, 1).units == 3
    assert Capacity(threshold=20, level=0.5).excess(plain, 1).units == 11
    assert Capacity().excess(plain, 10**6).units == 0


def test_excess_by_memory() -> None:
    class Heavy(ScratchStore):
        def get_storage_health(self) -> StorageHealth:
            return {"current_count": 1000, "max_units": 10**6, "memory_usage_mb": 95.0, "max_memory_mb": 100.0}

    found = Capacity().excess(Heavy(), 1)
    assert found.for_memory
    assert found.units == pytest.approx(1000 * (1 - 70 / 95), abs=1)
    assert "95 of at most 100 MiB" in found.cause


@pytest.mark.parametrize("policy", ["lru", "lfu", "random", "oldest"])
def test_the_store_never_has_to_refuse(tmp_path: Path, policy: Any) -> None:
    with store_at(tmp_path, max_memory_units=100) as store:
        system = system_on(store, prune_policy=policy)
        for number in range(150):
            system.add_units([unit(f"n{number}")])
            assert store.count() < 90
            if policy in ("lru", "lfu"):
                store.retrieve("n0")
        pruned = [entry for entry in system.get_operation_log() if entry["operation"] == "auto_prune"]
        assert len(pruned) == 4
        assert pruned[0]["details"] == {
            "policy": policy,
            "count": 20,
            "cause": "89 units of at most 100, and 1 new",
        }
        assert store.exists("n149")
        assert store.exists("n0") is (policy in ("lru", "lfu")) or policy == "random"
        assert system.memory_manager.operation_history[-1]["operation"] == ("prune" if policy == "oldest" else "forget")
        assert store.check() == []


def test_the_store_alone_refuses_and_deletes_nothing(tmp_path: Path) -> None:
    with store_at(tmp_path, max_memory_units=10) as store:
        system = system_on(store, enable_auto_management=False)
        system.add_units([unit(f"n{n}") for n in range(10)])
        with pytest.raises(CapacityError):
            system.add_units([unit("more")])
        assert store.count() == 10
        managing = system_on(store)
        with pytest.raises(CapacityError):
            managing.add_units([unit(f"m{n}") for n in range(11)])
        assert store.count() == 10


def test_units_that_replace_others_need_no_room(tmp_path: Path) -> None:
    with store_at(tmp_path, max_memory_units=100) as store:
        system = system_on(store)
        batch = [unit(f"n{n}") for n in range(85)]
        system.add_units(batch)
        for _ in range(3):
            system.add_units(batch)
        system.add_units([unit("n3", "again")])
        assert store.count() == 85
        assert not [entry for entry in system.get_operation_log() if entry["operation"] == "auto_prune"]


def test_memory_makes_room_once_and_then_waits_for_growth(store: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    system = system_on(store)
    system.add_units([unit(f"n{n}") for n in range(100)])
    health = store.get_storage_health()
    monkeypatch.setattr(
        store, "get_storage_health", lambda: {**health, "current_count": store.count(), "memory_usage_mb": 10**6}
    )
    monkeypatch.setitem(health, "max_memory_mb", 1.01 * 10**6)
    rounds: list[bool] = []
    original = store.run_maintenance

    def run_maintenance() -> Any:
        rounds.append(True)
        return original()

    monkeypatch.setattr(store, "run_maintenance", run_maintenance)
    system.add_units([unit("a")])
    after = store.count()
    assert after < 80
    assert rounds == [True]
    system.add_units([unit("b")])
    assert store.count() == after + 1
    system.add_units([unit(f"m{n}") for n in range(10)])
    system.add_units([unit("c")])
    assert store.count() < after


def test_room_that_cannot_be_made_is_logged_and_the_store_decides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SimpleManagementStrategy):
        def apply_forgetting(self, *_arguments: Any, **_more: Any) -> Any:
            raise EmbeddingError("no way")

    with store_at(tmp_path, max_memory_units=10) as store:
        system = system_on(store, management_strategy=Broken())
        with caplog.at_level(logging.WARNING):
            system.add_units([unit(f"n{n}") for n in range(9)])
            system.add_units([unit("last")])
        assert store.count() == 10
        assert "no way" in caplog.text


def test_threads_make_room_together(tmp_path: Path) -> None:
    with store_at(tmp_path, max_memory_units=100) as store:
        system = system_on(store)
        failures: list[BaseException] = []

        def work(name: str) -> None:
            try:
                for number in range(60):
                    system.add_units([unit(f"{name}{number}")])
            except (MemEvolveError, AssertionError) as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert 70 <= store.count() <= 94
        assert store.check() == []


# --- replacing parts ------------------------------------------------------------------------------------------------


def test_a_part_is_replaced_after_a_real_round_trip(store: VectorStore, tmp_path: Path) -> None:
    system = system_on(store, Encoder())
    system.add_units([unit("a")])
    other_path = tmp_path / "other"
    other_path.mkdir()
    with store_at(other_path) as other:
        other.store(unit("b"))
        assert system.reconfigure_component(ComponentType.STORAGE, other)
        assert system.storage is other
        assert contents(system.query_memory("b", 1)) == ["b"]
        assert system.manage_memory("prune", criteria={"max_count": 0})[0] == 1
        assert ids_of(store) == ["a"]
        assert other.check() == []
        assert system.reconfigure_component("storage", store, save_state=True)
    strategy = SemanticRetrievalStrategy()
    assert system.reconfigure_component("retrieval", strategy)
    assert system.retrieval_context.strategy is strategy
    management = SimpleManagementStrategy()
    assert system.reconfigure_component("manager", management)
    assert system.memory_manager.management_strategy is management
    assert system.reconfigure_component("manager", MemoryManager(store, SimpleManagementStrategy()))
    assert system.memory_manager.storage_backend is store
    encoder = Encoder()
    assert system.reconfigure_component("encoder", encoder)
    assert system.encoder is encoder
    assert ids_of(store) == ["a"]
    replaced = [
        entry["details"]["component"] for entry in system.get_operation_log()[1:] if "component" in entry["details"]
    ]
    assert replaced == ["storage", "storage", "retrieval", "manager", "manager", "encoder"]


def test_a_store_hands_its_units_over_when_asked(store: VectorStore, tmp_path: Path) -> None:
    system = system_on(store)
    system.add_units([unit("a"), unit("b")])
    other_path = tmp_path / "other"
    other_path.mkdir()
    with store_at(other_path) as other:
        system.reconfigure_component("storage", other, save_state=True)
        assert ids_of(other) == ["a", "b"]


class Lossy(ScratchStore):
    """A backend that forgets what it is given."""

    def retrieve(self, unit_id: str) -> dict[str, Any] | None:
        del unit_id
        return None


class Deaf(KeywordRetrievalStrategy):
    def retrieve(self, *_arguments: Any, **_more: Any) -> Any:
        raise OSError("no answer")


class Vague(KeywordRetrievalStrategy):
    def retrieve(self, *_arguments: Any, **_more: Any) -> Any:
        return ["a unit, perhaps"]


class Greedy(SimpleManagementStrategy):
    def prune(self, storage_backend: StorageBackend, criteria: Any = None, **_more: Any) -> Any:
        for one in storage_backend.retrieve_all():
            storage_backend.delete(one["id"])
        return 1, ["trial-0"]


class Mute(Encoder):
    def encode_experience(self, experience: Mapping[str, Any]) -> Any:
        return "nothing but words"


class HalfEncoder:
    def encode_experience(self, experience: Mapping[str, Any]) -> Any:
        return {}


@pytest.mark.parametrize(
    ("kind", "make", "error", "says"),
    [
        ("storage", Lossy, ConfigurationError, "lost the unit"),
        ("storage", dict, ConfigurationError, "it has no"),
        ("storage", lambda: None, ConfigurationError, "is None"),
        ("retrieval", Deaf, OSError, "no answer"),
        ("retrieval", Vague, ConfigurationError, "no list"),
        ("retrieval", object, ConfigurationError, "it has no"),
        ("manager", Greedy, ConfigurationError, "did not do what it said"),
        ("manager", object, ConfigurationError, "it has no"),
        ("encoder", Mute, InvalidUnitError, "encoded"),
        ("encoder", HalfEncoder, ConfigurationError, "encode_trajectory"),
        ("engine", dict, ConfigurationError, "component_type must be one of"),
    ],
)
def test_a_part_that_fails_its_trial_changes_nothing(
    backend: StorageBackend, kind: str, make: Any, error: type[Exception], says: str
) -> None:
    system = system_on(backend, Encoder())
    system.add_units([unit("a"), unit("b")])
    before = backend.retrieve_all()
    parts = system.storage, system.retrieval_context.strategy, system.memory_manager.management_strategy, system.encoder
    made = make()
    with pytest.raises(error, match=says):
        system.reconfigure_component(kind, made)
    assert parts == (
        system.storage,
        system.retrieval_context.strategy,
        system.memory_manager.management_strategy,
        system.encoder,
    )
    assert backend.retrieve_all() == before
    assert contents(system.query_memory("a", 1)) == ["a"]
    if isinstance(made, ScratchStore):
        assert made.count() == 0


def test_a_storage_whose_embedding_fails_is_refused_and_left_clean(store: VectorStore, tmp_path: Path) -> None:
    def fail(_text: str) -> Any:
        raise OSError("the model is gone")

    system = system_on(store)
    with VectorStore(tmp_path / "other", fail, DIM, storage_config={"background": False}) as other:
        with pytest.raises(EmbeddingError, match="the model is gone"):
            system.reconfigure_component("storage", other)
        assert other.count() == 0
    assert system.storage is store


def test_a_trial_can_be_waived(backend: StorageBackend) -> None:
    system = system_on(backend)
    deaf = Deaf()
    assert system.reconfigure_component("retrieval", deaf, validate=False)
    with pytest.raises(OSError, match="no answer"):
        system.query_memory("a")


def test_questions_go_on_while_parts_are_replaced(store: VectorStore) -> None:
    system = system_on(store)
    system.add_units([unit(f"n{n}", f"word{n}") for n in range(50)])
    stop, failures = threading.Event(), list[BaseException]()

    def ask() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 50
            try:
                assert system.query_memory(f"word{number}", 1)[0]["id"] == f"n{number}"
            except (MemEvolveError, AssertionError, IndexError) as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20):
        strategy = KeywordRetrievalStrategy() if number % 2 else HybridRetrievalStrategy()
        system.reconfigure_component("retrieval", strategy)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_memory_needs_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_PROVIDER", "hashing")
    with Memory(tmp_path / "new" / "notes") as memory:
        first = memory.add("git bisect finds the bad commit", type="skill", tags=["git"])
        second = memory.add({"id": "keys", "content": "Rotate the API keys"}, metadata={"owner": "ops"})
        assert (first, second) == ("unit_0", "keys")
        assert [unit["id"] for unit in memory.search("which commit is bad", top_k=1)] == [first]
        assert [unit["id"] for unit in memory.search("keys", filters={"metadata.owner": "ops"})] == [second]
    with pytest.raises(StoreClosedError):
        memory.add("late")
    with pytest.raises(ConfigurationError, match="prune_policy"):
        Memory(tmp_path / "other", prune_policy="wrong")
    with Memory(tmp_path / "new" / "notes") as again:
        assert [unit["type"] for unit in again.search("commit", top_k=1)] == ["skill"]
