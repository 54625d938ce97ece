"""What a device keeps beside an index that never changes: the newest rows, the dead ones, and longer indexes."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from index.torch_gpu.conftest import CARD
from oracle import METRICS, check_answer, nearest, pairs, recall, rows_of
from torch_gpu_kit import DIM, ILLEGAL, N, fails_when, on_card, out_of_memory, some

from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.exact_scan import exact_scan
from memevolve_gpu.index.torch_gpu import delta_buffer as delta_module
from memevolve_gpu.index.torch_gpu import index as index_module
from memevolve_gpu.index.torch_gpu.device_rows import DeviceRows
from memevolve_gpu.index.torch_gpu.index import TorchIndex
from memevolve_gpu.index.torch_gpu.memory_accounting import SCRATCH, WORKSPACE, Account
from memevolve_gpu.live.delta_buffer import NEVER
from memevolve_gpu.live.view import LiveRows
from memevolve_gpu.types import FloatArray, IntArray, Metric, Precision, Rows, SearchParams
from memevolve_gpu.utils.vectors import DeviceQueries

KINDS = ("exact", "ivf")


class Newer:
    """Rows as a delta buffer keeps them, in pieces; it counts what it hands out."""

    def __init__(self, vectors: FloatArray, piece: int = 700) -> None:
        self.vectors, self.piece, self.read = vectors, piece, 0

    def blocks(self, start: int, end: int) -> Iterator[FloatArray]:
        for low in range(start, end, self.piece):
            block = self.vectors[low : min(end, low + self.piece)]
            self.read += len(block)
            yield block


def assert_scanned(
    index: TorchIndex, newer: Newer, n: int, queries: Any, k: int = 10, row_filter: RowFilter | None = None
) -> None:
    """The device answers what a scan of the first n rows on the host would."""
    found = index.search_delta(newer, n, queries, k, row_filter)
    assert found is not None
    here = queries if isinstance(queries, np.ndarray) else queries.host()
    distances, positions = exact_scan(here, newer.vectors[:n], k, index.metric, row_filter)
    assert found[0].dtype == np.float32
    assert found[0].shape == found[1].shape == (len(here), k)
    np.testing.assert_allclose(found[0], distances, rtol=1e-4, atol=1e-4)
    assert ((found[1] < 0) == (positions < 0)).all()
    assert (found[1] < n).all()
    assert (found[1] == positions).mean() > 0.99, "ties aside"


@pytest.fixture
def always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is asked even for what the host could do in less time."""
    monkeypatch.setattr(index_module, "_DEVICE_CALL", 0.0)


# The newest rows


@pytest.mark.usefixtures("always_asked")
@pytest.mark.parametrize(
    ("kind", "metric", "float32_rows"),
    [(kind, metric, whole) for whole in (False, True) for kind, metric in pairs(KINDS, int(whole))],
)
def test_newer_rows_are_scanned_exactly(kind: str, metric: Metric, card: Account, *, float32_rows: bool) -> None:
    index = on_card(kind, some(1, metric=metric), metric, float32_rows=float32_rows)
    newer, queries = Newer(some(3, 9000, metric=metric)), some(2, 40, metric=metric)
    for n in (1, 5, 700, 701, 4096, 4097, 9000):
        assert_scanned(index, newer, n, np.repeat(queries, 8, axis=0))
    assert newer.read == 9000, "each row went there once"
    for k in (1, 64, 3000):
        assert_scanned(index, newer, 9000, queries, k)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_newer_rows_are_exact_beside_narrow_bodies(precision: Precision, card: Account) -> None:
    index = on_card("exact", some(1), precision=precision)
    assert_scanned(index, Newer(some(3, 3000)), 3000, some(2, 40))


@pytest.mark.usefixtures("always_asked")
def test_an_older_view_does_not_see_what_came_since(card: Account) -> None:
    index, newer, queries = on_card("exact", some(1)), Newer(some(3, 5000)), some(2, 40)
    for n in (5000, 4000, 5000, 999, 4500):
        assert_scanned(index, newer, n, queries)
        dead = RowFilter(np.arange(n) % 3 > 0)
        assert_scanned(index, newer, n, queries, 10, dead)
        assert_scanned(index, newer, n, queries, 10, dead)
        assert_scanned(index, newer, n, queries, 10, RowFilter(np.arange(n) == n // 2))


def test_the_host_scans_what_it_scans_sooner(card: Account, torch: Any) -> None:
    index, newer, queries = on_card("exact", some(1)), Newer(some(3, 2000)), some(2, 40)
    assert index.search_delta(newer, 2000, queries[:1], 10) is None
    assert index.search_delta(newer, 50, queries, 10) is None
    assert index.search_delta(newer, 2000, queries, 10, RowFilter(np.arange(2000) < 9)) is None
    assert newer.read == 0
    assert_scanned(index, newer, 50, DeviceQueries(torch.from_numpy(queries[:1])))
    assert newer.read == 50, "queries that lie on the device stay there"


def test_another_tail_takes_the_place_of_the_first(card: Account) -> None:
    gc.collect()
    index, used, queries = on_card("exact", some(1)), card.used, some(2, 40)
    for seed in (3, 4, 3):
        assert_scanned(index, Newer(some(seed, 3000)), 3000, queries)
        assert card.used - used == pytest.approx(index.device_bytes - held(index), rel=0.01)
    del index
    assert card.used < used, "all of it is given back"


def held(index: TorchIndex) -> int:
    """Bytes of the index's own rows."""
    return index._ready().nbytes


def test_a_card_without_room_leaves_newer_rows_to_the_host(card: Account) -> None:
    vectors, queries = some(1), some(2, 40)
    index, newer = on_card("exact", vectors), Newer(some(3, 9000))
    assert_scanned(index, newer, 3000, queries)
    card.limit = card.used + SCRATCH
    small, card.limit = card.limit, card.used + (1 << 20)
    assert index.search_delta(newer, 9000, queries, 10) is None
    card.limit = small
    assert index.search_delta(newer, 9000, queries, 10) is None, "until there is a new body"
    (incident,) = index.incidents()
    assert "the host scans the newest rows" in incident.detail
    assert index.device == CARD, "the body is where it was"
    assert index.device_bytes == held(index)
    check_answer(index, queries, vectors, index.search(queries, 10, SearchParams()))


@pytest.mark.parametrize("cause", ["empty", "put"])
def test_a_card_that_other_processes_fill(
    cause: str, card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, newer, queries, used = on_card("exact", some(1)), Newer(some(3, 9000)), some(2, 40), card.used

    def float32_rows(*_: object, **__: object) -> None:
        raise out_of_memory(torch)

    monkeypatch.setattr(DeviceRows, cause, float32_rows)
    assert index.search_delta(newer, 9000, queries, 10) is None
    assert card.used == used
    assert index.device == CARD


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_float16_cannot_hold_stay_on_the_host(metric: Metric, card: Account) -> None:
    index, far = on_card("exact", some(1, metric=metric), metric), some(3, 3000, metric=metric)
    far[2500] *= np.float32(1e6)
    queries, newer = some(2, 40, metric=metric), Newer(far)
    assert_scanned(index, newer, 2500, queries)
    assert index.search_delta(newer, 3000, queries, 10) is None
    assert index.search_delta(newer, 2500, queries, 10) is None
    assert "float16" in index.incidents()[0].detail


@pytest.mark.parametrize("float32_rows", [False, True])
def test_rows_among_which_float16_cannot_tell_stay_on_the_host(
    card: Account, rng: np.random.Generator, *, float32_rows: bool
) -> None:
    """Their cluster is as wide as that of the index's rows, but float16's steps are wider where it lies."""
    dim = 256
    vectors = rng.standard_normal((N, dim)).astype(np.float32)
    index, aside = on_card("exact", vectors, float32_rows=float32_rows), rng.standard_normal(dim)
    for offset, held in ((100, True), (2000, False)):
        far = (rng.standard_normal((3000, dim)) + offset * aside).astype(np.float32)
        newer, queries = Newer(far[:2960]), far[2960:]
        found = index.search_delta(newer, 2960, queries, 10)
        longer = index.extended(cut(rows_of(np.concatenate([vectors, far])), N, N + 2960))
        assert (found is not None) == (longer is not None) == held, "a new body has a space of its own"
        if found is not None:
            assert_scanned(index, newer, 2960, queries)


def test_what_the_body_holds_already_says_how_far_rows_may_lie(card: Account, rng: np.random.Generator) -> None:
    vectors, aside = rng.standard_normal((N, DIM)).astype(np.float32), rng.standard_normal(DIM).astype(np.float32)
    far = rng.standard_normal((500, DIM)).astype(np.float32) + 1000 * aside
    twins = np.where(rng.random((N, 1)) < 0.6, vectors * np.float32(1e-4), vectors)
    copies = np.where(rng.random((N, 1)) < 0.6, vectors[:1], vectors)
    stray = vectors.copy()
    stray[7] = 1e5 * aside
    for rows, more, held in (
        (stray, far, False),
        (stray, vectors[:500], True),
        (twins, vectors[:500], True),
        (copies, vectors[:500], True),
        (np.repeat(vectors[:1], N, axis=0), vectors[:500], True),
    ):
        index = on_card("exact", np.ascontiguousarray(rows))
        assert (index.search_delta(Newer(more), 500, vectors[:200], 10) is not None) == held


def test_rows_that_differ_by_less_than_float16_tells(card: Account, rng: np.random.Generator) -> None:
    index, one = on_card("exact", some(1)), some(5, 1)
    twins = (one + 1e-4 * rng.standard_normal((30, DIM))).astype(np.float32)
    newer = Newer(np.concatenate([some(3, 2500), twins]))
    found = index.search_delta(newer, 2530, np.repeat(twins, 2, axis=0), 3)
    assert found is not None
    assert (found[1][:, 0] == np.repeat(np.arange(2500, 2530), 2)).all(), "float32 decides"


def test_a_device_that_fails_leaves_newer_rows_to_the_host(card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    index, newer, queries = on_card("exact", some(1)), Newer(some(3, 3000)), some(2, 40)
    asked = fails_when(monkeypatch, lambda at_once: RuntimeError("out of memory") if at_once > 10 else None)
    assert_scanned(index, newer, 3000, queries)
    assert asked == [40, 20, 10, 10, 10, 10]
    fails_when(monkeypatch, lambda _: RuntimeError(ILLEGAL))
    assert index.search_delta(newer, 3000, queries, 10) is None
    assert index.device == "cpu"
    assert index.search_delta(newer, 3000, queries, 10) is None


def test_rows_that_came_only_half_way_are_never_seen(card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    index, newer = on_card("exact", some(1)), Newer(some(3, 3000))
    queries, real = newer.vectors[2000:2040], DeviceRows.put
    assert_scanned(index, newer, 2000, queries)

    def put(self: DeviceRows, start: int, *rest: Any) -> None:
        real(self, start, *rest)
        raise RuntimeError("CUDA error: invalid argument")

    with monkeypatch.context() as broken:
        broken.setattr(DeviceRows, "put", put)
        assert index.search_delta(newer, 3000, queries, 10) is None
    monkeypatch.setattr(index._failover, "_clock", lambda: float("inf"))
    for n in (2000, 3000):
        assert_scanned(index, newer, n, queries)


@pytest.mark.usefixtures("always_asked")
def test_readers_of_many_views_at_once(card: Account) -> None:
    index, newer, queries = on_card("ivf", some(1)), Newer(some(3, 9000)), some(2, 40)
    dead = {n: RowFilter(np.arange(n) % 5 > 0) for n in range(500, 9001, 500)}
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(assert_scanned, index, newer, n, queries, 10, d) for n in dead for d in (None, dead[n])]
        for job in jobs:
            job.result()


# The dead


class Deaths:
    """An index's deaths as views see them."""

    def __init__(self, n: int) -> None:
        self.died, self.log = np.full(n, NEVER, np.int64), array("q")

    def add(self, *positions: int) -> LiveRows:
        for position in positions:
            self.died[position] = len(self.log) + 1
            self.log.append(position)
        return self.now

    @property
    def now(self) -> LiveRows:
        return LiveRows(self.died, len(self.log), self.log, len(self.log))


@pytest.mark.usefixtures("always_asked")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nq", [1, 40])
def test_the_dead_are_hidden_as_they_die(kind: str, nq: int, card: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveRows, "rows", property(lambda _: pytest.fail("the whole mask was made")), raising=False)
    vectors, deaths = some(1), Deaths(N)
    index, queries = on_card(kind, vectors), some(2, nq)
    lies = index._ready().tombstones.rows.bias.data_ptr()
    views = []
    for _ in range(12):
        now = deaths.add(*exact_scan(queries[:1], vectors, 7, "l2", masked(deaths))[1][0].tolist())
        answer = index.search(queries, 10, SearchParams(), now)
        check_answer(index, queries, vectors, answer, masked(deaths))
        assert recall(answer[0], nearest(queries, vectors, "l2", 10, masked(deaths))) >= 0.999
        views.append((now, masked(deaths)))
    assert not index._masks._kept, "nothing is sent but what died"
    for view, alive in [views[3], views[-1], views[0], views[5]]:
        check_answer(index, queries, vectors, index.search(queries, 10, SearchParams(), view), alive)
    check_answer(index, queries, vectors, index.search(queries, 10, SearchParams()))
    assert index._ready().tombstones.rows.bias.data_ptr() == lies, "recorded searches read it where it lies"


def masked(deaths: Deaths) -> RowFilter:
    return RowFilter(deaths.died == NEVER)


@pytest.mark.parametrize("kind", KINDS)
def test_deaths_of_another_body_and_filters(kind: str, card: Account) -> None:
    vectors, queries = some(1), some(2, 40)
    index, first, second = on_card(kind, vectors), Deaths(N), Deaths(N)
    half = RowFilter(np.arange(N) % 2 == 0)
    for one, positions in ((first, (5, 9)), (second, (7,)), (first, (11, 0)), (second, (1,))):
        now = one.add(*positions)
        check_answer(index, queries, vectors, index.search(queries, 10, SearchParams(), now), masked(one))
        check_answer(index, queries, vectors, index.search(queries, 10, SearchParams(), half), half)
    alone = index.search(vectors[[7, 1, 5]], 1, SearchParams(nprobe=1), second.now)
    assert alone[1][:, 0].tolist()[2] == 5
    assert not {7, 1} & set(alone[1][:, 0].tolist())


def test_a_failure_half_way_is_made_good(card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries, deaths = some(1), some(2, 40), Deaths(N)
    index = on_card("exact", vectors)
    index.search(queries, 10, SearchParams(), deaths.add(3))
    shown = index._ready().tombstones.rows.bias

    class Half:
        def __getattr__(self, name: str) -> Any:
            if name == "index_fill_":
                shown.fill_(float("inf"))
                raise out_of_memory(torch)
            return getattr(shown, name)

    tombstones = index._ready().tombstones
    with monkeypatch.context() as broken:
        broken.setattr(tombstones, "rows", type("Rows", (), {"bias": Half(), "places": None})())
        now = deaths.add(4, 5)
        check_answer(index, queries, vectors, index.search(queries, 10, SearchParams(), now), masked(deaths))
    monkeypatch.setattr(index._failover, "_clock", lambda: float("inf"))
    check_answer(index, queries, vectors, index.search(queries, 10, SearchParams(), deaths.add(6)), masked(deaths))
    assert index.device == CARD


# Longer indexes


def cut(rows: Rows, start: int, end: int) -> Rows:
    texts = [f"unit-{i}".encode() for i in range(start, end)]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return Rows(rows.slots[start:end], np.frombuffer(b"".join(texts), np.uint8), ends, rows.vectors[start:end])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("float32_rows", [False, True])
def test_a_longer_body_takes_from_the_host_what_is_new(
    kind: str, precision: Precision, card: Account, monkeypatch: pytest.MonkeyPatch, *, float32_rows: bool
) -> None:
    vectors, queries = some(1, N + 777), some(2, 40)
    rows, index = rows_of(vectors), on_card(kind, vectors[:N], precision=precision, float32_rows=float32_rows)
    real, sent = DeviceRows.put, []

    def put(self: DeviceRows, start: int, block: Any, *rest: Any) -> None:
        sent.append(len(block))
        real(self, start, block, *rest)

    monkeypatch.setattr(DeviceRows, "put", put)
    before = index.search(queries, 10, SearchParams())
    for end in (N + 1, N + 33, N + 700, N + 777):
        longer = index.extended(cut(rows, index.n, end))
        assert isinstance(longer, TorchIndex)
        index = longer
        assert index.device == CARD
        order = index._ready().rows.order
        assert sorted(order[order >= 0].tolist()) == list(range(end))
        answer = index.search(queries, 10, SearchParams())
        check_answer(index, queries, vectors[:end], answer, tolerance=2e-4 if precision == "float32" else 0.1)
        if precision == "float32":
            assert recall(answer[0], nearest(queries, vectors[:end], "l2", 10)) >= 0.999
            assert (index._ready().rows.float32_rows is not None) == float32_rows
            assert index.search(vectors[:end:50], 1, SearchParams(nprobe=1))[1][:, 0].tolist() == list(
                range(0, end, 50)
            )
    assert sent == [1, 32, 667, 77]
    assert index.plan.device_bytes - SCRATCH - WORKSPACE == pytest.approx(index.device_bytes, rel=0.1)
    assert before[1].shape == (40, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_deaths_are_carried_into_a_longer_body(kind: str, card: Account) -> None:
    vectors, queries, deaths = some(1, N + 100), some(2, 40), Deaths(N)
    index = on_card(kind, vectors[:N])
    index.search(queries, 10, SearchParams(), deaths.add(*range(0, N, 3)))
    longer = index.extended(cut(rows_of(vectors), N, N + 100))
    assert longer is not None
    check_answer(longer, queries, vectors, longer.search(queries, 10, SearchParams()))
    check_answer(index, queries, vectors[:N], index.search(queries, 10, SearchParams(), deaths.now), masked(deaths))
    later = Deaths(N + 100)
    later.add(*range(0, N + 100, 3))
    check_answer(longer, queries, vectors, longer.search(queries, 10, SearchParams(), later.now), masked(later))


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_put_behind_asks_for_a_new_body(
    kind: str, card: Account, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = some(1, N + 100)
    rows, index = rows_of(vectors), on_card(kind, vectors[:N])
    far = cut(rows, N, N + 100)
    far = Rows(far.slots, far.id_bytes, far.id_ends, far.vectors * np.float32(1e5))
    assert index.extended(far) is None
    used, card.limit = card.used, card.used + 1000
    with pytest.raises(DeviceError, match="an index over") as caught:
        index.extended(cut(rows, N, N + 100))
    assert caught.value.cause == "limit"
    card.limit = None
    assert card.used == used
    fails_when(monkeypatch, lambda _: RuntimeError("out of memory"))
    index.search(vectors[:40], 10, SearchParams())
    assert index.device == "cpu"
    assert index.extended(cut(rows, N, N + 100)) is None, "a device that rests is left alone"


def positions_of(answer: tuple[FloatArray, IntArray]) -> list[list[int]]:
    found: list[list[int]] = answer[1].tolist()
    return found


def test_a_tail_that_moves_into_the_body(card: Account, torch: Any) -> None:
    vectors, queries = some(1, N + 4500), some(2, 40)
    rows, index = rows_of(vectors), on_card("exact", vectors[:N])
    newer = Newer(vectors[N:])
    assert_scanned(index, newer, 4000, queries)
    longer = index.extended(cut(rows, N, N + 4000))
    assert isinstance(longer, TorchIndex)
    rest = Newer(vectors[N + 4000 :])
    assert_scanned(longer, rest, 500, DeviceQueries(torch.from_numpy(queries)))
    assert_scanned(index, newer, 4500, queries)
    del index
    check_answer(longer, queries, vectors[: N + 4000], longer.search(queries, 10, SearchParams()))


def test_the_tail_grows_by_doubling(card: Account) -> None:
    index, newer, queries = on_card("exact", some(1)), Newer(some(3, 20_000)), some(2, 40)
    grown = []
    for n in range(100, 20_001, 100):
        index.search_delta(newer, n, queries, 10)
        grown.append(index.device_bytes)
    assert len(set(grown)) <= 5
    assert newer.read == 20_000
    assert delta_module._LEAST_ROWS < 20_000
