"""The page: one HTML file that needs nothing else, from the records of the newest run of each section."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import pictures
from .charts import Chart, charts
from .drawing import svg
from .filing import ABOUT
from .registry import OURS
from .table import MARGIN, Ranking, cells, facts_of, rankings, shown

__all__ = ["circumstances", "page", "write"]

Record = dict[str, Any]

STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1c;--paper:#fff;--line:#ddd;--soft:#6b6b6b;--code:#f2f2f2;--ours:#0b5fff;
--won:#146c2e;--lost:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#d7dae0;--paper:#16181d;--line:#3a3f4a;--soft:#9aa0ab;--code:#23262e;
--ours:#7fa9ff;--won:#6fd08c;--lost:#ff9089}}
body{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--paper)}
table{border-collapse:collapse;width:100%;margin:.6rem 0 1.6rem;font-size:14px}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
tr.ours td{font-weight:600;color:var(--ours)}tr.out td{color:var(--soft)}.lost{color:var(--lost)}
.won{color:var(--won);font-weight:600}.note,figcaption{color:var(--soft);font-size:14px}
figure{margin:1rem 0 2rem}svg{width:100%;height:auto;font:13px system-ui,sans-serif;fill:var(--ink)}
svg .grid{stroke:var(--line)}svg .title{font-size:15px;font-weight:600}
h2{margin-top:2.2rem}code{background:var(--code);padding:0 .25rem}details{margin:1rem 0}summary{cursor:pointer}
"""


def write(records: Sequence[Record], path: Path) -> list[Path]:
    """The page at ``path`` and the pictures beside it; what was written."""
    path.write_text(page(records), encoding="utf-8")
    return [path, *pictures.draw(charts(records), path.parent, path.stem)]


def page(records: Sequence[Record]) -> str:
    """HTML without a reference to anything outside itself."""
    ranked, drawn = rankings(records), charts(records)
    first, rest = (
        [chart for chart in drawn if chart.key == "recall"],
        [chart for chart in drawn if chart.key != "recall"],
    )
    body = [
        "<h1>This store beside its peers</h1>",
        headline(records, ranked),
        *map(figure, first),
        "<h2>Who is first</h2>",
        LEGEND,
        verdicts(ranked),
        "<h2>More pictures</h2>",
        *map(figure, rest),
        folded("Every figure", *(full(ranking) for ranking in ranked)),
        folded("Growth: the exponents", growth(records)),
        folded("How it was measured", setting(records)),
        folded("Versions, settings and durability of each peer", peers(records)),
        folded("What did not come through", troubles(records)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>This store beside its peers</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


LEGEND = (
    '<p class="note"><span class="won">Green</span>: this store is first or alone. <span class="lost">Red</span>: '
    "another is ahead, or the recall was missed. Times and sizes: less is better; rates per second: more is better. "
    f"A search counts for a row when its recall, in brackets, is at most {MARGIN} below the target. Stores keep units "
    "and vectors on disk; libraries are indexes in memory and are compared only where the row says so. Synced: on the "
    "disk before the call returns.</p>"
)


def headline(records: Sequence[Record], ranked: Sequence[Ranking]) -> str:
    """One sentence with the result, one with the circumstances of each run."""
    won = sum(ranking.first for ranking in ranked)
    runs = (f"<li>{escape(circumstances(head, records))}</li>" for head in records if head["section"] == "machine")
    return f"<p><strong>First in {won} of {len(ranked)} rows.</strong></p><ul>{''.join(runs)}</ul>"


def circumstances(head: Record, records: Sequence[Record]) -> str:
    """What one run measured, at its own sizes."""
    machine = head["machine"]
    busy = machine.get("load", 0) > 1
    other = f", beside other work (load {machine['load']:.0f} on {machine['cores']} cores)" if busy else ""
    return f"{sizes_of(head, records)}, {machine['model']}, one thread, {machine['date']}{other}"


def sizes_of(head: Record, records: Sequence[Record]) -> str:
    """The numbers of units of a run; one of growth alone has several, and ``size`` is not among them."""
    mine = [record for record in records if record.get("run") == head.get("run") and record["section"] not in ABOUT]
    others = [f"{one['set']}: {one['size']:,} of {one['dimension']:,} dimensions" for one in mine if "data" in one]
    if mine and all(record["section"] == "sets" for record in mine):
        return ", ".join(others)
    grown = sorted({record["size"] for record in mine if record["section"] == "scaling" and record.get("size")})
    if grown and all(record["section"] == "scaling" for record in mine):
        return f"growth at {', '.join(f'{size:,}' for size in grown)} units, {head['dimension']} dimensions"
    return ", ".join([f"{head['size']:,} units, {head['dimension']} dimensions", *others])


def figure(chart: Chart) -> str:
    return f"<figure>{svg(chart)}<figcaption>{escape(chart.note)}</figcaption></figure>"


def folded(title: str, *parts: str) -> str:
    inside = "".join(parts)
    return f"<details><summary><strong>{escape(title)}</strong></summary>{inside}</details>" if inside else ""


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """rows: (class of the row, cells that are HTML already)."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells_)}</tr>' for kind, cells_ in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def setting(records: Sequence[Record]) -> str:
    """Machine, data and rules of every run that the page draws from."""
    return "".join(one_setting(record, records) for record in records if record["section"] == "machine")


def one_setting(record: Record, records: Sequence[Record]) -> str:
    machine, queries, plan = record["machine"], record["queries"], record["plan"]
    facts = (
        f"<code>{escape(record['command'])}</code>, {escape(machine['date'])}, run {escape(record['run'])}: "
        f"{escape(sizes_of(record, records))}. Data: {escape(record['data'])}; {record['dimension']} dimensions; "
        f"{escape(other_data(record, records))}"
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


def other_data(head: Record, records: Sequence[Record]) -> str:
    """The data sets of a run beside its main part."""
    mine = [one for one in records if one["section"] == "sets" and "data" in one and one.get("run") == head.get("run")]
    return "".join(f"{one['set']}: {one['data']}, {one['dimension']:,} dimensions; " for one in mine)


def verdicts(ranked: Sequence[Ranking]) -> str:
    rows = []
    for ranking in ranked:
        what, ours, before, other, verdict = map(escape, cells(ranking))
        kind = "won" if ranking.first else "lost"
        rows.append(("", [what, ours, before, other, f'<span class="{kind}">{verdict}</span>']))
    return table(("what", "this store", "before", "best of the others", "verdict"), rows)


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
    return "<p>figure = a times units to the exponent</p>" + table(head, rows)


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
    return table(("peer", "section", "what happened"), rows)
