"""Does the index still find what is asked today? Real queries are asked again, beside exact search."""

from __future__ import annotations

import time
from dataclasses import replace

from ..training.quality import recall_of
from ..types import Effort
from .builder import JUDGED_AT, judged
from .causes import Cause
from .live import LiveIndex
from .view import View

__all__ = ["calibration_is_old", "probe", "recalibrate"]

PROBED = 48
"""Real queries that one probe asks."""

PROBE_SLACK = 0.03
"""48 queries of ten results say no more: one standard error at recall 0.95 is about 0.01."""


def calibration_is_old(live: LiveIndex, view: View) -> bool:
    """Was the body calibrated before most of what is asked now was asked?"""
    return view.facts.calibration is not None and live.asked.has_news_since(view.facts.asked)


def recalibrate(live: LiveIndex, view: View) -> Cause | None:
    """Measure the body in use on the queries of today; a cause to train when it falls short."""
    started = time.perf_counter()
    facts, quality = judged(view.body, replace(view.facts, calibration=None), live.asked, live.settings)
    live.describe(view.body, facts)
    queries = facts.calibration.queries if facts.calibration is not None else 0
    live.events.record("calibrated", f"on {queries} real queries", seconds=time.perf_counter() - started)
    if quality.meets(live.settings.target_recall):
        return None
    return Cause("train", f"real queries find too little: {quality}")


def probe(live: LiveIndex, view: View) -> Cause | None:
    """Recall@10 of real queries on the view as it is, tail and tombstones included; a cause to train when it fell."""
    queries = live.asked.sample()[:PROBED]
    if view.facts.calibration is None or not len(queries):
        return None
    target = live.settings.target_recall
    found = view.search(queries, JUDGED_AT, view.facts.effort(view.body, JUDGED_AT, target))
    truth = view.search(queries, JUDGED_AT, Effort(exact=True))
    probed = recall_of(found.distances, truth.distances)
    live.describe(view.body, replace(live.view.facts, probed=probed))
    if len(queries) < PROBED or probed >= target - PROBE_SLACK:
        return None
    return Cause("train", f"recall@10 of real queries fell to {probed:.3f}")
