"""Write benchmarks/results/index.html: every result file with what made it, and every figure.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{text-align:left;padding:.3rem .6rem;vertical-align:top;
border-bottom:1px solid #8884}
td:nth-child(2){white-space:nowrap}img{width:100%;height:auto}figure{margin:1rem 0 2rem}code{overflow-wrap:anywhere}
"""


def page(folder: Path) -> str:
    """HTML that links every file below the folder and shows every picture."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "index.html")
    data = [path for path in files if path.suffix in (".json", ".jsonl")]
    pictures = [path for path in files if path.suffix == ".png"]
    pages = [path for path in files if path not in {*data, *pictures}]
    rows = "".join(f"<tr><td>{link(path, folder)}</td>{cells(path)}</tr>" for path in data)
    listed = "".join(f"<li>{link(path, folder)}</li>" for path in pages)
    dark = {path for path in pictures if path.stem.endswith("-dark")}
    shown = "".join(f"<figure>{picture(path, folder, dark)}</figure>" for path in pictures if path not in dark)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Results of the benchmarks</title>'
        f"<style>{STYLE}</style></head><body><h1>Results of the benchmarks</h1>"
        f"<p>Every figure that the documentation quotes comes from one of these files.</p><ul>{listed}</ul>"
        f"<table><thead><tr><th>file</th><th>date</th><th>made by</th></tr></thead><tbody>{rows}</tbody></table>"
        f"<h2>Pictures</h2>{shown}</body></html>\n"
    )


def link(path: Path, folder: Path) -> str:
    name = escape(path.relative_to(folder).as_posix())
    return f'<a href="{name}">{name}</a>'


def picture(path: Path, folder: Path, dark: set[Path]) -> str:
    """A picture, in dark mode its dark one where there is one; both are linked."""
    name = escape(path.relative_to(folder).as_posix())
    image, caption = f'<img loading="lazy" alt="{escape(path.stem)}" src="{name}">', link(path, folder)
    other = path.with_stem(f"{path.stem}-dark")
    if other in dark:
        source = escape(other.relative_to(folder).as_posix())
        image = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{source}">{image}</picture>'
        caption += f", {link(other, folder)}"
    return f"{image}<figcaption>{caption}</figcaption>"


def cells(path: Path) -> str:
    """The newest date in a file of results, and its commands."""
    text = path.read_text(encoding="utf-8")
    documents = (
        [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else [json.loads(text)]
    )
    found = [(key, value) for document in documents for key, value in texts(document) if key in ("date", "command")]
    dates = [value for key, value in found if key == "date"]
    commands = dict.fromkeys(value.strip() for key, value in found if key == "command")
    made = "<br>".join(f"<code>{escape(command)}</code>" for command in commands) or "-"
    return f"<td>{escape(max(dates, default='-')[:10])}</td><td>{made}</td>"


def texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every key with a text, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str):
                yield key, inner
            else:
                yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


if __name__ == "__main__":
    (RESULTS / "index.html").write_text(page(RESULTS), encoding="utf-8")
