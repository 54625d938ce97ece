"""Remember damage until a check finds the store in order.

The caller that meets damage gets an error; health, perhaps in another process, must report it too. So the first error
is kept in a small file beside the store.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import apsw

from ..errors import CorruptStoreError, MemEvolveError
from ..types import MemoryUnit
from .connections import all_rows
from .file_lock import file_mode
from .sqlite_errors import SQLITE_ERRORS, translate_error

_LONGEST = 10_000


def damage_path(path: Path) -> Path:
    """The file that says that damage was met in the database file ``path``."""
    return path.with_name(path.name.removesuffix(".db") + ".damage")


def derived_paths(path: Path) -> tuple[Path, Path]:
    """The files that are made from the database file ``path``: the snapshot of the index, and the columns of fields."""
    stem = path.name.removesuffix(".db")
    return path.with_name(stem + ".snapshot"), path.with_name(stem + ".columns")


def noted(error: BaseException, path: Path, con: apsw.Connection | None = None) -> MemEvolveError:
    """As :func:`.sqlite_errors.translated`, for errors of an open store: damage is remembered, as far as the disk
    allows."""
    ours = error if isinstance(error, MemEvolveError) else translate_error(error, path, con)
    if isinstance(ours, CorruptStoreError):
        document = json.dumps({"at": time.time(), "error": str(ours)})
        with suppress(OSError):
            handle = os.open(damage_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file_mode(path))
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(document)
    return ours


def read_unit(raw: object, name: object) -> MemoryUnit:
    """The unit of a JSON text as the database holds it, bytes or text; ``name``: its id, or its slot as a number.

    Raises CorruptStoreError, which names it, when it is no JSON object.
    """
    try:
        unit = json.loads(raw.decode() if isinstance(raw, bytes) else raw)  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptStoreError(_message(name, str(error))) from error
    if not isinstance(unit, dict):
        raise CorruptStoreError(_message(name, "it is no JSON object"))
    return unit


def with_name_of_unit(error: BaseException, con: apsw.Connection) -> BaseException:
    """For SQLite's error that some JSON is malformed, the one that names the first such unit; else the error itself."""
    if not isinstance(error, apsw.SQLError) or "malformed JSON" not in str(error):
        return error
    with suppress(*SQLITE_ERRORS):
        for (unit_id,) in all_rows(con, "SELECT id FROM units WHERE NOT json_valid(unit) LIMIT 1"):
            return CorruptStoreError(_message(unit_id, str(error)))
    return error


def _message(name: object, why: str) -> str:
    what = f"in slot {name}" if isinstance(name, int) else repr(name)
    return f"the unit {what} is damaged ({why}); store it again or delete it, then run check()"


def damage_of(path: Path) -> str | None:
    """The first damage that was met and is not known to be repaired; None when there is none."""
    try:
        if not damage_path(path).is_file():  # opening a FIFO would wait for a writer
            return None
        with damage_path(path).open(encoding="utf-8", errors="replace") as file:
            text = file.read(_LONGEST)
    except OSError:
        return None
    try:
        return str(json.loads(text)["error"])
    except (ValueError, TypeError, KeyError):
        return f"{path}: damage was met"  # killed while it was written


def clear_damage(path: Path) -> None:
    """Everything was checked and is in order."""
    with suppress(OSError):
        damage_path(path).unlink(missing_ok=True)
