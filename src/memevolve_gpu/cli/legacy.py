"""The ``.data`` file of an old MemEvolve store, as a source of units."""

from __future__ import annotations

from pathlib import Path

from ..components.store.units import checked_unit
from ..errors import InvalidUnitError
from ..records.legacy import read_legacy
from .codes import InputError
from .reading import Exported

__all__ = ["looks_legacy", "read_old"]

_SUFFIX = ".data"
_PICKLE_STARTS = (b"\x80", b"(d", b"}")
"""Of a dict: protocols 2 to 5, 0, and 1."""


def looks_legacy(path: str) -> bool:
    """Is it an old store's file, by its name?

    Raises InputError for a pickle of another name.
    """
    if path.endswith(_SUFFIX):
        return True
    if path != "-" and _starts_like_pickle(Path(path)):
        raise InputError(f"{path}: looks like an old store's pickle; give it a name that ends in {_SUFFIX}")
    return False


def read_old(path: str) -> tuple[list[Exported], list[str]]:
    """The sound units of the file, and a sentence for each that was left out or changed.

    Raises InputError when there is no such file, LegacyImportError when it is garbage or hostile.
    """
    old = read_legacy(path.removesuffix(_SUFFIX))
    if old is None:
        raise InputError(f"{path}: cannot be read: No such file or directory")
    lines, problems = [], list(old.problems)
    for number, unit in enumerate(old.units, 1):
        try:
            lines.append(Exported(number, checked_unit(unit, f"old unit {unit.get('id')!r}"), None, None))
        except InvalidUnitError as error:
            problems.append(f"left out: {error}")
    return lines, problems


def _starts_like_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(2).startswith(_PICKLE_STARTS)
    except OSError:
        return False  # whoever reads it next says what is wrong
