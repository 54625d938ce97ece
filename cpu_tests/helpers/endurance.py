"""Random operations in a child process that is killed at any moment, compared with a plain dict.

The child says "do" before and "did" after each operation, so the parent knows what was acknowledged; the one operation
in flight may have happened or not. Between lives the derived files are deleted, truncated or bit-flipped.

    python cpu_tests/helpers/endurance.py --operations 10000 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

DIM = 16
KINDS = ("skill", "lesson", "tool", "abstraction")
Model = dict[str, dict[str, Any]]
Operation = dict[str, Any]


def embed(text: str) -> np.ndarray:
    """A seeded vector for a text; texts with the same first word lie together."""
    word = text.split(" ", 1)[0]
    near = np.random.default_rng(sum(word.encode())).standard_normal(DIM)
    own = np.random.default_rng(list(text.encode()) or [0]).standard_normal(DIM)
    return (near + 0.5 * own).astype(np.float32)


def operations(seed: int) -> Iterator[Operation]:
    """An endless, seeded stream of operations over a few hundred ids."""
    rng = random.Random(seed)
    while True:
        kind = rng.choices(
            ["store", "batch", "update", "edit", "delete", "delete_batch", "maintain", "snapshot", "reopen", "clear"],
            [40, 6, 14, 6, 16, 3, 4, 2, 4, 0.15],
        )[0]
        ids = [f"id{rng.randrange(400)}" for _ in range(rng.randrange(1, 60) if "batch" in kind else 1)]
        words = [f"w{rng.randrange(12)} fact {rng.randrange(10**6)}" for _ in ids]
        yield {"kind": kind, "ids": ids, "contents": words, "type": rng.choice(KINDS)}


def unit_of(operation: Operation, i: int) -> dict[str, Any]:
    return {"id": operation["ids"][i], "content": operation["contents"][i], "type": operation["type"], "tags": ["t"]}


def model_after(model: Model, operation: Operation) -> Model:
    """The plain dict after the operation; values are what must be found again: content and type."""
    after, kind = dict(model), operation["kind"]
    for i, unit_id in enumerate(operation["ids"]):
        known = unit_id in after
        if kind in ("store", "batch") or (kind == "update" and known):
            after[unit_id] = unit_of(operation, i)
        elif kind == "edit" and known:
            after[unit_id] = {**after[unit_id], "note": operation["contents"][i]}
        elif kind in ("delete", "delete_batch"):
            after.pop(unit_id, None)
    return {} if kind == "clear" else after


def perform(store: Any, operation: Operation) -> None:
    ids = operation["ids"]
    doing: dict[str, Callable[[], object]] = {
        "store": lambda: store.store(unit_of(operation, 0)),
        "batch": lambda: store.store_batch([unit_of(operation, i) for i in range(len(ids))]),
        "update": lambda: store.update(ids[0], unit_of(operation, 0)),
        "edit": lambda: edit(store, ids[0], operation["contents"][0]),
        "delete": lambda: store.delete(ids[0]),
        "delete_batch": lambda: store.delete_batch(ids),
        "maintain": store.run_maintenance,
        "snapshot": store.snapshot,
        "clear": store.clear,
        "reopen": lambda: None,
    }
    doing[operation["kind"]]()


def edit(store: Any, unit_id: str, note: str) -> None:
    unit = store.retrieve(unit_id)
    if unit is not None:
        store.update(unit_id, {**unit, "note": note})


def open_store(prefix: str, index_type: str) -> Any:
    from memevolve_gpu import StorageConfig, VectorStore

    config = StorageConfig(index_type=index_type, min_training_units=64, target_recall=0.95, background=True)
    return VectorStore(prefix, embed, DIM, storage_config=config)


def child(prefix: str, index_type: str, seed: int, start: int) -> None:
    """Go on with operation ``start`` of the stream until killed."""
    store = open_store(prefix, index_type)
    for number, operation in enumerate(operations(seed)):
        if number < start:
            continue
        print("do", number, flush=True)
        if operation["kind"] == "reopen":
            store.close()
            store = open_store(prefix, index_type)
        perform(store, operation)
        print("did", number, flush=True)


def live_until_killed(prefix: str, index_type: str, seed: int, start: int, seconds: float) -> tuple[int, bool]:
    """Run a child from operation ``start`` and kill it; the next operation's number, and whether one was in flight."""
    command = [sys.executable, __file__, "--child", prefix, index_type, str(seed), str(start)]
    log = Path(f"{prefix}.said")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not log.stat().st_size and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds)
        if process.poll() is not None:
            raise AssertionError(f"the child ended by itself: {process.communicate()[1][-2000:]}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
    said = [line.split() for line in log.read_text().splitlines() if line.endswith(tuple("0123456789"))]
    done = [int(number) for word, number in said if word == "did"]
    begun = [int(number) for word, number in said if word == "do"]
    after = done[-1] + 1 if done else start
    return after, bool(begun) and begun[-1] >= after


def damage(prefix: str, rng: random.Random) -> str:
    """Hurt the snapshot in a random way; returns what was done."""
    path = Path(f"{prefix}.snapshot")
    how = rng.choice(["nothing", "nothing", "delete", "truncate", "flip"])
    if how == "nothing" or not path.exists() or not path.stat().st_size:
        return "nothing"
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, rng.randrange(path.stat().st_size))
    else:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(content))
    return how


def contents(store: Any) -> Model:
    return {
        unit["id"]: {key: value for key, value in unit.items() if key != "metadata"} for unit in store.retrieve_all()
    }


def verify(store: Any, candidates: list[Model]) -> Model:
    """The store equals one of the models, in records and in search; returns that model."""
    held = contents(store)
    matching = [model for model in candidates if model == held]
    assert matching, f"{len(held)} units, none of the models ({[len(model) for model in candidates]}) is equal"
    model = matching[0]
    assert store.count() == len(model) == store.index.ntotal
    assert not store.check(), store.check()
    if not model:
        assert store.search("w1 anything", 5) == []
        return model
    texts = [store._unit_to_text(model[unit_id]) for unit_id in model]
    distances, found = store.search_vectors(np.stack([embed(text) for text in texts]), 1)
    assert (distances[:, 0] <= 1e-4).all(), "a live unit does not find itself or an equal vector"
    everything = store.search_vectors(embed("w3")[None, :], len(model) + 5, recall=1.0)[1][0]
    assert {unit_id for unit_id in everything if unit_id} == set(model), "a search sees other ids than the records"
    assert {unit_id for row in found for unit_id in row} <= set(model), "a deleted id returned"
    return model


def endure(total: int, seed: int, index_type: str, folder: Path, longest: float = 0.6) -> dict[str, int]:
    """Until ``total`` operations are acknowledged: run, kill, damage, reopen, compare. Returns the tally."""
    rng = random.Random(seed)
    prefix = str(folder / "store")
    stream = operations(seed)
    model: Model = {}
    done = 0
    tally = {"operations": 0, "kills": 0, "in_flight": 0}
    while done < total:
        after, in_flight = live_until_killed(prefix, index_type, seed, done, rng.uniform(0.01, longest))
        for _ in range(after - done):
            model = model_after(model, next(stream))
        candidates = [model]
        if in_flight:
            pending = next(stream)
            candidates.append(model_after(model, pending))
            after += 1
        done = after
        how = damage(prefix, rng)
        tally["kills"] += 1
        tally["in_flight"] += in_flight
        tally[how] = tally.get(how, 0) + 1
        with open_store(prefix, index_type) as store:
            model = verify(store, candidates)
    tally["operations"] = done
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--index-type", nargs="+", default=["ivf", "hnsw", "auto", "flat"])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        prefix, index_type, seed, start = arguments.child
        child(prefix, index_type, int(seed), int(start))
    for index_type in arguments.index_type:
        with tempfile.TemporaryDirectory() as folder:
            tally = endure(arguments.operations, arguments.seed, index_type, Path(folder))
        print(json.dumps({"index_type": index_type, "seed": arguments.seed, **tally}), flush=True)


if __name__ == "__main__":
    main()
