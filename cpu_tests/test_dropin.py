"""The drop-in, from outside: every program runs in a process of its own, with the stand-in for MemEvolve or without."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from forks import Forks

STAND_IN = Path(__file__).parent / "helpers/memevolve_stub"
EMBED = """
import numpy as np
from memevolve_gpu import HashingEmbedder
embed = HashingEmbedder(32)
"""


def python(*arguments: str, stand_in: bool, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python in the current folder, which is the test's own and empty."""
    folders = [*([STAND_IN] if stand_in else []), *path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


class Here:
    """Runs programs with the stand-in on their path, or without it."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def run(self, code: str, *arguments: str, stand_in: bool, path: tuple[Path, ...] = ()) -> Any:
        folders = [*([STAND_IN] if stand_in else []), *path]
        return self._forks(textwrap.dedent(code), *arguments, path=folders)

    def output(self, code: str, *arguments: str, stand_in: bool, path: tuple[Path, ...] = ()) -> str:
        """What the code prints; it has to end well."""
        done = self.run(code, *arguments, stand_in=stand_in, path=path)
        assert done.returncode == 0, done.stderr
        return str(done.stdout).strip()

    def failure(self, code: str, *, stand_in: bool) -> str:
        """What the code leaves on standard error; it has to fail."""
        done = self.run(code, stand_in=stand_in)
        assert done.returncode == 1, done.stdout
        return str(done.stderr)


@pytest.fixture
def here(fresh: Forks) -> Here:
    return Here(fresh)


# --- with MemEvolve ---------------------------------------------------------------------------------------------


def test_the_stand_in_is_itself_without_the_drop_in(here: Here) -> None:
    code = """
    from memevolve.components.store import VectorStore, vector_store
    from memevolve.memory_system import MemorySystem
    print(vector_store.REPLACED, MemorySystem("x", None, 4).remember("lost"))
    """
    assert here.output(code, stand_in=True) == "False forgotten"


def test_memevolve_builds_our_store_and_keeps_the_rest_of_its_own(here: Here) -> None:
    code = (
        EMBED
        + """
import memevolve_gpu.dropin
from memevolve.components.store import StorageBackend, VectorStore
import memevolve.components.store.vector_store as theirs
import memevolve.api, memevolve.memory_system, memevolve.components.store.base as base
import memevolve_gpu.components.store.vector_store as ours, memevolve_gpu.components.store.base as our_base

assert theirs is ours and VectorStore is theirs.VectorStore is ours.VectorStore
assert ours.__spec__.name == ours.__name__ == "memevolve_gpu.components.store.vector_store"
assert memevolve.components.store.vector_store is ours
assert memevolve.api.HERE == "stand-in"
assert base.StorageBackend is StorageBackend is not our_base.StorageBackend
assert issubclass(VectorStore, StorageBackend) and issubclass(VectorStore, our_base.StorageBackend)

system = memevolve.memory_system.MemorySystem("memory", embed, 32)
first = system.remember("close the file before you rename it")
assert isinstance(system.storage, StorageBackend) and system.storage.count() == 1
(distance, found), = system.storage.search("rename the file")
assert found == first and system.storage.retrieve(first)["content"].startswith("close")
system.storage.close()
print("kept")
"""
    )
    assert here.output(code, stand_in=True) == "kept"
    assert Path("memory.lock").exists() or any(Path().glob("memory*"))


def test_memevolve_s_automatic_management_lets_our_store_prune(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        EMBED
        + """
import memevolve_gpu.dropin as dropin
from memevolve.memory_system import MemorySystem
from memevolve_gpu import VectorStore
storage = MemorySystem("memory", embed, 32).storage
print(storage.config.auto_prune, storage.config.background)
storage.close()
dropin.uninstall()
with VectorStore("other", embed) as own:
    print(own.config.auto_prune)
"""
    )
    monkeypatch.setenv("MEMEVOLVE_STORAGE_ENABLE_AUTO_RETRAIN", "false")
    for value, policy in (("true", "lru"), ("false", "off")):
        monkeypatch.setenv("MEMEVOLVE_MANAGEMENT_ENABLE_AUTO_MANAGEMENT", value)
        assert here.output(code, stand_in=True).split() == [policy, "False", "off"]


def test_the_store_s_own_path_may_come_first(here: Here) -> None:
    code = """
    import memevolve_gpu.dropin
    from memevolve.components.store.vector_store import VectorStore
    from memevolve.components.store.base import StorageBackend
    print(issubclass(VectorStore, StorageBackend), VectorStore.__module__)
    """
    assert here.output(code, stand_in=True) == "True memevolve_gpu.components.store.vector_store"


def test_memevolve_may_be_put_on_the_path_after_the_drop_in(here: Here) -> None:
    code = """
    import sys, memevolve_gpu.dropin
    sys.path.insert(0, sys.argv[1])
    import memevolve.api
    from memevolve.components.store import VectorStore
    print(memevolve.api.HERE, VectorStore.__module__)
    """
    found = here.output(code, str(STAND_IN), stand_in=False)
    assert found == "stand-in memevolve_gpu.components.store.vector_store"


@pytest.mark.parametrize(
    "first", ["import memevolve.components.store.vector_store", "from memevolve.memory_system import MemorySystem"]
)
def test_too_late_is_refused_with_the_remedy(here: Here, first: str) -> None:
    message = here.failure(f"{first}\nimport memevolve_gpu.dropin", stand_in=True).splitlines()[-1]
    assert message.startswith("ImportError: memevolve.components.store.vector_store is imported already, from ")
    assert str(STAND_IN) in message
    assert "Import memevolve_gpu.dropin before anything of memevolve" in message
    assert "python -m memevolve_gpu.dropin" in message


def test_not_too_late_while_the_store_is_not_imported(here: Here) -> None:
    code = """
    import memevolve, memevolve.api
    import memevolve_gpu.dropin
    from memevolve.components.store import VectorStore
    print(VectorStore.__module__)
    """
    assert here.output(code, stand_in=True) == "memevolve_gpu.components.store.vector_store"


def test_installing_twice_is_installing_once_and_can_be_taken_back(here: Here) -> None:
    code = """
    import importlib, sys
    before = list(sys.meta_path)
    import memevolve_gpu.dropin as dropin
    once = list(sys.meta_path)
    dropin.install()
    importlib.reload(dropin)
    import memevolve.components.store.vector_store as ours
    dropin.install()
    assert sys.meta_path == once and len(once) == len(before) + 1
    dropin.uninstall()
    dropin.uninstall()
    assert sys.meta_path == before
    for name in [name for name in sys.modules if name.split(".")[0] == "memevolve"]:
        del sys.modules[name]
    import memevolve.components.store.vector_store as theirs
    import memevolve_gpu.components.store.vector_store as still_ours
    print(theirs.REPLACED, still_ours is ours)
    """
    assert here.output(code, stand_in=True) == "False True"


def test_a_memevolve_without_the_contract_is_served_too(here: Here, tmp_path: Path) -> None:
    package = tmp_path / "old" / "memevolve" / "components" / "store"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    code = """
    import memevolve_gpu.dropin
    import memevolve.components.store.vector_store as store
    print(store.VectorStore.__module__)
    """
    found = here.output(code, stand_in=False, path=(tmp_path / "old",))
    assert found == "memevolve_gpu.components.store.vector_store"


def test_memevolve_s_server_and_memory_system_get_the_store_s_report(here: Here) -> None:
    code = (
        EMBED
        + """
import inspect
import memevolve_gpu.dropin
from memevolve.api import server
from memevolve.memory_system import MemorySystem
system = MemorySystem("memory", embed, 32)
system.remember("close the file before you rename it")
assert system.get_storage_health()["current_count"] == 1
assert type(server.app.call).__module__ == "memevolve_gpu.health_hook"
assert server.app.call.get_memory_system is server.get_memory_system
assert "ASGI application" in inspect.getsource(server) and server.__spec__.loader.get_source(server.__name__)
system.storage.close()
print("reported")
"""
    )
    assert here.output(code, stand_in=True) == "reported"


# --- without MemEvolve ------------------------------------------------------------------------------------------


def test_our_modules_answer_to_memevolve_s_names_where_it_is_not_installed(here: Here) -> None:
    code = (
        EMBED
        + """
import importlib, importlib.util
import memevolve_gpu.dropin
import memevolve, memevolve_gpu
assert memevolve is memevolve_gpu
paths = ["components.store.vector_store", "components.store.base", "components.store", "utils.config",
         "components.manage.base", "components.manage.simple_strategy", "memory_system"]
for path in paths:
    if importlib.util.find_spec(f"memevolve_gpu.{path}") is None:
        continue
    theirs = importlib.import_module(f"memevolve.{path}")
    assert theirs is importlib.import_module(f"memevolve_gpu.{path}"), path
    assert theirs.__spec__.name == f"memevolve_gpu.{path}"
from memevolve.components.store.base import StorageBackend
from memevolve.components.store.vector_store import VectorStore
from memevolve.utils.config import StorageConfig
with VectorStore(index_file="memory", embedding_function=embed, embedding_dim=32, index_type="flat") as store:
    assert isinstance(store, StorageBackend)
    print(store.store({"id": "a", "content": "text"}))
"""
    )
    assert here.output(code, stand_in=False) == "a"


@pytest.mark.parametrize("name", ["memevolve.api", "memevolve.api.server", "memevolve.records", "memevolve.dropin"])
def test_what_only_memevolve_has_is_missing_by_name(here: Here, name: str) -> None:
    message = here.failure(f"import memevolve_gpu.dropin\nimport {name}", stand_in=False).splitlines()[-1]
    missing = name.removesuffix(".server")
    assert message.startswith(f"ModuleNotFoundError: No module named '{missing}': MemEvolve is not installed")
    assert "install MemEvolve" in message


def test_a_folder_that_has_the_name_is_no_installation(here: Here) -> None:
    Path("memevolve/logs").mkdir(parents=True)
    code = """
    import memevolve_gpu.dropin
    from memevolve.components.store.vector_store import VectorStore
    print(VectorStore.__module__)
    """
    assert here.output(code, stand_in=False) == "memevolve_gpu.components.store.vector_store"


def test_nothing_answers_once_it_is_taken_back(here: Here) -> None:
    code = """
    import memevolve_gpu.dropin as dropin
    import memevolve.components.store.vector_store
    dropin.uninstall()
    import memevolve_gpu.components.store.vector_store
    try:
        import memevolve
    except ModuleNotFoundError as error:
        print(error.name)
    """
    assert here.output(code, stand_in=False) == "memevolve"


# --- running a program ------------------------------------------------------------------------------------------

PROGRAM = """
import sys, helper
import memevolve_gpu.dropin
from memevolve.components.store.vector_store import VectorStore
if __name__ == "__main__":
    print(VectorStore.__module__, sys.argv, helper.NAME, sys.path[0], __file__)
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A script that needs a module beside it and ends with the code that it is given."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "helper.py").write_text("NAME = 'beside the script'\n")
    (folder / "program.py").write_text(PROGRAM)
    return folder / "program.py"


def test_a_script_runs_as_python_would_run_it(program: Path) -> None:
    done = python("-m", "memevolve_gpu.dropin", str(program), "3", "-m", "--help", stand_in=True)
    assert done.returncode == 3, done.stderr
    expected = ["memevolve_gpu.components.store.vector_store", str([str(program), "3", "-m", "--help"])]
    assert done.stdout.strip() == " ".join([*expected, "beside the script", str(program.parent), str(program)])
    assert done.stderr == ""


def test_a_module_runs_as_python_would_run_it(program: Path) -> None:
    done = python("-m", "memevolve_gpu.dropin", "-m", "program", "0", "x", stand_in=True, path=(program.parent,))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"memevolve_gpu.components.store.vector_store {[str(program), '0', 'x']}")


def test_a_program_s_own_error_passes_through(program: Path) -> None:
    program.write_text("def fails():\n    raise LookupError('mine')\nfails()\n")
    done = python("-m", "memevolve_gpu.dropin", str(program), stand_in=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("LookupError: mine")
    assert f'File "{program}", line 2, in fails' in done.stderr


def test_a_folder_with_a_main_runs(program: Path) -> None:
    (program.parent / "__main__.py").write_text(PROGRAM)
    done = python("-m", "memevolve_gpu.dropin", str(program.parent), "0", stand_in=False)
    assert done.returncode == 0, done.stderr
    assert str([str(program.parent), "0"]) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "usage: "),
        (["--help"], 0, "usage: "),
        (["-x"], 2, "usage: "),
        (["-m"], 2, "usage: "),
        (["no_such.py"], 2, "SCRIPT no_such.py does not exist"),
        (["-m", "no_such_module"], 1, "No module named no_such_module"),
    ],
)
def test_what_cannot_be_run_is_said(arguments: list[str], code: int, says: str) -> None:
    done = python("-m", "memevolve_gpu.dropin", *arguments, stand_in=False)
    assert done.returncode == code
    assert says in (done.stdout if code == 0 else done.stderr)
