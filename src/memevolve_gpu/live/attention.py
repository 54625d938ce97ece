"""Does the index still find what is asked today? Real queries are asked again, beside exact search."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from ..errors import DeviceError
from ..training.judge import Pause, no_pause
from ..training.quality import Quality, recall_of
from ..types import Effort, FloatArray
from ..utils.vectors import normalize_rows
from .builder import JUDGED_AT, judged
from .causes import Cause
from .live import LiveIndex
from .view import View

__all__ = ["calibration_is_old", "probe", "quality_now", "recalibrate"]

PROBED = 48
"""Real queries that one probe asks."""

STEP = 24
"""Exact searches between two pauses."""

ROWS_READ = 4_000_000
"""Rows that exact search may read for a figure in health: 0.2 s at 384 dimensions, one thread."""

FEWEST = 8
"""Queries that a recall is measured on at the least."""

PROBE_SLACK = 0.03
"""48 queries of ten results say no more: one standard error at recall 0.95 is about 0.01."""


def calibration_is_old(live: LiveIndex, view: View) -> bool:
    """Was the body calibrated before most of what is asked now was asked?"""
    return view.facts.calibration is not None and live.asked.has_news_since(view.facts.asked)


def recalibrate(live: LiveIndex, view: View, pause: Pause = no_pause) -> Cause | None:
    """Measure the body in use on the queries of today; a cause to train when it falls short."""
    started = time.perf_counter()
    facts, quality = judged(view.body, replace(view.facts, calibration=None), live.asked, live.settings, pause)
    live.describe(view.body, facts)
    queries = facts.calibration.queries if facts.calibration is not None else 0
    live.events.record("calibrated", f"on {queries} real queries", seconds=time.perf_counter() - started)
    if quality.meets(live.settings.target_recall):
        return None
    return Cause("train", f"real queries find too little: {quality}")


def probe(live: LiveIndex, view: View, pause: Pause = no_pause) -> Cause | None:
    """Recall@10 of real queries on the view as it is, tail and tombstones included; a cause to train when it fell."""
    queries = live.asked.sample()[:PROBED]
    if view.facts.calibration is None or not len(queries):
        return None
    probed, target = _recall(live, view, queries, pause), live.settings.target_recall
    live.describe(view.body, replace(live.view.facts, probed=probed))
    if len(queries) < PROBED or probed >= target - PROBE_SLACK:
        return None
    return Cause("train", f"recall@10 of real queries fell to {probed:.3f}")


def quality_now(live: LiveIndex, view: View) -> Quality | None:
    """How searches do on the view as it is, tail and tombstones included; None where nothing stands for exact search.

    The self-hits of living rows, and recall@10 of the real queries kept: asked again beside exact search where that
    reads few enough rows, else as last probed, else as measured when the body was built. Remembered until something
    changes.
    """
    held = view.facts.quality
    if held is None:
        return None
    key = (view.watermark, id(view.body), live.asked.seen, view.facts.probed)
    known = live.quality_now
    if known is None or known[0] != key:
        try:
            known = key, _measured_now(live, view, held)
        except DeviceError:  # the next search goes on from the host
            return held
        live.quality_now = known
    return known[1]


def _measured_now(live: LiveIndex, view: View, held: Quality) -> Quality:
    queries = live.asked.sample()[: min(PROBED, ROWS_READ // max(1, view.count))]
    if len(queries) >= FEWEST:
        recall = _recall(live, view, queries, no_pause)
    else:
        recall = held.recall if view.facts.probed is None else view.facts.probed
    return Quality(_self_hits(live, view), recall, len(queries))


def _recall(live: LiveIndex, view: View, queries: FloatArray, pause: Pause) -> float:
    """Recall@10 at the effort of searches."""
    target = live.settings.target_recall
    found = view.search(queries, JUDGED_AT, view.facts.effort(view.body, JUDGED_AT, target)).distances
    truth = np.empty_like(found)
    for start in range(0, len(queries), STEP):
        part = slice(start, start + STEP)
        truth[part] = view.search(queries[part], JUDGED_AT, Effort(exact=True)).distances
        pause()
    return recall_of(found, truth)


def _self_hits(live: LiveIndex, view: View) -> float:
    """The share of living rows, spread over their age, that find themselves or a row with the same vector."""
    rows = live.records.spread(PROBED)
    if not rows or view.metric == "ip":  # there the nearest need not be the row itself
        return 1.0
    vectors = np.stack([np.frombuffer(row.vector, dtype="<f4") for row in rows])
    queries = normalize_rows(vectors) if view.metric == "cosine" else vectors
    found = view.search(queries, 1, view.facts.effort(view.body, 1, live.settings.target_recall))
    nearest = ["".join(found.ids(place)) for place in range(len(rows))]
    held = live.records.vectors_of(nearest)
    hits = [row.id == one or held.get(one) == row.vector for row, one in zip(rows, nearest, strict=True)]
    return sum(hits) / len(hits)
