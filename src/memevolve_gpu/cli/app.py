"""The program: what every command shares, and what becomes of an error."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ..errors import MemEvolveError
from .codes import MEANING, ExitCode, exit_code_of
from .output import Output

__all__ = ["PROGRAM", "app", "main"]

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
