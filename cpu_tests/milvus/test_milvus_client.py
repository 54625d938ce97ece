"""Calls to the server: how long they are repeated, and what becomes of its errors."""

from __future__ import annotations

import builtins
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
from milvus_fake import FakeError, FakeMilvus
from support import FakeEmbedder, as_child

from memevolve_gpu.errors import (
    ConfigurationError,
    ReadOnlyError,
    StorageError,
    StorageFullError,
    StoreClosedError,
    StoreUnavailableError,
)
from memevolve_gpu.milvus.client import GaveUp, MilvusClient, Retrying, Version
from memevolve_gpu.milvus.store import MilvusStore
from memevolve_gpu.utils.config import MilvusConfig, is_milvus_uri


class Time:
    """A clock that only sleeping and working move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def failing(time: Time, errors: list[Exception], takes: float = 0.0) -> Callable[[float], str]:
    left = list(errors)

    def call(allowed: float) -> str:
        time.now += min(takes, allowed)
        if left:
            raise left.pop(0)
        return f"{allowed:g}"

    return call


class TestRetrying:
    def test_a_call_that_fails_is_repeated_with_growing_pauses(self) -> None:
        time = Time()
        call = failing(time, [OSError("gone")] * 7)
        result = Retrying(30.0, time.clock, time.sleep).run(call, (OSError,), lambda _: False)
        assert result == "10"  # a third of the time for each attempt, while so much is left
        assert time.pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]

    def test_the_stated_time_is_kept(self) -> None:
        time = Time()
        call = failing(time, [OSError("gone")] * 999)
        with pytest.raises(GaveUp) as caught:
            Retrying(10.0, time.clock, time.sleep).run(call, (OSError,), lambda _: False)
        assert 9.0 <= time.now <= 10.0
        assert caught.value.attempts > 5
        assert str(caught.value.last) == "gone"

    def test_a_call_that_hangs_leaves_time_for_others(self) -> None:
        time = Time()
        call = failing(time, [OSError("deadline")] * 999, takes=99.0)
        with pytest.raises(GaveUp) as caught:
            Retrying(30.0, time.clock, time.sleep).run(call, (OSError,), lambda _: False)
        assert caught.value.attempts == 3
        assert time.now <= 30.0

    def test_what_another_try_does_not_change_is_raised_at_once(self) -> None:
        time = Time()
        with pytest.raises(OSError, match="no such"):
            Retrying(10.0, time.clock, time.sleep).run(
                failing(time, [OSError("no such")]), (OSError,), lambda error: "no such" in str(error)
            )
        assert time.pauses == []

    def test_our_own_faults_are_not_repeated(self) -> None:
        time = Time()
        with pytest.raises(TypeError):
            Retrying(10.0, time.clock, time.sleep).run(failing(time, [TypeError("a bug")]), (OSError,), lambda _: False)


def client(server: FakeMilvus, **settings: Any) -> MilvusClient:
    return MilvusClient(MilvusConfig(**{"timeout": 0.3, **settings}), server.connect)


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "message", "kind", "words"),
        [
            (3, "memory limit exceeded", StorageFullError, "no room"),
            (7, "disk quota exceeded", StorageFullError, "no room"),
            (9, "deny to write", ReadOnlyError, "refuses writes"),
            (100, "collection not found", StorageError, "has lost the collection"),
            (1100, "invalid parameter", StorageError, "refused a request: invalid parameter"),
            (65535, "cannot parse expression: born <", StorageError, "cannot parse"),
            (1400, "auth check failure", ConfigurationError, "MEMEVOLVE_MILVUS_TOKEN"),
        ],
    )
    def test_the_server_s_final_words_become_ours_at_once(
        self, code: int, message: str, kind: type[Exception], words: str
    ) -> None:
        server = FakeMilvus()
        server.fail("has_collection", FakeError(code, message))
        with pytest.raises(kind, match=words) as caught:
            client(server).call("has_collection", "x")
        assert type(caught.value) is kind
        assert isinstance(caught.value.__cause__, FakeError)
        assert server.calls["has_collection"] == 1

    @pytest.mark.parametrize("code", [1, 2, 4, 5, 8, 101, 106, 503, 901, 65535])
    def test_a_node_that_is_lost_is_waited_for(self, code: int) -> None:
        server = FakeMilvus()
        server.fail("has_collection", *[FakeError(code, "node offline")] * 2)
        assert client(server).call("has_collection", "x") is False
        assert server.calls["has_collection"] == 3

    def test_a_server_that_is_away_is_named_with_the_time_and_the_remedy(self) -> None:
        def nobody(_seconds: float) -> Any:
            raise ConnectionRefusedError("nobody listens")

        away = MilvusClient(MilvusConfig(uri="http://away.test:19530", timeout=0.2), nobody)
        with pytest.raises(
            StoreUnavailableError, match=r"http://away.test:19530 gave no answer within 0.2 s"
        ) as caught:
            away.call("has_collection", "x")
        assert "MEMEVOLVE_MILVUS_URI" in str(caught.value)
        assert "nobody listens" in str(caught.value)

    def test_the_token_is_in_no_message(self) -> None:
        server = FakeMilvus()
        server.fail("has_collection", FakeError(1100, "invalid parameter"))
        with pytest.raises(StorageError) as caught:
            client(server, token="root:sesame").call("has_collection", "x")
        assert "sesame" not in str(caught.value)
        assert "sesame" not in repr(MilvusConfig(token="root:sesame"))

    def test_without_the_package_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without(name: str, *arguments: Any, **named: Any) -> Any:
            if name.partition(".")[0] == "pymilvus":
                raise ImportError("No module named 'pymilvus'")
            return real(name, *arguments, **named)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ConfigurationError, match=r"pip install 'memevolve-gpu\[milvus\]'"):
            MilvusClient(MilvusConfig()).call("has_collection", "x")

    def test_a_closed_door_says_so(self) -> None:
        closed = client(FakeMilvus())
        closed.close()
        with pytest.raises(StoreClosedError):
            closed.call("has_collection", "x")


class TestVersion:
    @pytest.mark.parametrize(
        ("text", "numbers", "gpu"),
        [
            ("v2.3.5-lite", (2, 3, 5), False),
            ("v2.4.1-gpu", (2, 4, 1), True),
            ("2.6.0", (2, 6, 0), False),
            ("2.5-gpu-dev", (2, 5, 0), True),
            ("unknown", (2, 3, 2), False),
        ],
    )
    def test_it_is_read_from_the_server_s_text(self, text: str, numbers: tuple[int, ...], *, gpu: bool) -> None:
        version = Version.parse(text)
        assert (version.numbers, version.gpu) == (numbers, gpu)

    def test_a_server_that_is_too_old_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"Milvus v2.2.9, at least 2.3.2"):
            client(FakeMilvus("v2.2.9")).version()


class TestConnections:
    def test_a_forked_child_connects_anew_and_is_another_writer(self) -> None:
        made: list[float] = []
        server = FakeMilvus()

        def connect(seconds: float) -> Any:
            made.append(seconds)
            return server.connect(seconds)

        with MilvusStore(FakeEmbedder(4), client=connect) as store:
            store.store({"content": "a"})
            reading, writing = os.pipe()

            def act() -> None:
                given = store.store({"content": "b"})
                os.write(writing, f"{len(made)} {given}".encode())

            assert as_child(act) == 0
            connections, theirs = os.read(reading, 100).decode().split()
            os.close(reading)
            os.close(writing)
            assert (connections, len(made)) == ("2", 1)
            assert theirs != store.store({"content": "c"})


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "uri", "collection"),
        [
            ("milvus://db.test/notes", "http://db.test:19530", "notes"),
            ("milvus+https://db.test:443/notes", "https://db.test:443", "notes"),
            ("milvus://[::1]:19531/n", "http://[::1]:19531", "n"),
            ("milvus://db.test", "http://db.test:19530", "memevolve"),
        ],
    )
    def test_a_store_on_a_server_has_one(self, address: str, uri: str, collection: str) -> None:
        config = MilvusConfig.at(address)
        assert (config.uri, config.collection) == (uri, collection)
        assert MilvusConfig.at(config.address) == config

    @pytest.mark.parametrize(
        "bad", ["milvus:///x", "milvus://me:pw@db.test/x", "milvus://db.test/a-b", "milvus://h/x?y"]
    )
    def test_a_bad_one_is_refused_without_its_secrets(self, bad: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            MilvusConfig.at(bad)
        assert "pw" not in str(caught.value)

    def test_a_path_is_none(self) -> None:
        assert [is_milvus_uri(one) for one in ("milvus://x", "./milvus", "http://x", None)] == [
            True,
            False,
            False,
            False,
        ]


def test_the_client_s_own_log_is_quiet_unless_somebody_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from memevolve_gpu.milvus.client import _quiet

    log = logging.getLogger("a_client_of_ours")
    for as_it_comes in (logging.NOTSET, logging.WARNING):
        log.setLevel(as_it_comes)
        _quiet("a_client_of_ours")
        assert log.level == logging.CRITICAL
    log.setLevel(logging.DEBUG)
    _quiet("a_client_of_ours")
    assert log.level == logging.DEBUG
