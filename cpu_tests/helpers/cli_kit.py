"""Command lines in processes of their own that start fast: one program loads the package and forks for each line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["SOURCE", "Line", "run_lines"]

SOURCE = Path(__file__).resolve().parents[2] / "src"

PROGRAM = """
import json, os, sys
from memevolve_gpu import HashingEmbedder, VectorStore, cli
for number, (arguments, folder, environment, unread) in enumerate(json.load(sys.stdin)):
    names = [f"{sys.argv[1]}/{number}.{stream}" for stream in ("out", "err")]
    out, err = (os.open(name, os.O_WRONLY | os.O_CREAT) for name in names)
    if unread:
        read, out = os.pipe()
        os.close(read)
    child = os.fork()
    if not child:
        os.dup2(out, 1), os.dup2(err, 2), os.close(out), os.close(err)
        os.chdir(folder)
        os.environ.update(environment)
        sys.argv = ["memevolve-store", *arguments]
        sys.exit(cli.main())  # and the interpreter ends as it does in any other process
    os.close(out), os.close(err)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), *(open(name).read() for name in names)]), flush=True)
"""


class Line(NamedTuple):
    """What is run: arguments, in which folder, with which variables; ``unread``: nobody reads what it prints."""

    arguments: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = {}
    unread: bool = False


def run_lines(lines: Sequence[Line], scratch: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run the lines one after the other; ``scratch`` is an empty folder for what they print."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(scratch)],
        input=json.dumps([[*line[:1], str(line.folder), *line[2:]] for line in lines]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(one) for one in done.stdout.splitlines()]
    return [subprocess.CompletedProcess(line.arguments, *one) for line, one in zip(lines, told, strict=True)]
