"""The command that shows the devices of this machine."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType

from ..components.store.engine import engine_table, this_machine
from ..devices.machine import Machine
from ..utils.config import StorageConfig
from .options import AsJson
from .output import Output, Rows, one_line

__all__ = ["devices"]


def devices(*, as_json: AsJson = False) -> None:
    """List the GPUs, what their memory has room for, which engines are installed, and what DEVICE leads to."""
    config = StorageConfig()
    machine = this_machine(config)
    found, choice = machine.gpus(), machine.choice
    document = {
        "gpus": [
            {
                "device": gpu.device,
                "name": gpu.name,
                "compute_capability": ".".join(map(str, gpu.capability)),
                "total_mb": gpu.total_mb,
                "free_mb": gpu.free_mb,
                "problem": gpu.problem or None,
            }
            for gpu in found.gpus
        ],
        "driver": found.driver or None,
        "problem": found.problem or None,
        "engines": {engine: problem or "installed" for engine, problem in machine.engines().items()},
        "engine_table": engine_table(config).as_dict(),
        "requested": machine.request,
        "chosen": choice.device,
        "reason": choice.reason,
        "budget": machine.budget().as_dict(),
    }
    Output(as_json).show(document, *_texts(document, machine))


def _texts(document: dict[str, Any], machine: Machine) -> list[RenderableType]:
    titles = ("device", "name", "capability", "total MB", "free MB", "problem")
    rows = [[str(value or "-") for value in gpu.values()] for gpu in document["gpus"]]
    budget = machine.budget()
    figures = [
        ["driver", document["driver"] or "-"],
        ["searches run on", document["chosen"]],
    ]
    figures += [[f"engine {name}", state] for name, state in document["engines"].items()]
    figures += [["memory limit", f"{budget.limit >> 20} MB of {budget.total >> 20} MB, {budget.free >> 20} MB free"]]
    listed: RenderableType = Rows(titles, rows) if rows else f"no GPU: {document['problem']}"
    why = f"device: {document['chosen']}: {document['reason']}"
    table = f"engines by number of units: {_table_text(document['engine_table'])}"
    return [listed, "", Rows(("figure", "value"), figures), "", one_line(why), one_line(table)]


def _table_text(table: dict[str, Any]) -> str:
    """The engines for how many units, quickest first, in one line."""
    bands = [f"{'beyond' if rows is None else f'to {rows}'}: {', '.join(names)}" for rows, names in table["bands"]]
    return f"{'; '.join(bands)} ({'measured' if table['measured'] else 'unmeasured'}: {table['source']})"
