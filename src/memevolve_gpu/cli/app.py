"""The Typer application: options of every command, error handling and exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

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
from .output import Output

__all__ = [
    "MEANING",
    "PROGRAM",
    "ExitCode",
    "InputError",
    "Interrupted",
    "NotFoundError",
    "StoreExistsError",
    "app",
    "exit_code_of",
    "main",
]


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


PROGRAM = "memevolve-store"
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""The class of every error about flags and arguments; where typer keeps it differs between its versions."""


class _Ended(Exception):  # noqa: N818 - it carries an error past typer, which has codes of its own for some
    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Program(TyperGroup):
    """Ends every command with an exit code of the table and, when it failed, one line that says why."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_more: Any, **extra: Any) -> Any:
        """Run one command line and exit the process with its code."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False

        def run() -> int:
            code = super(_Program, self).main(arguments, prog_name or PROGRAM, **extra)
            sys.stdout.flush()
            return int(code or 0)

        sys.exit(_guarded(run, Output(as_json="--json" in arguments)))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the line names."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, OSError) as error:
            raise _Ended(error) from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, the table of exit codes below it."""
        super().format_help(ctx, formatter)
        codes = Table(title="Exit codes", title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 1))
        for code, meaning in MEANING.items():
            codes.add_row(f"{code:d}", meaning)
        Console().print(codes)


def _guarded(run: Callable[[], int], output: Output) -> int:
    """The exit code of a run, whatever became of it; only errors in this program itself get through."""
    try:
        return run()
    except _USAGE_ERROR as error:
        output.fail(_usage(error), "UsageError")
        return ExitCode.USAGE
    except _Ended as ended:
        return _failed(ended.error, output)
    except (MemEvolveError, OSError, KeyboardInterrupt) as error:
        return _failed(error, output)


def _failed(error: BaseException, output: Output) -> int:
    code = exit_code_of(error)
    if isinstance(error, OSError) and error.filename is None:
        _forget_stdout()
        output = Output(as_json=False)
    if code != ExitCode.BROKEN_PIPE:
        output.fail(_sentence(error), type(error).__name__)
    return code


def _forget_stdout() -> None:
    """Writing to stdout failed; without this Python would try, fail and complain again at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'stdout'}: {error.strerror}"
    return str(error)


def _usage(error: Any) -> str:
    inner = error.ctx is not None and error.ctx.parent is not None
    return f"{error.format_message()} (see {PROGRAM}{' ' + error.ctx.info_name if inner else ''} --help)"


def _version(wanted: bool) -> None:
    if wanted:
        with contextlib.suppress(metadata.PackageNotFoundError):
            sys.stdout.write(f"memevolve-gpu {metadata.version('memevolve-gpu')}\n")
        raise typer.Exit


app = typer.Typer(
    name=PROGRAM,
    cls=_Program,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A store for the memory of LLM agents: keep units, find them by meaning, look after the files."""


def main() -> None:
    """Entry point of ``memevolve-store`` and ``python -m memevolve_gpu.cli``; exits with a code of the table."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # rather a strange letter than no answer
    app()
