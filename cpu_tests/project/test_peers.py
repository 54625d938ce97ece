"""The benchmarks against other stores: statistics, truth, knobs, data, adapters, turns, a run from end to end."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import each

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from peers.__main__ import main
from peers.calibrate import Choice, calibrate
from peers.data import NOISE, Work, prepared
from peers.mixed import operations
from peers.plan import APART, SECTIONS, predicted
from peers.protocol import BEFORE, Array, Payload, Peer
from peers.registry import NAMES, peer, usable
from peers.remote import PeerFailedError, Remote, cores
from peers.sections import evicted
from peers.session import FULL, QUICK, Session
from peers.stats import exponent, passes_summary, percentiles
from peers.truth import exact, hits

HERE = ["memevolve-gpu", "memevolve-gpu ivf", "faiss Flat", "faiss HNSW"]
"""Peers that the environment of the tests has."""
ROWS, DIM, K = 400, 16, 10
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the comparison pins processes and reads /proc")


def unit_rows(rng: np.random.Generator, rows: int = ROWS) -> Array:
    made = rng.standard_normal((rows, DIM))
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), dtype=np.float32)


# Statistics


def test_percentiles_are_milliseconds_of_single_calls() -> None:
    figures = percentiles([i / 1000 for i in range(1, 102)])
    assert figures == pytest.approx({"p50": 51, "p95": 96, "p99": 100, "mean": 51, "calls": 101})
    assert percentiles([]) == {"calls": 0}


def test_a_figure_is_the_median_of_the_passes_and_shows_their_spread() -> None:
    summary = passes_summary([[0.001, 0.001, 0.009], [0.002], [0.004, 0.004], []])
    assert summary["pass_medians"] == pytest.approx([1, 2, 4])
    assert summary["ms"] == pytest.approx(2)
    assert summary["spread"] == pytest.approx(1.5)
    assert summary["calls"] == 6


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.3])
def test_an_exponent_is_found_again(power: float) -> None:
    sizes = [1_000, 10_000, 200_000]
    found, residual = exponent(sizes, [3 * size**power for size in sizes])
    assert found == pytest.approx(power, abs=1e-9)
    assert residual == pytest.approx(0, abs=1e-9)


def test_a_curve_that_is_no_power_has_a_residual() -> None:
    assert exponent([1, 10, 100], [1, 100, 1])[1] > 1


@pytest.mark.parametrize(("sizes", "values"), [([1000], [1.0]), ([1000, 1000], [1.0, 2.0]), ([10, 20], [0.0, 1.0])])
def test_an_exponent_needs_two_sizes_and_positive_values(sizes: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="sizes"):
        exponent(sizes, values)


# Truth


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("share", [None, 0.3, 0.01])
def test_truth_by_blocks_is_the_truth(rng: np.random.Generator, block: int, share: float | None) -> None:
    vectors, queries = unit_rows(rng), unit_rows(rng, 20)
    allowed = None if share is None else rng.random(ROWS) < share
    rows = np.arange(ROWS) if allowed is None else np.flatnonzero(allowed)
    scores = queries @ vectors[rows].T
    expected = rows[np.argsort(-scores, axis=1)[:, :K]]
    truth = exact(vectors, queries, K, allowed, block)
    assert np.array_equal(truth.ids, expected)
    assert truth.floor == pytest.approx(np.sort(scores, axis=1)[:, -expected.shape[1]])


def test_truth_needs_a_row(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="allowed"):
        exact(unit_rows(rng), unit_rows(rng, 1), K, np.zeros(ROWS, dtype=np.bool_))


def test_hits_count_each_true_neighbour_once(rng: np.random.Generator) -> None:
    vectors, queries = unit_rows(rng), unit_rows(rng, 1)
    truth = exact(vectors, queries, K)
    true = truth.ids[0].tolist()
    far = int(np.argmin(vectors @ queries[0]))

    def counted(found: list[int], allowed: Any = None) -> int:
        return hits([found], queries, vectors, truth, allowed)[0]

    assert counted(true) == K
    assert counted(true[::-1]) == K
    assert counted([true[0]] * K) == 1
    assert counted([*true[:-1], far]) == K - 1
    assert counted([far, *true]) == K - 1
    assert counted([]) == 0
    assert counted([ROWS + 5, *true[:3]]) == 3
    allowed = np.ones(ROWS, dtype=np.bool_)
    allowed[true[:2]] = False
    assert counted(true, allowed) == K - 2


def test_a_duplicate_of_a_true_neighbour_is_as_good(rng: np.random.Generator) -> None:
    vectors, queries = unit_rows(rng), unit_rows(rng, 1)
    last = exact(vectors, queries, K).ids[0, -1]
    doubled = np.concatenate([vectors, vectors[last : last + 1]])
    truth = exact(doubled, queries, K)
    assert hits([[*truth.ids[0, :-1].tolist(), ROWS]], queries, doubled, truth) == [K]


# Knobs


def test_the_smallest_knob_that_reaches_a_target_is_chosen_and_larger_ones_are_not_tried() -> None:
    recalls = {16: 0.9, 32: 0.951, 64: 0.98, 128: 0.992, 256: 1.0}
    asked: list[float] = []

    def recall_of(knob: float) -> float:
        asked.append(knob)
        return recalls[int(knob)]

    found = calibrate([256, 16, 64, 32, 128], (0.95, 0.99), recall_of)
    assert found == {0.95: Choice(32, 0.951, True), 0.99: Choice(128, 0.992, True)}
    assert asked == [16, 32, 64, 128]


def test_a_target_out_of_reach_gets_the_best_knob_and_is_marked() -> None:
    found = calibrate([1, 2, 3], (0.95, 0.99), {1: 0.5, 2: 0.96, 3: 0.94}.__getitem__)  # type: ignore[arg-type]
    assert found == {0.95: Choice(2, 0.96, True), 0.99: Choice(2, 0.96, False)}


# Data


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Generated units; some more rows than it makes, so that some are repeated."""
    return prepared(Path("there is none"), tmp_path_factory.mktemp("work"), 39_400, 100, 20)


def test_rows_beyond_the_data_are_copies_with_noise_and_the_name_says_so(work: Work) -> None:
    assert work.vectors.shape == (39_500, 384)
    assert np.linalg.norm(work.vectors[-200:], axis=1) == pytest.approx(1, abs=1e-5)
    nearest = exact(work.vectors[:39_320], np.asarray(work.vectors[39_400:39_420]), 1).floor
    assert nearest == pytest.approx(1 / np.sqrt(1 + NOISE**2), abs=0.01)
    assert "80 copies" in work.name
    assert "generated" in work.name


def test_half_of_each_kind_of_query_calibrates_and_the_other_half_judges(work: Work) -> None:
    assert sorted(work.calibration + work.judged) == list(range(40))
    for half in (work.calibration, work.judged):
        assert [row % 2 for row in half].count(0) == len(half) // 2 == 10


def test_a_third_and_a_hundredth_of_the_units_pass_the_filters(work: Work) -> None:
    assert (work.parts < 330).mean() == pytest.approx(1 / 3, abs=0.02)
    assert (work.parts < 10).mean() == pytest.approx(0.01, abs=0.003)
    assert (work.parts < 1).mean() == pytest.approx(0.001, abs=0.001)
    assert work.payload(7)["metadata"]["part"] == work.parts[7]


def test_the_workload_has_its_shares() -> None:
    kinds = operations(20_000)
    shares = [kinds.count(kind) / 20_000 for kind in ("query", "insert", "delete", "update")]
    assert shares == pytest.approx([0.8, 0.15, 0.025, 0.025], abs=0.01)
    assert operations(100) == operations(100)


# Adapters


def payloads(rows: int) -> list[Payload]:
    return [
        {"type": "skill", "content": f"unit {i}", "tags": ["a"], "metadata": {"part": i % 100}} for i in range(rows)
    ]


def neighbours(vectors: Array, query: Array, rows: Any) -> list[int]:
    found: list[int] = np.asarray(rows)[np.argsort(-(vectors[rows] @ query))[:K]].tolist()
    return found


@pytest.fixture(params=HERE)
def filled(request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator) -> Iterator[tuple[Peer, Array]]:
    """A peer with 400 rows, and 500 vectors of which these are the first."""
    vectors = unit_rows(rng, 500)
    one = peer(request.param)
    one.open(tmp_path, DIM)
    one.ingest(range(ROWS), vectors[:ROWS], payloads(ROWS))
    one.settle()
    yield one, vectors
    one.close()


def test_every_peer_finds_what_is_nearest(filled: tuple[Peer, Array], rng: np.random.Generator) -> None:
    one, vectors = filled
    queries = unit_rows(rng, 20)
    truth = exact(vectors[:ROWS], queries, K)
    found = one.search(queries, K, one.facts.knobs[-1])
    assert sum(hits(found, queries, vectors[:ROWS], truth)) == 20 * K
    lowest = one.search(queries, K, one.facts.knobs[0])
    assert all(len(set(row)) == K for row in lowest)


def test_units_come_with_their_search(filled: tuple[Peer, Array]) -> None:
    one, vectors = filled
    if one.facts.payloads:
        (units,) = one.search_units(vectors[5:6], 3, one.facts.knobs[-1])
        assert [unit["content"] for unit in units] == [
            f"unit {i}" for i in one.search(vectors[5:6], 3, one.facts.knobs[-1])[0]
        ]
    else:
        with pytest.raises(NotImplementedError):
            one.search_units(vectors[5:6], 3, one.facts.knobs[-1])


def test_filters_keep_what_they_say(filled: tuple[Peer, Array]) -> None:
    one, vectors = filled
    if one.facts.filters:
        rows = [i for i in range(ROWS) if i % 100 < 33]
        (found,) = one.search_filtered(vectors[450:451], K, one.facts.knobs[-1], 33)
        assert found == neighbours(vectors, vectors[450], rows)
    else:
        with pytest.raises(NotImplementedError):
            one.search_filtered(vectors[450:451], K, one.facts.knobs[-1], 33)


def test_writes_are_found_at_once_and_outlive_closing(filled: tuple[Peer, Array], tmp_path: Path) -> None:
    one, vectors = filled
    top = one.facts.knobs[-1]
    unit = payloads(1)[0]
    one.insert(400, vectors[400], unit, synced=False)
    one.insert(401, vectors[401], unit, synced=True)
    expected = {400: 400, 401: 401}
    if one.facts.updates:
        one.update(3, vectors[450], {**unit, "content": "rewritten"}, synced=True)
        expected[3] = 450
    if one.facts.deletes:
        one.delete(7, synced=True)
    for again in (False, True):
        if again:
            one.close()
            assert one.disk_bytes(tmp_path) > ROWS * DIM * 4
            one = peer(one.facts.name)
            one.open(tmp_path, DIM)
        assert all(one.search(vectors[row : row + 1], 1, top) == [[number]] for number, row in expected.items())
        if one.facts.deletes:
            assert 7 not in one.search(vectors[7:8], K, top)[0]
    one.close()


@each("name", NAMES)
def test_every_peer_says_what_it_is_without_being_installed(name: str, repository: Path) -> None:
    facts = peer(name).facts
    assert facts.name == name
    assert list(facts.knobs) == sorted(set(facts.knobs))
    assert facts.settings
    assert facts.durability
    assert usable(name) == "" or "not installed" in usable(name) or name == BEFORE
    wanted = (repository / "benchmarks/peers/requirements.txt").read_text().replace("-", "_")
    assert name in (*HERE, BEFORE) or facts.modules[0] in wanted


# Turns and failures


@ON_LINUX
def test_a_worker_that_dies_or_refuses_is_a_failure_with_its_reason(work: Work, tmp_path: Path) -> None:
    small = Work(work.folder, work.name, 200)
    remote = Remote("faiss Flat", small, tmp_path / "store", cores()[0], 60)
    remote.ask("open")
    with pytest.raises(PeerFailedError, match="NotImplementedError"):
        remote.ask("search", rows=[0], k=1, knob=0, what="units")
    remote = Remote("faiss Flat", small, tmp_path / "store", cores()[0], 60)
    os.kill(remote.process.pid, signal.SIGKILL)
    remote.process.wait()
    with pytest.raises(PeerFailedError, match="ended"):
        remote.ask("open")


def session(names: list[str], record: Callable[[dict[str, Any]], None], work: Work, folder: Path) -> Session:
    return Session(names, work, QUICK, folder, 0, record, lambda _: None)


def test_peers_take_turns_and_one_that_fails_leaves(work: Work, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    turns: list[tuple[int, str]] = []
    run = session(["a", "b", "c"], records.append, work, tmp_path)

    def call(name: str, block: int) -> float:
        turns.append((block, name))
        if (block, name) == (1, "b"):
            raise PeerFailedError("search: broken")
        return 10.0 if name == "c" else 0.1

    run.interleaved("search", 4, call, ["a", "b", "c"], least=2, cap=5.0)
    assert turns == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "a"), (3, "a")]
    assert records == [{"section": "search", "peer": "b", "error": "search: broken"}]
    assert run.names == ["a", "c"]


# The command


@ON_LINUX
def test_a_run_from_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    given = ["--quick", "--size", "300", "--data", str(tmp_path), "--work", str(tmp_path / "work")]
    before = os.sched_getaffinity(0)
    assert main([*given, "--output", str(output), "--peers", "memevolve-gpu", "faiss Flat"]) == 0
    assert os.sched_getaffinity(0) == before
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record for record in made if "error" in record] == []
    assert {record["section"] for record in made} >= set(SECTIONS) - {*APART} | {"cold", "machine", "end"}
    recalls = [record["recall"] for record in made if record["section"] in ("search", "filters") and "recall" in record]
    assert len(recalls) >= 2 + 4 + 3  # curves, two targets, three kinds of filters that 300 units allow
    assert min(recalls) > 0.5
    assert next(record for record in made if record["section"] == "mixed")["recall_after"] > 0.9
    assert all(record["found_at_once"] == 1 for record in made if record.get("kind") == "insert")
    assert "<svg" in output.with_suffix(".html").read_text()
    assert "about" in capfd.readouterr().err
    assert list((tmp_path / "work").iterdir()) == []


@ON_LINUX
def test_other_data_and_what_a_budget_leaves_out(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    given = ["--quick", "--sections", "sets", "--set-size", "300", "--data", str(tmp_path)]
    given += ["--work", str(tmp_path / "work")]
    assert main([*given, "--output", str(output), "--peers", "memevolve-gpu", "faiss Flat"]) == 0
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record for record in made if "error" in record] == []
    about = {one["set"]: (one["size"], one["dimension"]) for one in made if "data" in one and "set" in one}
    assert about == {"wide": (300, 1536), "documents": (300, 384), "mixed text": (300, 384)}
    asked = [one for one in made if one.get("of") == "unseen" and one["peer"] == "memevolve-gpu"]
    assert len(asked) == 6
    assert all(min(one["recall_in"], one["recall_out"]) >= one["target"] - 0.005 for one in asked)
    left = tmp_path / "left.jsonl"
    assert main([*given, "--output", str(left), "--minutes", "0.01", "--peers", "memevolve-gpu"]) == 0
    out = [json.loads(line) for line in left.read_text().splitlines()]
    assert [one["of"] for one in out if "left_out" in one] == [f"{name} (300 units)" for name in about]


@ON_LINUX
def test_pages_that_the_system_was_asked_to_drop_are_told_from_those_that_stay(tmp_path: Path) -> None:
    (tmp_path / "pages").write_bytes(bytes(1 << 22))
    assert 0 <= evicted(tmp_path) < 1
    (tmp_path / "pages").unlink()
    assert evicted(tmp_path) == 0


def test_a_prediction_grows_with_what_is_asked() -> None:
    whole = predicted(NAMES, [name for name in SECTIONS if name not in APART], 50_000, FULL)
    assert predicted(NAMES, ["ingest"], 50_000, FULL) < whole < 25 * 60
    assert predicted(NAMES[:2], SECTIONS[:-2], 50_000, FULL) < whole
    assert predicted(NAMES[:2], ["scaling"], 0, FULL, [1000, 100_000]) > predicted(
        NAMES[:2], ["scaling"], 0, FULL, [1000]
    )
