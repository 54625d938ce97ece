"""The parent's side of a worker: starts it, sends commands, and stops it while others are measured."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .data import Work
from .protocol import BEFORE

__all__ = ["PeerFailedError", "Remote", "cores"]

THREADS = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "LANCE_CPU_THREADS"), "1"
)
LONG = ("begin", "open", "ingest", "settle", "baseline", "close")
"""What may take long at many units; everything else is a few hundred calls, and gets a third of the time."""
QUIET = {"LANCE_LOG": "error", "RUST_LOG": "error", "GRPC_VERBOSITY": "ERROR", "ANONYMIZED_TELEMETRY": "False"}


class PeerFailedError(Exception):
    """The peer raised, ended or took too long; the message says which."""


def cores() -> tuple[int, set[int]]:
    """The core of the workers, and those left for the one who asks them (the same one when there is no other)."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1], set(allowed[:-1]) or set(allowed)


def source_of(name: str) -> Path:
    """The source that a worker imports: that of this checkout, or of the older state that lies in build/before."""
    root = Path(__file__).resolve().parents[2]
    return root / ("build/before/src" if name == BEFORE else "src")


class Remote:
    """A worker in a session of its own; limit: seconds that a build may take; other answers a third of that.

    It runs only between a question and its answer: else it is stopped.
    """

    def __init__(self, name: str, work: Work, folder: Path, core: int, limit: float) -> None:
        self.name, self.folder, self.limit = name, folder, limit
        home = Path(__file__).resolve().parents[1]
        ours = {key: value for key, value in os.environ.items() if not key.upper().startswith("MEMEVOLVE_")}
        self.log = (folder.parent / f"{folder.name}.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.worker", str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=folder.parent,
            env={**ours, **THREADS, **QUIET, "PYTHONPATH": os.pathsep.join([str(home), str(source_of(name))])},
            start_new_session=True,
        )
        self.buffer = b""
        self.ask("begin", name=name, data=str(work.folder), size=work.size, folder=str(folder))

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer. Raises PeerFailedError; the worker is ended then."""
        self._signal(signal.SIGCONT)
        try:
            self._send({"do": do, **arguments})
            answer: dict[str, Any] = json.loads(self._line(do, self.limit if do in LONG else self.limit / 3))
        except (OSError, ValueError) as error:
            self.end()
            raise PeerFailedError(f"{do}: the process ended ({error})") from error
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            self.end()
            raise PeerFailedError(f"{do}: {answer['error']}")
        return answer

    def end(self) -> None:
        """Kill the worker and whatever it started."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a command that a dead worker did not read is still in the buffer
                    pipe.close()

    def _send(self, command: dict[str, Any]) -> None:
        pipe = self.process.stdin
        if pipe is None:
            raise OSError("no pipe")
        pipe.write(json.dumps(command).encode() + b"\n")
        pipe.flush()

    def _line(self, do: str, limit: float) -> bytes:
        pipe = self.process.stdout
        if pipe is None:
            raise OSError("no pipe")
        while b"\n" not in self.buffer:
            if not select.select([pipe], [], [], limit)[0]:
                self.end()
                raise PeerFailedError(f"{do}: no answer within {limit:.0f} s")
            read = os.read(pipe.fileno(), 1 << 20)
            if not read:
                raise OSError("no answer; see its log")
            self.buffer += read
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
