"""The page: one HTML file that needs nothing else, from the records of the newest run of each section."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import pictures
from .charts import charts
from .drawing import svg
from .registry import OURS
from .table import MARGIN, Ranking, cells, facts_of, rankings, shown

__all__ = ["page", "write"]

Record = dict[str, Any]

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;color:#1c1c1c;background:#fff}
table{border-collapse:collapse;width:100%;margin:.6rem 0 1.6rem;font-size:13px}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #ddd;vertical-align:top}
tr.ours td{font-weight:600;color:#0b5fff}tr.out td{color:#888}td.lost{color:#b3261e}td.won{color:#146c2e}
svg{width:100%;height:auto;margin:.6rem 0 1.4rem;font:12px system-ui,sans-serif}
svg .grid{stroke:#e4e4e4}svg .title{font-size:14px;font-weight:600}
h2{margin-top:2.2rem}code{background:#f2f2f2;padding:0 .25rem}
"""


def write(records: Sequence[Record], path: Path) -> list[Path]:
    """The page at ``path`` and the pictures beside it; what was written."""
    path.write_text(page(records), encoding="utf-8")
    return [path, *pictures.draw(charts(records), path.parent, path.stem)]


def page(records: Sequence[Record]) -> str:
    """HTML without a reference to anything outside itself."""
    ranked = rankings(records)
    body = [
        "<h1>This store beside its peers</h1>",
        setting(records),
        "<h2>Who is first</h2>",
        verdicts(ranked),
        "<h2>Pictures</h2>",
        *(svg(chart) for chart in charts(records)),
        "<h2>Every figure</h2>",
        *(full(ranking) for ranking in ranked),
        growth(records),
        "<h2>What was measured, and how it was set</h2>",
        peers(records),
        troubles(records),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>This store beside its peers</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """rows: (class of the row, cells that are HTML already)."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells_)}</tr>' for kind, cells_ in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def setting(records: Sequence[Record]) -> str:
    """Machine, data and rules of every run that the page draws from."""
    return "".join(one_setting(record) for record in records if record["section"] == "machine")


def one_setting(record: Record) -> str:
    machine, queries, plan = record["machine"], record["queries"], record["plan"]
    facts = (
        f"<code>{escape(record['command'])}</code>, {escape(machine['date'])}, run {escape(record['run'])}: "
        f"{record['size']:,} units. Data: {escape(record['data'])}; {record['dimension']} dimensions; "
        f"seed {record['seed']}. {escape(str(machine['model']))}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, {escape(machine['system'])}, Python {escape(machine['python'])}; "
        f"appending and syncing 4 KB takes {machine['sync_ms']:.2f} ms there. {escape(record['threads']['affinity'])}."
    )
    rules = (
        f"Each peer has a process of its own, and the others are stopped while it works. Peers take turns of "
        f"{plan['block']} calls, each begun with two unmeasured ones; up to {plan['passes']} passes over "
        f"{queries['judged by']} queries, half like the data and half out of distribution. Knobs are the smallest that "
        f"reach the recall on {queries['calibrated on']} other queries; a figure counts when the judged recall is no "
        f"more than {MARGIN} below it. Times are medians of the passes' medians for searches, and medians elsewhere."
    )
    return f"<p>{facts}</p><p>{rules}</p>"


def verdicts(ranked: Sequence[Ranking]) -> str:
    rows = []
    for ranking in ranked:
        what, ours, other, verdict = map(escape, cells(ranking))
        kind = "won" if verdict.startswith(("first", "alone")) else "lost"
        rows.append(("", [what, ours, other, f'<span class="{kind}">{verdict}</span>']))
    return table(("what", "this store", "best of the others", "verdict"), rows)


def full(ranking: Ranking) -> str:
    rows = []
    for entry in ranking.entries:
        kind = "ours" if entry.peer in OURS else "" if entry.ranked else "out"
        rows.append((kind, [escape(entry.peer), f"{shown(entry.value)} {ranking.row.unit}", escape(entry.note)]))
    return f"<h3>{escape(ranking.row.title)}</h3>" + table(("peer", "figure", ""), rows)


def growth(records: Sequence[Record]) -> str:
    fitted = [record for record in records if record["section"] == "scaling" and "exponent" in record]
    if not fitted:
        return ""
    rows = [
        (
            "ours" if record["peer"] in OURS else "",
            [
                escape(record["peer"]),
                escape(record["curve"]),
                f"{record['exponent']:.2f}",
                f"{record['residual']:.2f}",
                f"{record['from']:,} to {record['to']:,}",
            ],
        )
        for record in fitted
    ]
    head = ("peer", "curve", "exponent", "residual (e-folds)", "fitted over")
    return "<h3>Growth: figure = a times units to the exponent</h3>" + table(head, rows)


def peers(records: Sequence[Record]) -> str:
    rows = []
    for name, facts in facts_of(records).items():
        versions = ", ".join(f"{module} {version}" for module, version in facts["versions"].items())
        knobs = f"{facts['knob']}: {', '.join(f'{knob:g}' for knob in facts['knobs'])}"
        cells_ = [escape(words) for words in (name, versions, facts["settings"], knobs, facts["durability"])]
        rows.append(("ours" if name in OURS else "", cells_))
    return table(("peer", "versions", "settings", "knob", "durability"), rows)


def troubles(records: Sequence[Record]) -> str:
    found = [record for record in records if "error" in record or "stopped" in record]
    if not found:
        return ""
    rows = [
        ("", [escape(r["peer"]), escape(r["section"]), escape(str(r.get("error") or f"{r['size']:,}: {r['stopped']}"))])
        for r in found
    ]
    return "<h2>What did not come through</h2>" + table(("peer", "section", "what happened"), rows)
