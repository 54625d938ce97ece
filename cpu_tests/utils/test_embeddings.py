"""Embedding functions, the adapter that the store uses, and the check of vectors at the border."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from support import SEED, each

from memevolve_gpu.errors import (
    ConfigurationError,
    DimensionMismatchError,
    EmbeddingError,
    EngineError,
    InvalidVectorError,
)
from memevolve_gpu.types import FloatArray, Metric
from memevolve_gpu.utils.embeddings import BatchEmbeddingFunction, Embedder, EmbeddingFunction, HashingEmbedder
from memevolve_gpu.utils.vectors import check_vector, check_vectors, normalize_rows


def random_vectors(count: int, dim: int) -> FloatArray:
    return np.random.default_rng(SEED).normal(size=(count, dim)).astype(np.float32)


class FakeTensor:
    """The part of a torch tensor on a GPU that is needed to bring it home."""

    def __init__(self, values: Any, dtype: str = "float32") -> None:
        self.values, self.dtype, self.at_home = np.asarray(values), dtype, False

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __len__(self) -> int:
        return len(self.values)

    def detach(self) -> FakeTensor:
        return self

    def cpu(self) -> FakeTensor:
        self.at_home = True
        return self

    def float(self) -> FakeTensor:
        self.dtype = "float32"
        return self

    def numpy(self) -> Any:
        if not self.at_home or self.dtype == "bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values.astype(self.dtype)


class FakeCupy:
    """The part of a cupy array that is needed to bring it home."""

    __cuda_array_interface__: ClassVar[dict[str, Any]] = {}

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __len__(self) -> int:
        return len(self.values)

    def get(self) -> Any:
        return self.values


# --- vectors ----------------------------------------------------------------------------------------------------


@each(
    "given",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], dtype=np.int64),
        np.array([1, 2, 3], dtype=np.uint8),
        np.array([1, 2, 3], dtype=np.float16),
        np.array([[1, 2, 3]], dtype=np.float64),
        np.array([1, 0, 2, 0, 3, 0], dtype=np.float32)[::2],
        np.array([1, 2, 3], dtype=">f4"),
        FakeTensor([1, 2, 3]),
        FakeTensor([1, 2, 3], "bfloat16"),
        FakeCupy([1, 2, 3]),
    ],
)
def test_whatever_holds_numbers_becomes_float32(given: Any) -> None:
    vector = check_vector(given, 3, "l2")
    assert vector.dtype == np.dtype("=f4")
    assert vector.flags.c_contiguous
    assert vector.tolist() == [1.0, 2.0, 3.0]
    many = check_vectors([given] if np.ndim(vector) == 1 and not _has_outer_axis(given) else given, 3, "l2")
    assert many.dtype == np.dtype("=f4")
    assert many.tolist() == [[1.0, 2.0, 3.0]]


def _has_outer_axis(given: Any) -> bool:
    return isinstance(given, np.ndarray) and given.ndim == 2


@each(
    ("given", "says"),
    [
        ("abc", "real numbers"),
        (b"abc", "real numbers"),
        (None, "NoneType"),
        ({"a": 1}, "dict"),
        ([True, False, True], "bool"),
        ([1j, 2, 3], "complex"),
        (["1", "2", "3"], "real numbers"),
        ([None, 1, 2], "real numbers"),
        ([[1, 2], 3, 4], "no array of numbers"),
        ([2**70, 1, 2], "real numbers"),
        ([1.0, float("nan"), 2.0], "NaN or infinity"),
        ([1.0, float("-inf"), 2.0], "NaN or infinity"),
        ([1e39, 0.0, 0.0], "beyond float32"),
        ([-1e39, 0.0, 0.0], "1e\\+39"),
        (7.0, "shape"),
        ([[1, 2, 3], [4, 5, 6]], "one row"),
    ],
)
def test_a_vector_that_cannot_be_used_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InvalidVectorError, match=says):
        check_vector(given, 3, "l2", name="query")
    with pytest.raises(InvalidVectorError, match="query"):
        check_vector(given, 3, "l2", name="query")


@pytest.mark.parametrize("given", [[1.0, 2.0], [1.0] * 4, [], np.zeros((1, 5))])
def test_a_vector_of_another_length_names_both_lengths(given: Any) -> None:
    got = np.asarray(given).shape[-1]
    with pytest.raises(DimensionMismatchError, match=f"^Embedding dimension mismatch: expected 3, got {got}"):
        check_vector(given, 3, "l2")
    with pytest.raises(ValueError, match="dimension mismatch"):
        check_vectors(np.atleast_2d(given) if np.size(given) else [[]], 3, "l2")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 17, 99])
def test_the_bad_row_of_many_is_named(bad: float, row: int) -> None:
    vectors = random_vectors(100, 8)
    vectors[row, 5] = bad
    with pytest.raises(InvalidVectorError, match=rf"embeddings\[{row}\] contains NaN"):
        check_vectors(vectors, 8, "ip")


def test_the_row_of_another_length_is_named() -> None:
    with pytest.raises(DimensionMismatchError, match=r"expected 3, got 2; embeddings\[1\]"):
        check_vectors([[1, 2, 3], [1, 2], [1, 2, 3]], 3, "l2")


@pytest.mark.parametrize("given", ["abc", None, 5.0, [1.0, 2.0, 3.0], np.zeros((2, 3, 3)), ["abc", "def"]])
def test_what_are_no_rows_is_refused(given: Any) -> None:
    with pytest.raises(InvalidVectorError):
        check_vectors(given, 3, "l2")


def test_no_rows_at_all_have_the_right_shape() -> None:
    nothing: list[Any] = [[], (), np.empty((0, 3)), np.empty((0,))]
    for given in nothing:
        assert check_vectors(given, 3, "l2").shape == (0, 3)


@pytest.mark.parametrize(("metric", "refused"), [("l2", False), ("ip", False), ("cosine", True)])
def test_zero_vectors_are_refused_under_cosine_alone(metric: Metric, refused: bool) -> None:
    vectors = np.zeros((2, 3), dtype=np.float32)
    vectors[0, 0] = 1
    if not refused:
        assert check_vector(vectors[1], 3, metric).tolist() == [0, 0, 0]
        assert check_vectors(vectors, 3, metric).tolist() == vectors.tolist()
        return
    with pytest.raises(InvalidVectorError, match="zero vector"):
        check_vector(vectors[1], 3, metric)
    with pytest.raises(InvalidVectorError, match=r"embeddings\[1\] is a zero vector"):
        check_vectors(vectors, 3, metric)


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e-15, 1.0, 1e15, 1e17])
def test_very_small_and_very_large_vectors_are_good_and_normalise(scale: float) -> None:
    vectors = random_vectors(3, 16)
    vectors[1] = 0
    vectors[1, :2] = np.float32(scale), -np.float32(scale)
    assert check_vector(vectors[1], 16, "cosine").tolist() == vectors[1].tolist()
    normal = normalize_rows(check_vectors(vectors, 16, "cosine"))
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal[1, :2], [0.5**0.5, -(0.5**0.5)], rtol=1e-6)
    assert normal[0].tobytes() == normalize_rows(vectors[:1])[0].tobytes(), "a row depends on its neighbours"


def test_normalised_rows_have_length_one_and_do_not_depend_on_their_neighbours() -> None:
    vectors = random_vectors(500, 96)
    normal = normalize_rows(vectors)
    np.testing.assert_allclose(np.linalg.norm(normal.astype(np.float64), axis=1), 1.0, atol=1e-6)
    for row in range(0, 500, 37):
        assert normalize_rows(vectors[row : row + 1])[0].tobytes() == normal[row].tobytes()


def test_zero_rows_stay_zero_when_normalised() -> None:
    assert normalize_rows(np.zeros((2, 4), dtype=np.float32)).tolist() == [[0.0] * 4] * 2


# --- the adapter ------------------------------------------------------------------------------------------------


class Counting:
    """An embedding function that counts its calls; the vector holds the text's length and first letter."""

    def __init__(self, dim: int = 4) -> None:
        self.dim, self.texts = dim, list[str]()

    def __call__(self, text: str, /) -> Any:
        self.texts.append(text)
        return [float(len(text)), float(ord(text[0])) if text else 0.0, *[1.0] * (self.dim - 2)]


class CountingBatch(Counting):
    """The same with ``embed_batch``, whose output ``shape`` decides."""

    def __init__(self, dim: int = 4, shape: Callable[[Any], Any] = np.asarray) -> None:
        super().__init__(dim)
        self.batches, self.shape = list[int](), shape

    def embed_batch(self, texts: Sequence[str], /) -> Any:
        self.batches.append(len(texts))
        return self.shape([Counting.__call__(Counting(self.dim), text) for text in texts])


def returning(value: Any) -> Callable[[str], Any]:
    return lambda text: value


TEXTS = [f"{chr(97 + number % 26)}{'x' * (number % 7)}" for number in range(600)]


def test_the_dimension_is_detected_once_and_only_when_asked() -> None:
    function = Counting(7)
    embedder = Embedder(function)
    assert function.texts == []
    assert (embedder.dimension, embedder.dimension) == (7, 7)
    assert len(function.texts) == 1


def test_the_first_embedding_spares_the_probe() -> None:
    function = Counting(5)
    embedder = Embedder(function)
    embedder.embed("hello")
    assert embedder.dimension == 5
    assert function.texts == ["hello"]


def test_a_declared_dimension_spares_the_probe() -> None:
    embedder = Embedder(HashingEmbedder(48))
    assert embedder.dimension == 48
    assert embedder.model_name == "hashing-lexical-48"


@pytest.mark.parametrize("declared", [True, 0, -3, "384", None, 3.5])
def test_a_declared_dimension_that_is_none_is_ignored(declared: Any) -> None:
    function = Counting(6)
    function.dimension = declared  # type: ignore[attr-defined]
    assert Embedder(function).dimension == 6


def test_a_function_without_a_name_has_no_model_name() -> None:
    assert Embedder(lambda text: [1.0]).model_name is None


def test_another_dimension_than_asked_for_is_refused() -> None:
    embedder = Embedder(Counting(4), dim=8)
    for call in (embedder.embed, embedder.embed_query, lambda text: embedder.embed_many([text])):
        with pytest.raises(DimensionMismatchError, match=r"^Embedding dimension mismatch: expected 8, got 4"):
            call("hello")
    with pytest.raises(DimensionMismatchError, match="expected 8, got 4"):
        Embedder(CountingBatch(4), dim=8).embed_many(["a", "b"])


def test_a_function_that_changes_its_dimension_is_refused() -> None:
    embedder = Embedder(lambda text: [1.0] * len(text))
    assert embedder.embed("abc").shape == (3,)
    with pytest.raises(DimensionMismatchError, match="expected 3, got 5"):
        embedder.embed("abcde")


@pytest.mark.parametrize("function", [Counting(), CountingBatch()], ids=["single", "batch"])
def test_many_texts_come_back_in_order(function: Counting) -> None:
    seen = list[tuple[int, int]]()
    vectors = Embedder(function).embed_many(TEXTS, progress=lambda done, total: seen.append((done, total)))
    assert vectors.shape == (600, 4)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [Counting()(text) for text in TEXTS]
    assert seen == [(256, 600), (512, 600), (600, 600)]
    if isinstance(function, CountingBatch):
        assert function.batches == [256, 256, 88]


def test_no_texts_give_no_rows() -> None:
    assert Embedder(Counting(9)).embed_many([]).shape == (0, 9)


@pytest.mark.parametrize(
    "shape",
    [np.asarray, list, tuple, lambda rows: [np.asarray(row) for row in rows], FakeTensor, FakeCupy,
     lambda rows: [FakeTensor(row) for row in rows]],
)  # fmt: skip
def test_a_batch_may_be_any_array(shape: Callable[[Any], Any]) -> None:
    vectors = Embedder(CountingBatch(4, shape)).embed_many(TEXTS[:5])
    assert vectors.tolist() == [Counting()(text) for text in TEXTS[:5]]


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_a_batch_of_another_count_is_refused(count: int) -> None:
    with pytest.raises(EmbeddingError, match=f"{count} vectors for 5 texts"):
        Embedder(CountingBatch(4, lambda rows: (rows * 2)[:count])).embed_many(TEXTS[:5])


@pytest.mark.parametrize("nonsense", [None, "vector", {"a": 1}, 3.0, [], [[1.0, 2.0], [1.0, 2.0]], [1.0, float("nan")]])
def test_nonsense_from_the_function_is_its_own_error(nonsense: Any) -> None:
    embedder = Embedder(returning(nonsense))
    with pytest.raises((EmbeddingError, DimensionMismatchError), match=r"text 0 \('hello'\)|expected 1, got 0"):
        embedder.embed("hello")


@pytest.mark.parametrize("nonsense", [None, "vectors", [1.0] * 5, np.full((5, 4), np.nan), np.zeros((5, 2, 2))])
def test_nonsense_from_a_batch_is_its_own_error(nonsense: Any) -> None:
    with pytest.raises(EmbeddingError, match=r"texts 0 to 4 \(the first is 'a'\)"):
        Embedder(CountingBatch(4, lambda rows: nonsense)).embed_many(TEXTS[:5])


def test_a_row_of_one_is_one_vector() -> None:
    assert Embedder(returning([[1.0, 2.0]])).embed("hello").tolist() == [1.0, 2.0]


def test_a_failure_names_the_text_and_its_position_and_keeps_the_cause() -> None:
    def fails(text: str) -> Any:
        if text.startswith("bad"):
            raise ConnectionError("no route to host")
        return [1.0, 2.0]

    long = "bad " + "y" * 100
    with pytest.raises(EmbeddingError) as caught:
        Embedder(fails).embed_many(["good"] * 300 + [long])
    message = str(caught.value)
    assert "text 300" in message
    assert repr(long[:60] + "...") in message
    assert "ConnectionError: no route to host" in message
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert isinstance(caught.value, RuntimeError)


def test_a_missing_installation_is_reported_as_it_is() -> None:
    def fails(text: str) -> Any:
        raise EngineError("install this")

    with pytest.raises(EngineError, match="install this"):
        Embedder(fails).embed("hello")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_failure_of_the_function(stop: type[BaseException]) -> None:
    def interrupted(text: str) -> Any:
        raise stop

    with pytest.raises(stop):
        Embedder(interrupted).embed("hello")


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["list"]])
def test_only_text_is_embedded(text: Any) -> None:
    embedder = Embedder(CountingBatch())
    for call in (embedder.embed, embedder.embed_query, lambda text: embedder.embed_many(["good", text])):
        with pytest.raises(EmbeddingError, match="must be a str"):
            call(text)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(EmbeddingError, match="embedding_function must be callable"):
        Embedder("model name")  # type: ignore[arg-type]


def test_vectors_do_not_share_memory_with_the_function() -> None:
    buffer = np.ones(3, dtype=np.float32)
    embedder = Embedder(returning(buffer))
    vector, query, many = embedder.embed("a"), embedder.embed_query("a"), embedder.embed_many(["a"])
    buffer[:] = 9
    assert vector.tolist() == query.tolist() == many[0].tolist() == [1.0, 1.0, 1.0]


def test_a_repeated_query_is_embedded_once() -> None:
    function = Counting()
    embedder = Embedder(function)
    first, second = embedder.embed_query("hello"), embedder.embed_query("hello")
    assert function.texts == ["hello"]
    assert first.tolist() == second.tolist()
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1.0


def test_the_query_memory_is_bounded_and_forgets_the_oldest() -> None:
    function = Counting()
    embedder = Embedder(function)
    for number in range(257):
        embedder.embed_query(f"query {number}")
    embedder.embed_query("query 256")
    assert len(function.texts) == 257
    embedder.embed_query("query 0")
    assert len(function.texts) == 258
    for _ in range(2):
        embedder.embed_query("z" * 20_000)
    assert len(function.texts) == 260, "a very long query is not worth remembering"


def test_a_failed_query_is_tried_again() -> None:
    answers = iter([ConnectionError("down"), [1.0, 2.0]])

    def recovers(text: str) -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    embedder = Embedder(recovers)
    with pytest.raises(EmbeddingError):
        embedder.embed_query("hello")
    assert embedder.embed_query("hello").tolist() == [1.0, 2.0]


def test_threads_share_an_embedder() -> None:
    embedder = Embedder(HashingEmbedder(32))
    expected = {text: HashingEmbedder(32)(text).tolist() for text in set(TEXTS)}
    wrong = list[str]()

    def ask(offset: int) -> None:
        for text in TEXTS[offset:] + TEXTS[:offset]:
            if embedder.embed_query(text).tolist() != expected[text]:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in (0, 150, 300, 450)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- hashing ----------------------------------------------------------------------------------------------------

GOLDEN_TEXTS = ["", "Use git rebase --onto to move a branch.", "日本語のテキスト", "a\x00b \ud800", "the the the"]
GOLDEN = "e6fde8bac200d83c2ac1f4a9b61ba6c7729f5095519a5371064bcf3b1e03ba9d"


def test_hashing_gives_the_same_bytes_everywhere() -> None:
    digest = hashlib.sha256(HashingEmbedder(384).embed_batch(GOLDEN_TEXTS).astype("<f4").tobytes()).hexdigest()
    assert digest == GOLDEN, "stores filled with the hashing function can no longer be searched"


def test_hashing_does_not_depend_on_the_process() -> None:
    script = (
        "import sys; from memevolve_gpu.utils.embeddings import HashingEmbedder;"
        "sys.stdout.write(HashingEmbedder(64)('move a branch').tobytes().hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {HashingEmbedder(64)("move a branch").tobytes().hex()}


def test_hashing_is_an_embedding_function() -> None:
    embedder = HashingEmbedder(100)
    assert isinstance(embedder, EmbeddingFunction)
    assert isinstance(embedder, BatchEmbeddingFunction)
    vector = embedder("some text")
    assert (vector.shape, vector.dtype) == ((100,), np.dtype(np.float32))
    assert embedder.embed_batch([]).shape == (0, 100)


def test_hashing_one_by_one_equals_hashing_in_a_batch() -> None:
    texts = [*GOLDEN_TEXTS, *TEXTS, "w " * 250_000, *TEXTS[:10]]
    embedder = HashingEmbedder(128)
    many = embedder.embed_batch(texts)
    assert all(many[row].tobytes() == embedder(text).tobytes() for row, text in enumerate(texts))


@each("dimension", [1, 2, 8, 384])
@each("text", ["", " ", "...", "a", "a b", "\ud800", "é" * 10, "x" * 300_000])
def test_hashing_never_gives_a_zero_vector(text: str, dimension: int) -> None:
    vector = HashingEmbedder(dimension)(text)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)


def test_hashing_puts_texts_with_common_words_nearer() -> None:
    embedder = HashingEmbedder()
    query = embedder("how to undo the last git commit")
    near = embedder("Undo the last commit with git reset --soft HEAD~1")
    typo = embedder("undo last git comit")
    far = embedder("Bake bread at 220 degrees for forty minutes")
    assert query @ near > 0.3
    assert query @ typo > 0.3
    assert abs(query @ far) < 0.2


@pytest.mark.parametrize("dimension", [0, -1, 3.5, "384", True, None])
def test_hashing_wants_a_positive_dimension(dimension: Any) -> None:
    with pytest.raises(ConfigurationError, match="dimension must be a positive integer"):
        HashingEmbedder(dimension)
