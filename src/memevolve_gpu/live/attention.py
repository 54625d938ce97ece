"""Does the index still find what is asked today? Real queries are asked again, beside exact search."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from ..training.judge import Pause, no_pause
from ..training.quality import recall_of
from ..types import Effort
from .builder import JUDGED_AT, judged
from .causes import Cause
from .live import LiveIndex
from .view import View

__all__ = ["calibration_is_old", "probe", "recalibrate"]

PROBED = 48
"""Real queries that one probe asks."""

STEP = 24
"""Exact searches between two pauses."""

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
    target = live.settings.target_recall
    found = view.search(queries, JUDGED_AT, view.facts.effort(view.body, JUDGED_AT, target)).distances
    truth = np.empty_like(found)
    for start in range(0, len(queries), STEP):
        part = slice(start, start + STEP)
        truth[part] = view.search(queries[part], JUDGED_AT, Effort(exact=True)).distances
        pause()
    probed = recall_of(found, truth)
    live.describe(view.body, replace(live.view.facts, probed=probed))
    if len(queries) < PROBED or probed >= target - PROBE_SLACK:
        return None
    return Cause("train", f"recall@10 of real queries fell to {probed:.3f}")
