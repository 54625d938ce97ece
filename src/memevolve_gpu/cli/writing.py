"""Output files: either the whole file appears under its name, or nothing does."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ..types import FloatArray, MemoryUnit
from .codes import InputError

__all__ = ["export_line", "write_lines"]


def export_line(unit: MemoryUnit, vector: FloatArray | None = None, model: str | None = None) -> str:
    """One line of an export: the unit itself, or with a vector (dim,) an object of unit, vector and model.

    The vector is the base64 of its float32 values, little-endian: exact, and a third of the length of decimals.
    """
    if vector is None:
        return json.dumps(unit, ensure_ascii=False)
    packed = base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")
    return json.dumps({"unit": unit, "vector": packed, "model": model}, ensure_ascii=False)


def write_lines(path: str, lines: Iterable[str], told: Callable[[int], None]) -> int:
    """Write the lines as UTF-8 to ``path``, ``-`` for stdout; their number. ``told`` hears it as it grows.

    A file appears complete and synced, or not at all; one that is there is replaced only then. Raises InputError when
    ``path`` is something other than a file, OSError when the operating system refuses.
    """
    if path == "-":
        return _write_to(sys.stdout.buffer.write, lines, told)
    target = Path(path).resolve()
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise InputError(f"{path}: is no regular file; give the name of a file, or - for stdout")
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as stream:
            count = _write_to(stream.write, lines, told)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return count


def _write_to(write: Callable[[bytes], object], lines: Iterable[str], told: Callable[[int], None]) -> int:
    count = 0
    for line in lines:
        write(line.encode() + b"\n")
        count += 1
        told(count)
    return count


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
