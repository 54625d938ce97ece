"""A cross-encoder by name or path: a small ONNX model made here goes through fastembed's real loading code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from memevolve_gpu import HashingEmbedder, VectorStore
from memevolve_gpu.components.retrieve import HybridRetrievalStrategy
from memevolve_gpu.errors import ConfigurationError, EmbeddingError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fastembed") is None,
    reason="fastembed is not installed: pip install 'memevolve-gpu[local]'",
)

INT64, FLOAT = 7, 1


def field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def node(op: str, inputs: str, output: str, *attributes: tuple[str, int]) -> bytes:
    made = b"".join(field(1, name) for name in inputs.split()) + field(2, output) + field(4, op)
    return field(1, made + b"".join(field(5, field(1, name) + field(3, n) + field(20, 2)) for name, n in attributes))


def constant(name: str, value: int) -> bytes:
    return field(5, field(1, 1) + field(2, INT64) + field(8, name) + field(9, value.to_bytes(8, "little")))


def tensor(number: int, name: str, kind: int, *shape: str) -> bytes:
    sizes = b"".join(field(1, field(2, size)) for size in shape)
    return field(number, field(1, name) + field(2, field(1, field(1, kind) + field(2, sizes))))


def shared_words_model() -> bytes:
    """An ONNX model whose one output counts the pairs of equal tokens in the first and the second text."""
    graph = (
        node("Sub", "one token_type_ids", "first")
        + node("Mul", "input_ids first", "query")
        + node("Mul", "input_ids token_type_ids", "others")
        + node("Sub", "others first", "text")  # -1 where a token is of the query
        + node("Unsqueeze", "query two", "rows")
        + node("Unsqueeze", "text one", "columns")
        + node("Equal", "rows columns", "equal")
        + node("Cast", "equal", "pairs", ("to", FLOAT))
        + node("ReduceSum", "pairs two", "sums", ("keepdims", 0))
        + node("ReduceSum", "sums one", "logits", ("keepdims", 1))
        + field(2, "shared words")
        + constant("one", 1)
        + constant("two", 2)
        + b"".join(tensor(11, name, INT64, "batch", "length") for name in ("input_ids", "token_type_ids"))
        + tensor(12, "logits", FLOAT, "batch", "score")
    )
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the model and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "dog", "ran"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    files: dict[str, Any] = {
        "config.json": {"pad_token_id": 0},
        "tokenizer_config.json": {"model_max_length": 64, "pad_token": "[PAD]"},
        "special_tokens_map.json": {"pad_token": "[PAD]"},
    }
    for name, held in files.items():
        (tmp_path / name).write_text(json.dumps(held), encoding="utf-8")
    (tmp_path / "model.onnx").write_bytes(shared_words_model())
    return tmp_path


def test_a_cross_encoder_in_a_file_reorders_results(folder: Path) -> None:
    texts = ["dog ran", "the cat ran", "the cat sat on the mat"]
    with VectorStore(folder / "m", HashingEmbedder(64)) as store:
        store.store_batch([{"id": str(at), "content": text} for at, text in enumerate(texts)])
        for named in (folder, folder / "model.onnx"):
            found = HybridRetrievalStrategy(rerank=str(named)).retrieve("cat sat mat", store, 3)
            assert [one.unit_id for one in found] == ["2", "1", "0"]
            assert [one.score - found[-1].score for one in found] == [3.0, 1.0, 0.0]


def test_a_cross_encoder_that_cannot_be_had_is_an_error_that_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FASTEMBED_CACHE_PATH", str(folder / "empty"))
    with VectorStore(folder / "m", HashingEmbedder(64)) as store:
        store.store({"id": "a", "content": "cat"})
        named = HybridRetrievalStrategy(rerank="ms-marco-MiniLM-L-6-v2")
        with pytest.raises(EmbeddingError, match=r"ms-marco-MiniLM-L-6-v2.*path of an ONNX file"):
            named.retrieve("cat", store)
        (folder / "model.onnx").write_bytes(b"no model")
        with pytest.raises(EmbeddingError, match="cannot be loaded"):
            HybridRetrievalStrategy(rerank=str(folder)).retrieve("cat", store)
    with pytest.raises(ConfigurationError, match=r"rerank must be .*ms-marco"):
        HybridRetrievalStrategy(rerank="no-such-model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        HybridRetrievalStrategy(rerank=str(folder))
