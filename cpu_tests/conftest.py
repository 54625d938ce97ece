"""What every test starts from: one thread, a clean environment, printed seeds."""

from __future__ import annotations

import gc
import os
import signal

# Before numpy and faiss are imported: they read it once, and a test machine's cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads a model
# A job started in the background inherits an ignored Ctrl-C, and tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
_KEPT = {"MEMEVOLVE_CHECKOUT", "MEMEVOLVE_COMMIT"}  # where the real MemEvolve is; no settings of ours
for _name in [name for name in os.environ if name.upper().startswith("MEMEVOLVE_") and name not in _KEPT]:
    del os.environ[_name]  # fixtures of any scope must not see the settings of whoever runs the tests

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from forks import Forks
from support import SEED, FakeBatchEmbedder, FakeEmbedder

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2_000, print_blob=True)
hypothesis.settings.load_profile("ci")


ONE_OF = 4
"""``--few`` runs every fourth test of each file."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", action="store_true", help=f"run one of {ONE_OF} tests of each file, and no slow one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slow tests first, so that no process is left alone with one of them at the end.

    Under ``--few`` keep the same share of each file in every run, and none that is marked slow.
    """
    if not config.getoption("--few"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        return
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            by_file.setdefault(item.path, []).append(item)
    kept = {id(item) for found in by_file.values() for item in found[::ONE_OF]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was collected: thousands of tests, which stay until the end."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a failed test at once: whoever ends the run before its summary still learns which it was."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longreprtext}", flush=True)


def pytest_report_header(config: pytest.Config) -> str:
    """Name what is needed to repeat this run."""
    profile = config.getoption("--hypothesis-profile", default=None) or "ci (derandomized)"
    return f"seed: {SEED}, hypothesis profile: {profile}, OMP_NUM_THREADS: {os.environ['OMP_NUM_THREADS']}"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, so that no ``.env`` of the person at the keyboard is read."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """The folder of real units and embeddings beside the checkout; see benchmarks/ for what it holds."""
    folder = repository.parent / "shared" / "data"
    if not (folder / "tldr_minilm_f16.npy").is_file():
        pytest.skip("no real embeddings in ../shared/data beside the checkout")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts at the printed seed in every test."""
    return np.random.default_rng(SEED)


@pytest.fixture
def fake_embedder() -> Callable[[int], FakeEmbedder]:
    """``fake_embedder(dim)`` makes a deterministic embedding function that counts its calls."""
    return FakeEmbedder


@pytest.fixture
def fake_batch_embedder() -> Callable[[int], FakeBatchEmbedder]:
    """``fake_batch_embedder(dim)`` is the same with ``embed_batch``."""
    return FakeBatchEmbedder


LOADING = """
import contextlib, faiss, io, tempfile
from memevolve_gpu import cli
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    for line in ("init -e hashing", "list", "search a"):
        with contextlib.suppress(SystemExit):
            cli.app([*line.split(), "--store", f"{folder}/memory"])
"""
"""Runs a few commands, which load what most of them need."""


@pytest.fixture(scope="session")
def commands() -> Iterator[Forks]:
    """Runs programs, ``COMMAND`` above all, in processes that have loaded the package."""
    forks = Forks(LOADING)
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def fresh() -> Iterator[Forks]:
    """Runs programs in processes that have loaded libraries that the package always needs, and nothing of ours."""
    forks = Forks("import apsw, numpy, pydantic_settings")
    yield forks
    forks.close()
