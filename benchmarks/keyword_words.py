"""What the words of the keyword index cost and find, beside FTS5's own ``unicode61``.

    python benchmarks/keyword_words.py [--data FOLDER] [--locomo ZIP] [--json FILE]

Data: the folder of real units (default ``../shared/data``), and the zip of snap-research/locomo's conversations. Times
are processor time, medians of rounds that take turns. ``unicode61`` answers a query by FTS5's rank over all its words.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import numpy as np
from harness import load, machine, publish

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.components.store.units import unit_to_text
from memevolve_gpu.records import Records, fulltext_buffer
from memevolve_gpu.records.tokenizer import Words, words_of

ROWS, ROUNDS = 20_000, 5
PLAIN = "content='', contentless_delete=1, tokenize='unicode61 remove_diacritics 2'"
ASCII = "content='', contentless_delete=1, tokenize=\"ascii tokenchars '-_.+#/@'\""
OWN = "content='', contentless_delete=1, tokenize='own'"
Find = Callable[[str, int, Any], list[str]]


def called(_con: apsw.Connection, _args: list[str]) -> Callable[..., Iterator[str]]:
    """A tokenizer in Python that FTS5 calls."""

    def tokens(raw: bytes, _flags: int, _locale: str | None) -> Iterator[str]:
        words = words_of(raw.decode())
        yield from words.text.split()
        yield from words.more.split()

    return tokens


def merged(columns: str, options: str, rows: Callable[[], Iterable[Sequence[Any]]]) -> tuple[float, int]:
    """Microseconds of processor time for a text, and bytes of the index."""
    con = apsw.Connection(":memory:")
    con.register_fts5_tokenizer("own", called)
    con.execute(f"CREATE VIRTUAL TABLE w USING fts5({columns}, {options})")
    marks = ", ".join("?" * (columns.count(",") + 2))
    begun = time.process_time()
    with con:
        con.executemany(f"INSERT INTO w (rowid, {columns}) VALUES ({marks})", rows())
    took = time.process_time() - begun
    return 1e6 * took / ROWS, int(con.execute("SELECT sum(length(block)) FROM w_data").get)


def ways(texts: list[str]) -> dict[str, Any]:
    """FTS5 over the same texts in every way, the first round left out: it fills the cache of words."""
    tried: dict[str, tuple[str, str, Callable[[], Iterable[Sequence[Any]]]]] = {
        "unicode61": ("text", PLAIN, lambda: enumerate(texts)),
        "our words, called by FTS5": ("text", OWN, lambda: enumerate(texts)),
        "our words, joined before": ("text, more", ASCII, lambda: ((at, *words_of(t)) for at, t in enumerate(texts))),
    }
    found = [{name: merged(*how) for name, how in tried.items()} for _ in range(ROUNDS + 1)][1:]
    return {
        name: {
            "us a text": round(float(np.median([one[name][0] for one in found])), 1),
            "index MB": round(found[0][name][1] / 1e6, 2),
        }
        for name in tried
    }


def bulk(units: list[dict[str, Any]], vectors: np.ndarray) -> dict[str, float]:
    """Microseconds a unit of ``store_batch``: FTS5 is given our words, or the text itself."""
    took: dict[str, list[float]] = {"our words": [], "the text itself": []}
    for _ in range(ROUNDS + 1):
        for name, make in (("the text itself", lambda text, _stemming: Words(text, "")), ("our words", words_of)):
            setattr(fulltext_buffer, "words_of", make)  # noqa: B010 - no name of that module
            with (
                tempfile.TemporaryDirectory() as folder,
                VectorStore(f"{folder}/s", None, 384, storage_config=StorageConfig(background=False)) as store,
            ):
                begun = time.process_time()
                store.store_batch(units, vectors)
                took[name].append(1e6 * (time.process_time() - begun) / len(units))
    setattr(fulltext_buffer, "words_of", words_of)  # noqa: B010
    result = {name: round(float(np.median(each[1:])), 1) for name, each in took.items()}
    return {**result, "ratio": round(result["our words"] / result["the text itself"], 2)}


def read_locomo(path: Path) -> tuple[list[dict[str, Any]], list[tuple[str, int, set[str]]]]:
    """The turns as units, and (question, conversation, ids of its evidence)."""
    units, asked = [], []
    with zipfile.ZipFile(path) as archive:
        for at, name in enumerate(sorted(one for one in archive.namelist() if one.endswith(".json"))):
            held = json.loads(archive.read(name))
            turns = [turn for key, rows in held.items() if re.fullmatch(r"session_\d+", key) for turn in rows]
            known = {f"{at}/{turn['dia_id']}" for turn in turns}
            for turn in turns:
                text = f"{turn['speaker']}: {turn.get('text', '')} {turn.get('blip_caption', '')}"
                units.append({"id": f"{at}/{turn['dia_id']}", "content": text, "talk": at})
            for one in held["qa"]:
                evidence = {f"{at}/{dia}" for dia in re.findall(r"D\d+:\d+", str(one.get("evidence", "")))} & known
                if evidence and one["category"] != 5:
                    asked.append((one["question"], at, evidence))
    return units, asked


def by_fts5(units: list[dict[str, Any]]) -> Find:
    con = apsw.Connection(":memory:")
    con.execute("CREATE TABLE u (slot INTEGER PRIMARY KEY, id TEXT, talk INTEGER)")
    con.execute(f"CREATE VIRTUAL TABLE w USING fts5(text, {PLAIN})")
    con.executemany(
        "INSERT INTO u VALUES (?, ?, ?)", ((at, one["id"], one.get("talk")) for at, one in enumerate(units))
    )
    con.executemany("INSERT INTO w (rowid, text) VALUES (?, ?)", ((at, one["content"]) for at, one in enumerate(units)))
    sql = (
        "SELECT u.id FROM w JOIN u ON u.slot = w.rowid WHERE w MATCH ?1 AND ifnull(talk = ?2, 1) ORDER BY rank LIMIT ?3"
    )

    def find(query: str, limit: int, talk: Any) -> list[str]:
        words = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", query)))
        return [row[0] for row in con.execute(sql, (words, talk, limit))] if words else []

    return find


def by_store(units: list[dict[str, Any]], prefix: Path, stemming: str) -> Find:
    records = Records.open(prefix, dim=1, stemming=stemming)
    with records.write() as tx:
        tx.put_many((one, one["content"], b"\0\0\0\0", one["id"]) for one in units)

    def find(query: str, limit: int, talk: Any) -> list[str]:
        filters = None if talk is None else {"talk": talk}
        return [name for _, name in records.keyword(query, limit, filters)]

    return find


def quality(units: list[dict[str, Any]], asked: list[tuple[str, Any, set[str]]]) -> dict[str, Any]:
    """hit@1, hit@5, hit@10 and recall@20 of each kind of words."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        doors: dict[str, Callable[[], Find]] = {"unicode61": lambda: by_fts5(units)}
        for stemming in ("none", "light", "english"):
            doors[stemming] = lambda kind=stemming: by_store(units, Path(folder) / kind, kind)  # type: ignore[misc]
        for name, opened in doors.items():
            find = opened()
            lists = [(find(query, 20, talk), wanted) for query, talk, wanted in asked]
            hits = {
                f"hit@{k}": float(np.mean([bool(wanted & {*ids[:k]}) for ids, wanted in lists])) for k in (1, 5, 10)
            }
            hits["recall@20"] = float(np.mean([len(wanted & {*ids}) / len(wanted) for ids, wanted in lists]))
            result[name] = {key: round(value, 4) for key, value in hits.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--locomo", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    data = load(given.data)
    texts = [unit_to_text(unit) for unit in data.units[:ROWS]]
    report: dict[str, Any] = {
        "machine": machine(),
        "data": data.name,
        "command": "python benchmarks/keyword_words.py --locomo locomo10.zip --json FILE",
        "FTS5, 20,000 texts": {"characters": round(sum(map(len, texts)) / ROWS), **ways(texts)},
        "bulk store of 20,000 units, us a unit": bulk(data.units[:ROWS], data.vectors[:ROWS]),
    }
    if given.locomo:
        turns, questions = read_locomo(given.locomo)
        talk = [unit_to_text(unit) for unit in turns]
        rng = np.random.default_rng(5)
        pairs = rng.integers(0, len(talk), (ROWS, 2)).tolist()
        prose = [{"content": f"{talk[a]} {talk[b]}"[:200], "type": "lesson"} for a, b in pairs]
        report["bulk store of 20,000 texts of 200 characters, us a unit"] = bulk(prose, data.vectors[:ROWS])
        report["LoCoMo"] = {"questions": len(questions), **quality(turns, questions)}
    if data.folder is not None:
        named = [{**unit, "id": str(at)} for at, unit in enumerate(data.units)]
        with gzip.open(data.folder / "tldr_queries.jsonl.gz", "rt") as lines:
            queries = [(one["query"], None, {str(one["unit_row"])}) for one in map(json.loads, lines)]
        report["units, the query repeats words"] = {"queries": len(queries), **quality(named, queries)}
    publish(report, given.json)


if __name__ == "__main__":
    main()
