"""Test doubles that several test files share: embedding functions, and a forked child."""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import inspect
import os
import re
import signal
import stat
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "HANGS",
    "SEED",
    "STAND_IN",
    "FakeBatchEmbedder",
    "FakeEmbedder",
    "as_child",
    "each",
    "ended",
    "fork",
    "inside_in_another_thread",
    "nameless",
]

SEED = 20_260_101
"""Seed of every random choice of the tests that hypothesis does not make; printed in the header of a run."""

STAND_IN = """
from memevolve_gpu import HashingEmbedder

class SentenceTransformer:
    def __init__(self, source, device, local_files_only): pass
    def encode(self, texts, **options): return HashingEmbedder(384).embed_batch(texts)
"""
"""A model of words for where sentence-transformers is not installed; where it is, the real model runs."""

Vector = npt.NDArray[np.float32]


class FakeEmbedder:
    """Maps a text to a unit vector by its words, the same in every process; texts that share words are near.

    ``calls`` counts texts embedded one by one, ``batches`` calls of ``embed_batch``; ``texts`` keeps what was embedded,
    in order. ``failing``, once set, is raised by the next call and then cleared.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.calls = 0
        self.batches = 0
        self.texts: list[str] = []
        self.failing: Exception | None = None

    def __call__(self, text: str) -> Vector:
        """Return float32 (dim,), of unit length."""
        self._fail_once()
        self.calls += 1
        self.texts.append(text)
        return self.vector(text)

    def vector(self, text: str) -> Vector:
        """What the text's vector is, without counting it."""
        make = _text_vector if len(text) < 500 else _text_vector.__wrapped__  # long texts are not kept
        return np.array(make(text, self.dim), dtype=np.float32)

    def _fail_once(self) -> None:
        if self.failing is not None:
            error, self.failing = self.failing, None
            raise error


@functools.lru_cache(maxsize=20_000)
def _text_vector(text: str, dim: int) -> Vector:
    words = re.findall(r"\w+", text.lower()) or [""]
    total = np.sum([_word_vector(word, dim) for word in words], axis=0)
    return np.asarray(total / np.linalg.norm(total), dtype=np.float32)


@functools.lru_cache(maxsize=20_000)
def _word_vector(word: str, dim: int) -> npt.NDArray[np.float64]:
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(dim)


class FakeBatchEmbedder(FakeEmbedder):
    """The same with ``embed_batch``."""

    def embed_batch(self, texts: Sequence[str]) -> Vector:
        """Return float32 (n, dim)."""
        self._fail_once()
        self.batches += 1
        self.texts.extend(texts)
        return np.stack([self.vector(text) for text in texts])


def each(names: str | Sequence[str], values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``pytest.mark.parametrize`` as a loop in one test, for many small cases; a failure prints which case it was.

    The cases share the test's fixtures.
    """
    keys = [names] if isinstance(names, str) else list(names)
    cases = [dict(zip(keys, (value,) if isinstance(names, str) else value, strict=True)) for value in values]

    def loop(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*instance: Any, **fixtures: Any) -> None:
            assert cases
            for case in cases:
                try:
                    test(*instance, **fixtures, **case)
                except BaseException:
                    print("the case that failed:", *(f"{name}={value!r}" for name, value in case.items()))
                    raise

        signature = inspect.signature(test)
        left = [one for one in signature.parameters.values() if one.name not in keys]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return loop


HANGS = 100
"""Seconds after which a forked child shows its stacks and is ended by its alarm."""


def fork(act: Callable[[], object]) -> int:
    """Run ``act`` in a forked child; returns its number, for ``ended``. Whatever happens, nothing else runs in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking while threads run
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if sys.platform != "win32":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.register(signal.SIGALRM, file=2, chain=True)
            signal.alarm(HANGS)
        act()
        status = 0
    except BaseException:  # noqa: BLE001 - shown, and told by the status
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """The exit status of a child: 0 when its act returned, 1 when it raised, less than 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def as_child(act: Callable[[], object]) -> int:
    """Run ``act`` in a forked child until it ends; returns its exit status, as ``ended`` does."""
    return ended(fork(act))


@contextmanager
def inside_in_another_thread(entered: AbstractContextManager[object]) -> Iterator[None]:
    """Another thread is inside ``entered``, which may be a lock, for the time of the block."""
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with entered:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def nameless(folder: Path) -> list[os.stat_result]:
    """The open files of this process that lie on the folder's disk and have no name."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            facts = entry.stat()
        except OSError:
            continue
        if stat.S_ISREG(facts.st_mode) and not facts.st_nlink and facts.st_dev == folder.stat().st_dev:
            found[facts.st_ino] = facts
    return list(found.values())
