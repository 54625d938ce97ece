"""Shared parts of the GPU benchmarks: data, fair timing, the indexes to compare, and the description of the machine."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from memevolve_gpu import __version__
from memevolve_gpu.devices.engine_probe import try_engine
from memevolve_gpu.errors import MemEvolveError
from memevolve_gpu.index.base import Index
from memevolve_gpu.index.registry import build
from memevolve_gpu.planner.device_plan import sized
from memevolve_gpu.types import FloatArray, IndexPlan, IntArray, Metric, Rows

__all__ = [
    "DESCRIPTION",
    "FAILURES",
    "RESULTS",
    "LateError",
    "Setting",
    "add_dims",
    "built",
    "clustered",
    "facts",
    "module",
    "note",
    "parser",
    "release",
    "rounded",
    "rows_of",
    "save",
    "script",
    "setting_of",
    "stopwatch",
    "timed",
    "why_not",
]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"
METRIC: Metric = "l2"


def compile_errors() -> tuple[type[Exception], ...]:
    """What Triton raises for a kernel that it cannot compile."""
    try:
        return (importlib.import_module("triton.errors").TritonError,)
    except (ImportError, AttributeError):
        return ()


FAILURES: tuple[type[Exception], ...] = (
    *(MemEvolveError, RuntimeError, MemoryError, ImportError, AttributeError, OSError),
    *(AssertionError, TypeError, ValueError, LookupError, ArithmeticError),
    *compile_errors(),
)
"""What keeps one contender from running; it is noted in its row, and the others go on."""

_BLOCK = 262_144
_LATENT, _SPREAD, _OFF = 32, 0.5, 0.02
DESCRIPTION = (
    "generated unit vectors: normal clusters, one for each 1,000 rows but at least 50, half as wide as their centres "
    "lie apart, in 32 dimensions carried into the full number, plus noise of 0.02; queries: half alike, half twice as "
    "wide"
)


class LateError(RuntimeError):
    """The minutes are used up; what was measured is kept."""


@dataclass(frozen=True)
class Setting:
    """Where to run, how much, and from which seed. ``index`` is N of ``cuda:N``.

    cpu: whether the CPU is measured beside the GPU. until: when nothing new begins, by ``time.monotonic``. keep: takes
    the name of a part and a row of it, as soon as the row is measured.
    """

    device: str
    quick: bool
    seed: int = 1
    cpu: bool = True
    until: float = float("inf")
    keep: Callable[[str, dict[str, Any]], None] = lambda _part, _row: None

    def check_time(self) -> None:
        """Raise LateError once the minutes are used up; asked before each row."""
        if time.monotonic() > self.until:
            raise LateError("the minutes were used up")

    def kept(self, part: str, row: dict[str, Any]) -> dict[str, Any]:
        """``row``, once it is safe."""
        self.keep(part, rounded(row))
        return row

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def index(self) -> int:
        return int(self.device.partition(":")[2] or 0)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to run the same code on CPU tensors")
    made.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, its figures mean nothing")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--no-cpu", action="store_true", help="leave the CPU out, which takes most of the time")
    made.add_argument("--json", type=Path, help="where to write the figures; nothing is written without it")
    return made


def setting_of(args: argparse.Namespace) -> Setting:
    device = "cuda:0" if args.device == "cuda" else args.device
    return Setting(device, args.quick, args.seed, not args.no_cpu)


def add_dims(made: argparse.ArgumentParser) -> None:
    """The dimensions, which several parts read."""
    made.add_argument("--dims", type=int, nargs="+", default=[384, 768])


def script(
    doc: str | None,
    run: Callable[..., dict[str, Any]],
    sizes_of: Callable[[argparse.Namespace], tuple[Any, ...]],
    *options: Callable[[argparse.ArgumentParser], None],
) -> None:
    """One benchmark as a program: read its options, ``run(setting, *sizes_of(args))``, save the figures."""
    made = parser(doc)
    for add in options:
        add(made)
    args = made.parse_args()
    setting = setting_of(args)
    save(args.json, {"machine": facts(setting), **run(setting, *sizes_of(args))})


def note(text: str) -> None:
    """Print what is going on, with the time: the machine may be taken away at any moment."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def module(name: str) -> Any:
    """The module, or None where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError, AttributeError):
        return None


def why_not(engine: str, setting: Setting) -> str:
    """Why ``engine`` (cpu, torch, faiss) cannot be measured here; empty when it can."""
    if engine == "cpu":
        return "" if setting.cpu else "left out by --no-cpu"
    if setting.on_gpu:
        return try_engine(engine, setting.index)
    if engine == "faiss":
        return "faiss-gpu needs a GPU"
    return "" if module("torch") is not None else "torch is not installed"


def facts(setting: Setting) -> dict[str, Any]:
    """Device, date and versions."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": _command(sys.argv),
        "device": setting.device,
        "device_name": "CPU tensors",
        "quick": setting.quick,
        "seed": setting.seed,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "memevolve_gpu": __version__,
        "numpy": np.__version__,
    }
    for name in ("torch", "triton", "faiss", "cupy", "flashlib"):
        loaded = module(name)
        found[name] = None if loaded is None else getattr(loaded, "__version__", "unknown")
    torch = module("torch")
    if setting.on_gpu and torch is not None:
        card = torch.cuda.get_device_properties(setting.index)
        found |= {"device_name": card.name, "cuda": torch.version.cuda, "memory_bytes": card.total_memory}
        found |= {"multiprocessors": card.multi_processor_count, "driver": _driver()}
    return found


def clustered(
    n: int, dim: int, setting: Setting, *, reuse_from: int | None = None, spread: float = _SPREAD
) -> FloatArray:
    """Generated unit vectors float32 (n, dim), the same for the same arguments on the same kind of device.

    Centres, one for each 1,000 rows but at least 50, lie in a space of 32 dimensions; rows lie around them, ``spread``
    times as wide as the centres, are carried into ``dim`` dimensions, moved off that space by a little, and normalised.
    ``reuse_from``: take the centres of so many rows. Not as uneven as real text is.
    """
    torch = module("torch")
    count = max(50, (reuse_from or n) // 1000)
    made = np.empty((n, dim), np.float32)
    device = setting.device if setting.on_gpu else "cpu"
    fixed = torch.Generator(device=device).manual_seed(setting.seed + dim)
    space = torch.randn((_LATENT, dim), generator=fixed, device=device)
    centres = torch.randn((count, _LATENT), generator=fixed, device=device)
    draw = torch.Generator(device=device).manual_seed(setting.seed + 7919 * n + round(100 * spread))
    for start in range(0, n, _BLOCK):
        rows = min(_BLOCK, n - start)
        chosen = torch.randint(count, (rows,), generator=draw, device=device)
        points = centres[chosen] + spread * torch.randn((rows, _LATENT), generator=draw, device=device)
        vectors = points @ space / _LATENT**0.5 + _OFF * torch.randn((rows, dim), generator=draw, device=device)
        vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        made[start : start + rows] = vectors.cpu().numpy()
    return made


def rows_of(vectors: FloatArray) -> Rows:
    """Row versions 0, 1, 2, ... with ids of eight digits."""
    n = len(vectors)
    digits = (np.arange(n)[:, None] // 10 ** np.arange(7, -1, -1)) % 10 + ord("0")
    ends: IntArray = 8 * np.arange(1, n + 1, dtype=np.int64)
    return Rows(np.arange(n, dtype=np.int64), digits.astype(np.uint8).ravel(), ends, vectors)


def built(plan: IndexPlan, rows: Rows, setting: Setting) -> Index:
    """The index, on the device of the setting unless its engine is ``cpu``, with all the device memory it can use."""
    if plan.engine != "cpu":
        plan = replace(plan, device=setting.device)
        n, dim = rows.vectors.shape
        plan = next(sized(plan, n, dim, _room(setting)), plan)
    return build(plan, rows, METRIC, seed=setting.seed)


def timed(call: Callable[[int], Any], setting: Setting, *, repeats: int = 100, seconds: float = 3.0) -> dict[str, Any]:
    """Median and 95th percentile of ``call(i)`` in milliseconds, after warming up; it ends with results on the host.

    A call that takes longer than half a second is warmed up once and measured twice.
    """
    if setting.quick:
        repeats, seconds = 3, 1.0
    slow = _once(call, 0) > 500.0
    for turn in range(0 if slow else 3):
        call(turn)
    taken: list[float] = []
    least, until = 2 if slow else 3, time.perf_counter() + seconds
    while len(taken) < repeats and (len(taken) < least or time.perf_counter() < until):
        taken.append(_once(call, len(taken)))
    return {"ms": float(np.median(taken)), "p95_ms": float(np.quantile(taken, 0.95)), "runs": len(taken)}


def _once(call: Callable[[int], Any], turn: int) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    call(turn)
    return (time.perf_counter() - started) * 1e3


def stopwatch(started: float) -> float:
    """Seconds since, to the millisecond."""
    return round(time.perf_counter() - started, 3)


def release(setting: Setting) -> None:
    """Free what was dropped, torch's reserve included."""
    gc.collect()
    torch = module("torch")
    if setting.on_gpu and torch is not None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def save(path: Path | None, report: dict[str, Any]) -> None:
    """Write the figures, if a file was named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8")
        note(f"written to {path}")


def _room(setting: Setting) -> int:
    if not setting.on_gpu:
        return 1 << 40
    return int(module("torch").cuda.mem_get_info(setting.index)[0])


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _command(given: list[str]) -> str:
    """The command line without the user's folders."""
    program, *options = given
    places = {at for at, option in enumerate(options) if option in ("--json", "--out", "--data")}
    kept = [option for at, option in enumerate(options) if not {at, at - 1} & places]
    return " ".join(["python", f"benchmarks/gpu/{Path(program).name}", *kept])


def _processor() -> str:
    lines: Iterator[str] = iter(())
    if Path("/proc/cpuinfo").exists():
        lines = iter(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None
