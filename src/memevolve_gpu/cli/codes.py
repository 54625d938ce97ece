"""Exit codes: one table for the program, its help and the documents."""

from __future__ import annotations

import errno
from enum import IntEnum

from ..errors import (
    CapacityError,
    DimensionMismatchError,
    EmbeddingError,
    EngineError,
    MemEvolveError,
    ModelMismatchError,
    StorageError,
    StorageFullError,
)

__all__ = ["MEANING", "ExitCode", "InputError", "Interrupted", "NotFoundError", "StoreExistsError", "exit_code_of"]


class ExitCode(IntEnum):
    """What the process returns to its caller."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CAPACITY = 4
    STORAGE = 5
    ENGINE = 6
    INTERRUPTED = 130
    BROKEN_PIPE = 141


MEANING: dict[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "the operation failed, or check found problems that are not repaired",
    ExitCode.USAGE: "wrong usage or bad input: a flag, a filter, a setting, a file or one of its lines",
    ExitCode.NOT_FOUND: "there is no store at the prefix, or no unit with one of the ids",
    ExitCode.CAPACITY: "a limit is reached (units, memory, disk space); nothing was written",
    ExitCode.STORAGE: "the store's file is damaged, read-only, of a newer version or not a store",
    ExitCode.ENGINE: "the embedder or the search engine is missing, failed, or does not fit the store",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C; the message says what is in the store",
    ExitCode.BROKEN_PIPE: "whoever read the output stopped reading",
}
"""Every code with its meaning, in order."""


class InputError(MemEvolveError, ValueError):
    """A file, a line or an argument given on the command line cannot be used."""


class NotFoundError(MemEvolveError, LookupError):
    """There is no store, or no unit, of that name."""


class StoreExistsError(MemEvolveError):
    """A new store was asked for where there is one."""


class Interrupted(MemEvolveError):  # noqa: N818 - its name is what --json shows as type
    """Ctrl-C; the message says what is in the store."""


_BY_ERROR: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (NotFoundError, ExitCode.NOT_FOUND),
    (CapacityError, ExitCode.CAPACITY),
    (StorageFullError, ExitCode.CAPACITY),
    (StorageError, ExitCode.STORAGE),
    (EmbeddingError, ExitCode.ENGINE),
    (EngineError, ExitCode.ENGINE),
    (ModelMismatchError, ExitCode.ENGINE),
    (DimensionMismatchError, ExitCode.ENGINE),
    (Interrupted, ExitCode.INTERRUPTED),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
    (BrokenPipeError, ExitCode.BROKEN_PIPE),
)
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def exit_code_of(error: BaseException) -> ExitCode:
    """The code for an error that ended a command; the first class in the table that fits decides."""
    for kind, code in _BY_ERROR:
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError):
        return ExitCode.CAPACITY if error.errno in _NO_SPACE else ExitCode.FAILED
    return ExitCode.USAGE if isinstance(error, MemEvolveError) and isinstance(error, ValueError) else ExitCode.FAILED
