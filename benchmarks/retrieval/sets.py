"""The public sets: units, questions and their embeddings. Nothing of their texts is part of this repository.

A set is read from where the user keeps it: LoCoMo's archive or JSON file (snap-research/locomo, ``data/``), a folder
with ``tldr_units.jsonl.gz`` and ``tldr_queries.jsonl.gz``, or a set in BEIR's layout: a zip or a folder that holds
``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.tsv``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memevolve_gpu.types import FloatArray

__all__ = ["Question", "Set", "beir", "embedded", "locomo", "units_of"]


@dataclass(frozen=True)
class Question:
    """A question: the ids that answer it, the sessions these are in, the filter it is asked with, and its half."""

    text: str
    answers: frozenset[str]
    sessions: frozenset[str]
    filters: dict[str, Any] | None
    half: int


@dataclass(frozen=True)
class Set:
    """Units and the questions about them."""

    name: str
    units: list[dict[str, Any]]
    questions: list[Question]


def locomo(path: Path) -> Set:
    """LoCoMo: turns of conversations. Left out: category 5 (nothing answers it) and questions without evidence.

    Half A (0) are the conversations at even places in the order of their names, half B (1) the others.
    """
    units: list[dict[str, Any]] = []
    questions: list[Question] = []
    for talk, held in enumerate(_conversations(path)):
        said = held.get("conversation", held)
        turns = {
            f"{talk}/{turn['dia_id']}": _turn(talk, key, at, turn)
            for key, rows in said.items()
            if re.fullmatch(r"session_\d+", key)
            for at, turn in enumerate(rows)
        }
        units += turns.values()
        for one in held["qa"]:
            named = re.findall(r"D\d+:\d+", " ".join(map(str, one.get("evidence", []))))
            answers = frozenset(f"{talk}/{dia}" for dia in named) & turns.keys()
            if answers and one["category"] != 5:
                sessions = frozenset(turns[name]["metadata"]["session"] for name in answers)
                questions.append(Question(one["question"], answers, sessions, {"metadata.talk": talk}, talk % 2))
    return Set("locomo", units, questions)


def _conversations(path: Path) -> Iterator[dict[str, Any]]:
    if not zipfile.is_zipfile(path):
        yield from json.loads(path.read_text("utf-8"))
        return
    with zipfile.ZipFile(path) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".json")):
            yield json.loads(archive.read(name))


def _turn(talk: int, session: str, at: int, turn: dict[str, Any]) -> dict[str, Any]:
    seen = f" [image: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
    return {
        "id": f"{talk}/{turn['dia_id']}",
        "type": "lesson",
        "content": f"{turn['speaker']}: {turn.get('text', '')}{seen}",
        "metadata": {"talk": talk, "session": f"{talk}/{session}", "position": at},
    }


def units_of(folder: Path) -> Set:
    """The shared units: each query is a phrase of one unit. Half A are the queries at even places."""
    with gzip.open(folder / "tldr_units.jsonl.gz", "rt", encoding="utf-8") as lines:
        units = [{**json.loads(line), "id": str(at)} for at, line in enumerate(lines)]
    with gzip.open(folder / "tldr_queries.jsonl.gz", "rt", encoding="utf-8") as lines:
        asked = [json.loads(line) for line in lines]
    questions = [
        Question(one["query"], frozenset([str(one["unit_row"])]), frozenset(), None, at % 2)
        for at, one in enumerate(asked)
    ]
    return Set("units", units, questions)


def beir(path: Path) -> Set:
    """A set in BEIR's layout; every text judged above 0 is an answer. Half A are the questions at even places."""
    files = _zipped(path) if path.is_file() else {name: (path / name).read_text("utf-8") for name in _BEIR_FILES}
    corpus, asked = ([json.loads(line) for line in files[name].splitlines()] for name in _BEIR_FILES[:2])
    units = [
        {"id": one["_id"], "type": "lesson", "content": f"{one.get('title', '')} {one['text']}".strip()}
        for one in corpus
    ]
    answers: dict[str, set[str]] = {}
    for line in files[_BEIR_FILES[2]].splitlines()[1:]:
        question, unit, score = line.split("\t")
        if int(score) > 0:
            answers.setdefault(question, set()).add(unit)
    known = [one for one in asked if one["_id"] in answers]
    questions = [
        Question(one["text"], frozenset(answers[one["_id"]]), frozenset(), None, at % 2) for at, one in enumerate(known)
    ]
    return Set(path.stem, units, questions)


_BEIR_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


def _zipped(path: Path) -> dict[str, str]:
    """The files of a set, which lie in a folder of the archive."""
    with zipfile.ZipFile(path) as archive:
        held = {name.partition("/")[2]: name for name in archive.namelist()}
        return {name: archive.read(held[name]).decode() for name in _BEIR_FILES}


def embedded(texts: list[str], embed: Callable[[list[str]], Any], cache: Path | None) -> FloatArray:
    """The embeddings of texts, float32 (n, dim); read from the cache folder where they were made before."""
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]
    kept = None if cache is None else cache / f"{key}.npy"
    if kept is not None and kept.exists():
        return np.asarray(np.load(kept), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))  # batches of like length waste no padding
    found = np.asarray(embed([texts[at] for at in order]), dtype=np.float32)
    rows = np.empty_like(found)
    rows[order] = found
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, rows)
    return rows
