"""Triton kernels. Plain functions here; :func:`load` compiles them, and nothing is imported before.

Each has a reference of the same name in :mod:`.kernel_ops`. Rows of ``x`` are ``dim`` columns wide, ``block_d`` divides
``span`` (columns whose loads are in flight at once), which divides ``dim``, and groups are 32 rows. A score is
``bias[row] - alpha[query] * scale[row] * dot``, so a bias of +inf hides a row. Offsets that may pass 2**31 are computed
in 64 bits. Parameters named ``constexpr`` are compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...utils.forking import lock

# Triton reads annotations: only compile-time constants have one.
# mypy: disable-error-code="no-untyped-def, assignment"

if TYPE_CHECKING:
    from typing import Any as constexpr  # noqa: N813 - Triton's name
tl: Any = None
"""``triton.language`` once :func:`load` has run, as ``constexpr`` is its class: Triton looks for both names here."""

_COUNTS = ("groups", "nq", "nlist", "nprobe", "width", "count", "m")

_lock = lock()
_loaded: SimpleNamespace | None = None


def load() -> SimpleNamespace:
    """The kernels, ready to launch.

    Raises:
        ImportError: triton is missing or half installed.
    """
    global _loaded  # noqa: PLW0603 - the cache of a process-wide fact
    with _lock:
        if _loaded is None:
            import triton
            import triton.language

            globals().update(tl=triton.language, constexpr=triton.language.constexpr)
            found = (minima_one, minima_many, minima_stream, select, rescore, locate)
            found += (list_minima_one, list_minima, assign, sum_lists)
            _loaded = SimpleNamespace(**{function.__name__: _compiled(triton, function) for function in found})
        return _loaded


def _compiled(triton: Any, function: Callable[..., None]) -> Any:
    """A kernel that is not compiled again for every number of queries that happens to be a multiple of 16."""
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _COUNTS if name in arguments])


def minima_one(
    x,
    scales,
    bias,
    q,
    alpha,
    out,
    dim: constexpr,
    block_d: constexpr,
    span: constexpr,
    block_g: constexpr,
    scaled: constexpr,
) -> None:
    """One query, float32: the best score of each group. Grid: groups / block_g."""
    block = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, block_g * 32)
    column = tl.arange(0, block_d)
    tile = x + block * (block_g * 32 * dim) + row[:, None] * dim + column[None, :]
    total = tl.zeros((block_g * 32, block_d), tl.float32)
    for far in range(0, dim, span):
        for near in tl.static_range(0, span, block_d):
            d = far + near
            total += tl.load(tile + d).to(tl.float32) * tl.load(q + d + column)[None, :]
    dot = tl.sum(total, 1)
    if scaled:
        dot *= tl.load(scales + block * (block_g * 32) + row)
    score = tl.load(bias + block * (block_g * 32) + row) - tl.load(alpha) * dot
    best = tl.min(tl.reshape(score, (block_g, 32)), 1)
    tl.store(out + block * block_g + tl.arange(0, block_g), best)


def minima_many(
    x,
    scales,
    bias,
    q,
    alpha,
    out,
    groups,
    nq,
    dim: constexpr,
    block_d: constexpr,
    block_g: constexpr,
    block_q: constexpr,
    scaled: constexpr,
) -> None:
    """Queries in the format of the rows, float16 or int8 (where ``scaled``): the best score of each group.

    Grid: groups / block_g x ceil(nq / block_q), queries first, so that neighbours share the rows they read.
    """
    query_blocks = tl.cdiv(nq, block_q)
    block = (tl.program_id(0) // query_blocks).to(tl.int64)
    query = (tl.program_id(0) % query_blocks) * block_q + tl.arange(0, block_q)
    row = tl.arange(0, block_g * 32)
    column = tl.arange(0, block_d)
    tile = x + block * (block_g * 32 * dim) + row[:, None] * dim + column[None, :]
    asked = q + query[None, :] * dim + column[:, None]
    known = query < nq
    dot = tl.zeros((block_g * 32, block_q), tl.int32 if scaled else tl.float32)
    for d in range(0, dim, block_d):
        dot = tl.dot(tl.load(tile + d), tl.load(asked + d, mask=known[None, :], other=0), dot, out_dtype=dot.dtype)
    product = dot.to(tl.float32)
    if scaled:
        product *= tl.load(scales + block * (block_g * 32) + row)[:, None]
    factor = tl.load(alpha + query, mask=known, other=0.0)
    score = tl.load(bias + block * (block_g * 32) + row)[:, None] - product * factor[None, :]
    best = tl.min(tl.reshape(score, (block_g, 32, block_q)), 1)
    place = query.to(tl.int64)[None, :] * groups + block * block_g + tl.arange(0, block_g)[:, None]
    tl.store(out + place, best, mask=known[None, :])


def minima_stream(
    x,
    scales,
    bias,
    q,
    alpha,
    out,
    groups,
    nq,
    dim: constexpr,
    block_d: constexpr,
    block_g: constexpr,
    block_q: constexpr,
    scaled: constexpr,
) -> None:
    """As :func:`minima_many`, but a program's queries stay in shared memory while its share of the rows streams by.

    Grid: ceil(nq / block_q) x any number of shares, queries first: programs that run at once read the same rows.
    """
    query_blocks = tl.cdiv(nq, block_q)
    query = (tl.program_id(0) % query_blocks) * block_q + tl.arange(0, block_q)
    known = query < nq
    row = tl.arange(0, block_g * 32)
    column = tl.arange(0, block_d)
    asked = q + query[None, :] * dim + column[:, None]
    held = ()
    for d in tl.static_range(0, dim, block_d):
        held += (tl.load(asked + d, mask=known[None, :], other=0),)
    factor = tl.load(alpha + query, mask=known, other=0.0)
    for block in range(tl.program_id(0) // query_blocks, groups // block_g, tl.num_programs(0) // query_blocks):
        first = tl.cast(block, tl.int64) * (block_g * 32)
        tile = x + first * dim + row[:, None] * dim + column[None, :]
        dot = tl.zeros((block_g * 32, block_q), tl.int32 if scaled else tl.float32)
        for part in tl.static_range(0, dim // block_d):
            dot = tl.dot(tl.load(tile + part * block_d), held[part], dot, out_dtype=dot.dtype)
        product = dot.to(tl.float32)
        if scaled:
            product *= tl.load(scales + first + row)[:, None]
        score = tl.load(bias + first + row)[:, None] - product * factor[None, :]
        best = tl.min(tl.reshape(score, (block_g, 32, block_q)), 1)
        place = query.to(tl.int64)[None, :] * groups + block * block_g + tl.arange(0, block_g)[:, None]
        tl.store(out + place, best, mask=known[None, :])


def select(
    values,
    best,
    columns,
    width,
    want: constexpr,
    kept: constexpr,
    fold: constexpr,
    block: constexpr,
) -> None:
    """The ``want`` least of each row of ``values``, least first, and their columns, the first of equals. Grid: rows.

    A column's number is packed below the bits of its value, so one sort orders both; the bits are inverted, because
    ``topk`` of older Tritons knows only the largest. The ``kept`` best folds, of ``fold`` columns each, are found
    first: the best columns lie in them. ``kept`` is a power of two from ``want`` on, at most ``block``; ``width`` is a
    multiple of 8.
    """
    row = values + tl.multiple_of(tl.program_id(0).to(tl.int64) * width, 8)
    within = tl.arange(0, fold)
    keys = ~tl.full((kept,), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(0, tl.cdiv(width, fold), block):
        at = start + tl.arange(0, block)
        column = at[:, None] * fold + within[None, :]
        bits = tl.min(tl.load(row + column, mask=column < width, other=float("inf")), 1).to(tl.int32, bitcast=True)
        near = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32 | at
        near = tl.topk(~near, kept)
        keys = tl.topk(tl.reshape(tl.join(keys, near), (2 * kept,)), kept)
    column = tl.reshape((~keys & 0x7FFFFFFF).to(tl.int32)[:, None] * fold + within[None, :], (kept * fold,))
    bits = tl.load(row + column, mask=column < width, other=float("inf")).to(tl.int32, bitcast=True)
    keys = ~tl.topk(~(tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32 | column), kept)
    at = tl.arange(0, kept)
    place = tl.program_id(0).to(tl.int64) * want + at
    bits = (keys >> 32).to(tl.int32)
    value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    tl.store(best + place, value, mask=at < want)
    tl.store(columns + place, keys & 0x7FFFFFFF, mask=at < want)


def rescore(
    x,
    scales,
    bias,
    q,
    alpha,
    chosen,
    out,
    dim: constexpr,
    block_d: constexpr,
    span: constexpr,
    scaled: constexpr,
) -> None:
    """Queries in float32: the scores of all rows of each query's chosen groups, +inf for group -1. Grid: width, nq."""
    width = tl.num_programs(0)
    place = tl.program_id(1).to(tl.int64) * width + tl.program_id(0)
    query = q + tl.program_id(1).to(tl.int64) * dim
    group = tl.load(chosen + place)
    first = tl.maximum(group, 0).to(tl.int64) * 32
    row = tl.arange(0, 32)
    column = tl.arange(0, block_d)
    tile = x + first * dim + row[:, None] * dim + column[None, :]
    total = tl.zeros((32, block_d), tl.float32)
    for far in range(0, dim, span):
        for near in tl.static_range(0, span, block_d):
            d = far + near
            total += tl.load(tile + d).to(tl.float32) * tl.load(query + d + column)[None, :]
    dot = tl.sum(total, 1)
    if scaled:
        dot *= tl.load(scales + first + row)
    score = tl.load(bias + first + row) - tl.load(alpha + tl.program_id(1)) * dot
    tl.store(out + place * 32 + row, tl.where(group < 0, float("inf"), score))


def locate(
    groups,
    indices,
    values,
    order,
    out,
    width,
    count,
    block: constexpr,
) -> None:
    """The positions of the rows at ``indices`` among a query's chosen groups, -1 where the score is +inf.

    Grid: nq, ceil(count / block).
    """
    at = tl.program_id(1) * block + tl.arange(0, block)
    known = at < count
    place = tl.program_id(0).to(tl.int64) * count + at
    index = tl.load(indices + place, mask=known, other=0)
    group = tl.load(groups + tl.program_id(0).to(tl.int64) * width + index // 32, mask=known, other=0)
    position = tl.load(order + tl.maximum(group, 0) * 32 + index % 32, mask=known, other=-1)
    score = tl.load(values + place, mask=known, other=float("inf"))
    tl.store(out + place, tl.where(score == float("inf"), -1, position).to(tl.int64), mask=known)


def list_minima_one(
    x,
    scales,
    bias,
    q,
    alpha,
    probed,
    list_start,
    out,
    groups,
    nprobe,
    dim: constexpr,
    block_d: constexpr,
    span: constexpr,
    block_p: constexpr,
    scaled: constexpr,
) -> None:
    """One query, float32, against the groups of its probed lists, one list after another: each group's best score, and
    which group it is; +inf and -1 behind the last list. Grid: columns of ``out``. ``block_p`` is at least ``nprobe``.
    """
    at = tl.program_id(0)
    place = tl.arange(0, block_p)
    which = tl.load(probed + place, mask=place < nprobe, other=0)
    start = tl.load(list_start + which)
    size = tl.where(place < nprobe, tl.load(list_start + which + 1) - start, 0)
    ends = tl.cumsum(size, 0)
    mine = place == tl.sum((ends <= at).to(tl.int32), 0)
    group = tl.where(at < tl.sum(size, 0), tl.sum(tl.where(mine, start + at - (ends - size), 0), 0), -1)
    tl.store(groups + at, group)
    best = tl.full((1,), float("inf"), tl.float32)
    if group >= 0:
        row = tl.arange(0, 32)
        column = tl.arange(0, block_d)
        tile = x + group * (32 * dim) + row[:, None] * dim + column[None, :]
        total = tl.zeros((32, block_d), tl.float32)
        for far in range(0, dim, span):
            for near in tl.static_range(0, span, block_d):
                d = far + near
                total += tl.load(tile + d).to(tl.float32) * tl.load(q + d + column)[None, :]
        dot = tl.sum(total, 1)
        if scaled:
            dot *= tl.load(scales + group * 32 + row)
        score = tl.load(bias + group * 32 + row) - tl.load(alpha) * dot
        best = tl.min(tl.reshape(score, (1, 32)), 1)
    tl.store(out + at + tl.arange(0, 1), best)


def list_minima(
    x,
    scales,
    bias,
    q,
    alpha,
    out,
    work_list,
    work_start,
    tiles,
    first_pair,
    pairs,
    columns,
    list_start,
    nlist,
    nprobe,
    width,
    dim: constexpr,
    block_d: constexpr,
    block_g: constexpr,
    block_q: constexpr,
    scaled: constexpr,
) -> None:
    """Some of the queries that probe a list against some of its groups: the best score of each group.

    Grid: the work, or more; surplus programs have list ``nlist``.
    """
    place = tl.load(work_list + tl.program_id(0))
    if place < nlist:
        part = tl.program_id(0) - tl.load(work_start + place)
        count = tl.load(tiles + place)
        pair = tl.load(first_pair + place) + (part % count) * block_q + tl.arange(0, block_q)
        known = pair < tl.load(first_pair + place + 1)
        asking = tl.load(pairs + pair, mask=known, other=0)
        query = (asking // nprobe).to(tl.int64)
        start = tl.load(list_start + place)
        within = (part // count) * block_g + tl.arange(0, block_g)
        exists = start + within < tl.load(list_start + place + 1)
        first = (start + (part // count) * block_g).to(tl.int64) * 32
        row = tl.arange(0, block_g * 32)
        here = row // 32 + start + (part // count) * block_g < tl.load(list_start + place + 1)
        column = tl.arange(0, block_d)
        tile = x + first * dim + row[:, None] * dim + column[None, :]
        asked = q + query[None, :] * dim + column[:, None]
        dot = tl.zeros((block_g * 32, block_q), tl.int32 if scaled else tl.float32)
        for d in range(0, dim, block_d):
            rows = tl.load(tile + d, mask=here[:, None], other=0)
            dot = tl.dot(rows, tl.load(asked + d, mask=known[None, :], other=0), dot, out_dtype=dot.dtype)
        product = dot.to(tl.float32)
        if scaled:
            product *= tl.load(scales + first + row, mask=here, other=0.0)[:, None]
        factor = tl.load(alpha + query, mask=known, other=0.0)
        score = tl.load(bias + first + row, mask=here, other=float("inf"))[:, None] - product * factor[None, :]
        best = tl.min(tl.reshape(score, (block_g, 32, block_q)), 1)
        column_start = tl.load(columns + asking, mask=known, other=0).to(tl.int64)
        target = out + (query * width + column_start)[None, :] + within[:, None]
        tl.store(target, best, mask=exists[:, None] & known[None, :])


def assign(
    x,
    centroids,
    norms,
    labels,
    scores,
    m,
    nlist,
    dim: constexpr,
    block_d: constexpr,
    block_n: constexpr,
    block_c: constexpr,
) -> None:
    """The nearest centroid of each row, the first of equals, and |c|^2 - 2 x.c. Grid: ceil(m / block_n)."""
    block = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, block_n)
    here = block * block_n + row < m
    column = tl.arange(0, block_d)
    tile = x + block * (block_n * dim) + row[:, None] * dim + column[None, :]
    best = tl.full((block_n,), float("inf"), tl.float32)
    label = tl.zeros((block_n,), tl.int32)
    for c in range(0, nlist, block_c):
        centroid = c + tl.arange(0, block_c)
        known = centroid < nlist
        other = centroids + centroid[None, :] * dim + column[:, None]
        dot = tl.zeros((block_n, block_c), tl.float32)
        for d in range(0, dim, block_d):
            rows = tl.load(tile + d, mask=here[:, None], other=0.0)
            dot = tl.dot(rows, tl.load(other + d, mask=known[None, :], other=0.0), dot)
        score = tl.load(norms + centroid, mask=known, other=float("inf"))[None, :] - 2.0 * dot
        least = tl.min(score, 1)
        at = tl.argmin(score, 1)
        label = tl.where(least < best, c + at, label)
        best = tl.minimum(least, best)
    tl.store(labels + block * block_n + row, label, mask=here)
    tl.store(scores + block * block_n + row, best, mask=here)


def sum_lists(
    x,
    order,
    starts,
    out,
    dim: constexpr,
    block_d: constexpr,
    block_r: constexpr,
) -> None:
    """The sum of each list's rows, in a fixed order: equal input gives equal bits. Grid: lists, dim / block_d."""
    place = tl.program_id(0)
    column = tl.program_id(1) * block_d + tl.arange(0, block_d)
    end = tl.load(starts + place + 1)
    total = tl.zeros((block_r, block_d), tl.float32)
    for r in range(tl.load(starts + place), end, block_r):
        member = r + tl.arange(0, block_r)
        here = member < end
        row = tl.load(order + member, mask=here, other=0).to(tl.int64)
        total += tl.load(x + row[:, None] * dim + column[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    tl.store(out + place.to(tl.int64) * dim + column, tl.sum(total, 0))
