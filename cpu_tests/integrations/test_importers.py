"""Importing what other vector stores wrote: real files of theirs, every format, resuming, verification, refusals."""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SEED
from typer.testing import CliRunner

from memevolve_gpu import VectorStore, cli
from memevolve_gpu.errors import ConfigurationError, InvalidUnitError, LegacyImportError, StorageError
from memevolve_gpu.integrations.importers import Source, import_into, open_source, write_parquet

DIM = 8
COUNT = 2_300
METADATA = {"lang": "en", "score": 1.5, "created_at": "2020-01-01T00:00:00Z"}


def vectors(count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(SEED).standard_normal((count, DIM)).astype(np.float32)


def entries(count: int = COUNT) -> list[dict[str, Any]]:
    rows = vectors(count)
    return [
        {"id": f"id-{n}", "text": f"text {n}", "vector": rows[n].tolist(), "number": n, **METADATA}
        for n in range(count)
    ]


def opened(path: Path, metric: str = "l2") -> VectorStore:
    return VectorStore(path, None, DIM, storage_config={"background": False, "metric": metric})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with opened(tmp_path / "m") as one:
        yield one


def checked(store: VectorStore, source: Source, count: int = COUNT) -> None:
    """Import, and compare with what was written, not with what the source says."""
    report = import_into(store, source)
    assert (report.imported, report.verified, report.vectors_compared) == (count, count, count)
    rows = vectors(count)
    held = {unit["id"]: (unit, vector) for unit, vector in store.export_rows()}
    assert len(held) == count
    for number in range(count):
        unit, vector = held[f"id-{number}"]
        assert unit["content"] == f"text {number}"
        assert unit["metadata"] == {"number": number, **METADATA}
        assert np.array_equal(vector, rows[number])
    again = import_into(store, source)
    assert (again.imported, again.present, again.replaced) == (0, count, 0)


def test_chroma(tmp_path: Path, store: VectorStore) -> None:
    chromadb = pytest.importorskip("chromadb", reason="chromadb is not installed")
    client = chromadb.PersistentClient(str(tmp_path / "c"), chromadb.config.Settings(anonymized_telemetry=False))
    held = client.create_collection(
        "one", embedding_function=None, metadata={"hnsw:space": "ip"}
    )  # cosine keeps lengths of 1 only
    given = entries()
    for at in range(0, COUNT, 1000):
        page = given[at : at + 1000]
        held.add(
            ids=[one["id"] for one in page],
            documents=[one["text"] for one in page],
            embeddings=vectors()[at : at + 1000],
            metadatas=[{"number": one["number"], **METADATA} for one in page],
        )
    source = open_source("chroma", str(tmp_path / "c"))
    assert (source.metric, source.dimension(), source.count) == ("ip", DIM, COUNT)
    checked(store, source)
    client.create_collection("two", embedding_function=None)
    with pytest.raises(ConfigurationError, match=r"'one', 'two'|'two', 'one'"):
        open_source("chroma", str(tmp_path / "c"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=r"chroma\.sqlite3"):
        open_source("chroma", str(tmp_path / "empty"))


def test_lancedb(tmp_path: Path, store: VectorStore) -> None:
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    columns = {key: [one[key] for one in entries()] for key in entries(1)[0]}
    columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors().ravel()), DIM)
    lancedb.connect(tmp_path / "l").create_table("one", pyarrow.table(columns))
    checked(store, open_source("lancedb", str(tmp_path / "l")))


def test_qdrant(tmp_path: Path, store: VectorStore) -> None:
    qdrant = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    models = qdrant.models
    client = qdrant.QdrantClient(path=str(tmp_path / "q"))
    client.create_collection("one", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.EUCLID))
    points = [models.PointStruct(id=n, vector=vectors()[n].tolist(), payload={"data": f"t{n}"}) for n in range(50)]
    client.upsert("one", points)
    client.close()
    source = open_source("qdrant", str(tmp_path / "q"))
    report = import_into(store, source)
    assert (report.imported, report.vectors_compared, source.metric) == (50, 50, "l2")
    assert store.retrieve("7")["content"] == "t7"  # type: ignore[index]
    assert np.array_equal(store.vectors_of(["7"])["7"], vectors()[7])


def docstore(**held: Any) -> bytes:
    """The pickle of LangChain's FAISS store, whose class is made up here: its package is not a dependency."""
    document = pytest.importorskip("langchain_core.documents").Document
    module = types.ModuleType("langchain_community.docstore.in_memory")
    module.InMemoryDocstore = type("InMemoryDocstore", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    table: Any = module.InMemoryDocstore()
    rows = entries(20)
    table._dict = {
        one["id"]: document(id=one["id"], page_content=one["text"], metadata={"number": one["number"], **METADATA})
        for one in rows
    }
    table._dict.update(held)
    for name in ("langchain_community", "langchain_community.docstore", module.__name__):
        sys.modules.setdefault(name, module)
    sys.modules[module.__name__] = module
    try:
        return pickle.dumps((table, {n: one["id"] for n, one in enumerate(rows)}))
    finally:
        for name in list(sys.modules):
            if name.startswith("langchain_community"):
                del sys.modules[name]


def test_faiss_of_langchain(tmp_path: Path, store: VectorStore) -> None:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(DIM)
    index.add(vectors(20))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    (tmp_path / "index.pkl").write_bytes(docstore())
    checked(store, open_source("faiss-langchain", str(tmp_path)), 20)
    index.add(vectors(1))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    with pytest.raises(InvalidUnitError, match="21 vectors for 20"):
        open_source("faiss-langchain", str(tmp_path))


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize("wrong", ["evil", "evil document", "cut off", "another", "missing"])
def test_a_docstore_that_wants_more_is_refused(tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    whole = docstore() if wrong != "evil document" else docstore(x=Evil())
    data = {"evil": pickle.dumps(Evil()), "cut off": whole[:-40], "another": pickle.dumps({"a": 1})}.get(wrong, whole)
    if wrong != "missing":
        (tmp_path / "index.pkl").write_bytes(data)
    with pytest.raises(LegacyImportError, match=r"index\.pkl"):
        open_source("faiss-langchain", str(tmp_path))
    assert "run" not in capsys.readouterr().out.split()


def test_jsonl_with_vectors(tmp_path: Path, store: VectorStore) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in entries()), encoding="utf-8")
    checked(store, open_source("jsonl", str(file)))


def test_parquet_there_and_back(tmp_path: Path, store: VectorStore) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    units = [{"id": f"u{n}", "type": "skill", "content": f"text {n}", "tags": ["a"], "deep": [{}]} for n in range(1500)]
    store.store_batch(units, vectors(1500))
    file = tmp_path / "x.parquet"
    assert write_parquet(str(file), store.export_rows(), "model") == 1500
    with opened(tmp_path / "again") as again:
        report = import_into(again, open_source("parquet", str(file)))
        assert report.vectors_compared == 1500
        both = zip(again.export_rows(), store.export_rows(), strict=True)
        assert all(ours == theirs and np.array_equal(mine, other) for (ours, mine), (theirs, other) in both)


def test_parquet_of_others(tmp_path: Path, store: VectorStore) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(entries())
    parquet.write_table(table, tmp_path / "x.parquet")
    checked(store, open_source("parquet", str(tmp_path / "x.parquet")))


def test_mem0_is_embedded_again(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    memories = [{"id": "a", "memory": "likes tea", "user_id": "alice", "metadata": {"x": 1}, "score": None}]
    for document in ({"results": memories}, memories):
        file.write_text(json.dumps(document), encoding="utf-8")
        prefix = tmp_path / type(document).__name__
        config = {"background": False}
        with VectorStore(prefix, lambda text: np.full(DIM, len(text), np.float32), DIM, storage_config=config) as store:
            assert import_into(store, open_source("mem0", str(file))).imported == 1
            unit = store.retrieve("a") or {}
            assert unit["content"] == "likes tea"
            assert {"user_id": "alice", "x": 1}.items() <= unit["metadata"].items()


def lines(tmp_path: Path, *given: Any) -> Source:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in given), encoding="utf-8")
    return open_source("jsonl", str(file))


def test_an_interrupted_import_continues(tmp_path: Path, store: VectorStore) -> None:
    source = lines(tmp_path, *entries(250))

    def stop(stage: str, share: float) -> None:
        if share > 0.5 or store.count() >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_into(store, source, page_size=100, progress=stop)
    assert 0 < store.count() < 250
    begun = store.count()
    report = import_into(store, source, page_size=100)
    assert (report.present, report.imported, report.verified) == (begun, 250 - begun, 250)


def test_other_units_of_the_same_id_are_refused_or_replaced(tmp_path: Path, store: VectorStore) -> None:
    source = lines(tmp_path, *entries(3))
    store.store_batch([{"id": "id-1", "content": "mine"}], vectors(1))
    with pytest.raises(ConfigurationError, match="id-1"):
        import_into(store, source)
    assert (store.retrieve("id-1") or {})["content"] == "mine"
    assert import_into(store, source, replace=True).replaced == 1
    changed = vectors(3)
    changed[2][0] += 1
    store.store_batch([store.retrieve("id-2") or {}], changed[2:])
    assert import_into(store, source, replace=True).replaced == 1  # the vector counts, too


def test_a_store_that_changes_what_it_was_given_is_found_out(tmp_path: Path, store: VectorStore) -> None:
    source = lines(tmp_path, *entries(3))

    def meddle(stage: str, _share: float) -> None:
        if stage == "importing":
            store.patch("id-1", {"content": "else"}) if store.embedding_function else store.delete("id-1")

    with pytest.raises(StorageError, match="id-1"):
        import_into(store, source, progress=meddle)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"text": "no id"}], "no id"),
        ([[1]], "object"),
        ([{"id": "a", "vector": [1.0]}, {"id": "a", "vector": [1.0]}], "twice"),
        ([{"id": "a", "vector": [0.0] * DIM}, {"id": "b"}], "no vector"),
        ([{"id": "a", "vector": "?"}], "must be a list of numbers"),
        ([{"id": "a", "vector": [[1.0]]}], "shape"),
    ],
)
def test_bad_entries_are_named(tmp_path: Path, store: VectorStore, given: list[Any], said: str) -> None:
    with pytest.raises(InvalidUnitError, match=said):
        import_into(store, lines(tmp_path, *given))
    assert store.count() == 0


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="kind"):
        open_source("pinecone", str(tmp_path))
    with pytest.raises(ConfigurationError, match="path"):
        open_source("lancedb", str(tmp_path / "no"))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ConfigurationError, match="pip install lancedb"):
        open_source("lancedb", str(tmp_path))


def test_the_quick_start_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (repository / "docs" / "how-to" / "import.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "1 1\n"


def command(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [*words])
    return result.exit_code, result.output


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    monkeypatch.chdir(tmp_path)
    lines(tmp_path, *entries(5))
    code, said = command("import", "--from", "jsonl", "x.jsonl", "--store", "one", "--metric", "cosine")
    assert (code, "imported 5 units" in said, "5 vectors bit by bit" in said) == (0, True, True)
    code, said = command("import", "--from", "jsonl", "x.jsonl", "--store", "one", "--json")
    assert code == 0
    assert {"imported": 0, "present": 5, "verified": 5, "count": 5}.items() <= json.loads(said).items()
    assert command("export", "x.parquet", "--store", "one")[0] == 0
    assert command("export", "x.parquet", "--store", "one")[0] == 2
    assert command("import", "--from", "parquet", "x.parquet", "--store", "two", "--metric", "cosine")[0] == 0
    with opened(tmp_path / "one", "cosine") as one, opened(tmp_path / "two", "cosine") as two:
        both = zip(one.export_rows(), two.export_rows(), strict=True)
        assert all(ours == theirs and np.array_equal(mine, other) for (ours, mine), (theirs, other) in both)
    lines(tmp_path, {**entries(1)[0], "text": "else"})
    code, said = command("import", "--from", "jsonl", "x.jsonl", "--store", "one")
    assert code != 0
    assert "id-0" in said
    assert command("import", "--from", "jsonl", "x.jsonl", "--store", "one", "--replace")[0] == 0
    assert command("import", "x.jsonl", "--replace", "--store", "one")[0] == 2
