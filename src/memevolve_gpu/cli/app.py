"""The Typer application: error handling and exit codes of every command."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import (
    CapacityError,
    DimensionMismatchError,
    EmbeddingError,
    EngineError,
    MemEvolveError,
    ModelMismatchError,
    StorageError,
    StorageFullError,
    TooManyFilesError,
)
from .output import Output


class ExitCode(IntEnum):
    """The exit code of the process."""

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
    ExitCode.FAILED: "the operation failed, or check, health or doctor found a problem that remains",
    ExitCode.USAGE: "wrong usage or bad input: an option, a filter, a setting, a file or a line of it",
    ExitCode.NOT_FOUND: "there is no store at the prefix, or no unit with one of the ids",
    ExitCode.CAPACITY: "a limit is reached (units, memory, disk space, open files); nothing was written",
    ExitCode.STORAGE: "the store's file is damaged, read-only, of a newer version or not a store",
    ExitCode.ENGINE: "the embedder, the search engine or pymilvus is missing, failed, or does not fit the store",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C; the message says what was stored",
    ExitCode.BROKEN_PIPE: "the reader of the output closed the pipe",
}
"""The meaning of every code, in order."""


class InputError(MemEvolveError, ValueError):
    """A file, a line or an argument given on the command line cannot be used."""


class NotFoundError(MemEvolveError, LookupError):
    """There is no store, or no unit, of that name."""


class StoreExistsError(MemEvolveError):
    """A new store was requested where one exists."""


class Interrupted(MemEvolveError):  # noqa: N818 - its name is what --json shows as type
    """Ctrl-C; the message says what was stored."""


_BY_ERROR: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (NotFoundError, ExitCode.NOT_FOUND),
    (CapacityError, ExitCode.CAPACITY),
    (StorageFullError, ExitCode.CAPACITY),
    (TooManyFilesError, ExitCode.CAPACITY),
    (StorageError, ExitCode.STORAGE),
    (EmbeddingError, ExitCode.ENGINE),
    (EngineError, ExitCode.ENGINE),
    (ModelMismatchError, ExitCode.ENGINE),
    (DimensionMismatchError, ExitCode.ENGINE),
    (Interrupted, ExitCode.INTERRUPTED),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
    (BrokenPipeError, ExitCode.BROKEN_PIPE),
)
_NO_FILES = frozenset({errno.EMFILE, errno.ENFILE})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the code for an error that ended a command: that of the first matching class in the table."""
    for kind, code in _BY_ERROR:
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError):
        return ExitCode.CAPACITY if error.errno in _NO_SPACE | _NO_FILES else ExitCode.FAILED
    if isinstance(error.__cause__, ImportError):
        return ExitCode.ENGINE
    return ExitCode.USAGE if isinstance(error, MemEvolveError) and isinstance(error, ValueError) else ExitCode.FAILED


PROGRAM = "memevolve-store"
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""The class of every error about options and arguments; its module differs between versions of typer."""


class _Ended(Exception):  # noqa: N818 - it carries an error past typer, which has its own exit codes for some
    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Tidy:
    """Help in which flags have no type."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_Tidy, TyperCommand):
    """A command."""


class Group(_Tidy, TyperGroup):
    """A group of commands."""


class _Program(Group):
    """Ends every command with an exit code of the table and, if it failed, one line that says why."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_more: Any, **extra: Any) -> Any:
        """Run one command line and exit the process with its code. Without a command the help is shown."""
        arguments = _namespace_first(list(sys.argv[1:] if args is None else args))
        no_command = arguments in ([], ["manage"], ["keys"])
        extra["standalone_mode"] = False

        def run() -> int:
            line = [*arguments, "--help"] if no_command else arguments
            code = super(_Program, self).main(line, prog_name or PROGRAM, **extra)
            sys.stdout.flush()
            return ExitCode.USAGE if no_command else int(code or 0)

        sys.exit(_guarded(run, Output(as_json="--json" in arguments)))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the line names."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, OSError) as error:
            raise _Ended(error) from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help and, below it, the table of exit codes."""
        from rich.console import Console
        from rich.table import Table

        super().format_help(ctx, formatter)
        console = Console(file=sys.stdout)
        codes = Table(title="Exit codes", title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 1))
        for code, meaning in MEANING.items():
            codes.add_row(f"{code:d}", meaning)
        console.print(codes, width=min(console.width, 80))  # as wide as the help above it where that is piped


def _guarded(run: Callable[[], int], output: Output) -> int:
    """Return the exit code of a run; only errors of this program itself pass through."""
    try:
        return run()
    except _USAGE_ERROR as error:
        inner = error.ctx is not None and error.ctx.parent is not None
        see = f"{PROGRAM}{' ' + error.ctx.info_name if inner else ''} --help"
        return _said(f"{error.format_message().removesuffix('.')} (see {see})", "UsageError", ExitCode.USAGE, output)
    except _Ended as ended:
        return _failed(ended.error, output)
    except (MemEvolveError, OSError, KeyboardInterrupt) as error:
        return _failed(error, output)
    except SystemExit as ending:  # rich, which prints the help, exits with 1 when its reader leaves
        if not isinstance(ending.__context__, BrokenPipeError):
            raise
        return _failed(ending.__context__, output)


def _failed(error: BaseException, output: Output) -> int:
    code = exit_code_of(error)
    if isinstance(error, OSError) and error.filename is None:  # stdout: Python must not write to it again at its exit
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        output = Output(as_json=False)
    return code if code == ExitCode.BROKEN_PIPE else _said(_sentence(error), type(error).__name__, code, output)


def _said(error: str, kind: str, code: int, output: Output) -> int:
    """Print why the command failed, and return the code; that of another error where stdout does not take it."""
    try:
        output.fail(error, kind)
    except OSError as other:
        if not output.as_json:
            raise
        return _failed(other, output)
    return code


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.errno in _NO_FILES:
        return "no more files can be opened: close other programs, or raise the limit with ulimit -n"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'stdout'}: {error.strerror}"
    return str(error)


chosen: dict[str, str] = {}
"""Settings of the store that the options before the command name."""


def _namespace_first(arguments: list[str]) -> list[str]:
    """The arguments with ``--namespace PATH`` first, wherever it stands: it is an option of the program."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for at, argument in enumerate(arguments[:end]):
        if argument == "--namespace":
            return [*arguments[at : at + 2], *arguments[:at], *arguments[at + 2 :]]
        if argument.startswith("--namespace="):
            return [argument, *arguments[:at], *arguments[at + 1 :]]
    return arguments


def _choose(namespace: str | None) -> None:
    chosen.clear()
    if namespace is not None:
        chosen["namespace"] = namespace


def _version(requested: bool) -> None:
    if requested:
        from importlib import metadata

        with contextlib.suppress(metadata.PackageNotFoundError):
            sys.stdout.write(f"memevolve-gpu {metadata.version('memevolve-gpu')}\n")
        raise typer.Exit


app = typer.Typer(
    name=PROGRAM,
    cls=_Program,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def add_command(name: str, function: Callable[..., None], to: typer.Typer | None = None) -> None:
    """Register a command; its help is the docstring, each paragraph on one line so that the terminal wraps it."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    (to or app).command(name, cls=Command, help=text)(function)


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    namespace: Annotated[
        str | None,
        typer.Option(
            "--namespace",
            metavar="PATH",
            callback=_choose,
            show_default=False,
            help="Namespace to work in, such as org/alice; also after the command.  "
            "\\[default: MEMEVOLVE_STORAGE_NAMESPACE]",
        ),
    ] = None,
) -> None:
    """Store the memory of LLM agents: add units, search them by meaning, maintain the store."""


def main() -> None:
    """Run ``memevolve-store``, ``python -m memevolve_gpu`` or ``python -m memevolve_gpu.cli``."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an escaped character is better than an error
    try:
        app()
    except KeyboardInterrupt as error:  # before or after the command itself
        sys.exit(_failed(error, Output(as_json="--json" in sys.argv)))
