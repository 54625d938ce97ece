"""Programs in processes of their own that start fast: an interpreter that has loaded modules forks for each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["COMMAND", "SOURCE", "Forks"]

SOURCE = Path(__file__).resolve().parents[2] / "src"
COMMAND = "import sys; from memevolve_gpu import cli; sys.exit(cli.main())"
"""The program ``memevolve-store``."""

SERVER = """
import gc, json, os, signal, sys, tempfile
exec(sys.argv[1])
gc.collect(), gc.freeze()  # what is loaded need not be looked at again when a fork ends
for line in sys.stdin:
    code, arguments, environment, path, folder, unread = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            signal.alarm(120)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            if unread:
                ends = os.pipe()
                os.dup2(ends[1], 1)
                os.closerange(ends[0], ends[1] + 1)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv[:], sys.path[1:1] = ["-c", *arguments], path
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            sys.exit()  # and the interpreter ends as it does in any other process
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = [file.seek(0) or file.read().decode() for file in (out, err)]
    print(json.dumps([status, *said]), flush=True)
"""


class Forks:
    """Runs programs as ``python -c`` would, in forks of an interpreter that has run ``preload``."""

    def __init__(self, preload: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, preload],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self,
        code: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        path: Sequence[Path] = (),
        folder: Path | None = None,
        unread: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """What became of it, with more environment and folders on its path; ``unread``: nobody reads its output."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        given = {**os.environ, **(environment or {})}
        job = [code, arguments, given, [*map(str, path)], str(folder or Path.cwd()), unread]
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return subprocess.CompletedProcess([code, *arguments], *json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.terminate()
        self._server.communicate()
