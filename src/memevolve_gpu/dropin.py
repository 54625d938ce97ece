"""Replaces MemEvolve's vector store with this package's, without changes to MemEvolve.

Import this module before any module of MemEvolve, or run a program through it::

    import memevolve_gpu.dropin                                # first line of the program
    python -m memevolve_gpu.dropin script.py arguments...
    python -m memevolve_gpu.dropin -m package.module arguments...

Importing ``memevolve.components.store.vector_store`` then gives ``memevolve_gpu.components.store.vector_store``: the
same module, the same class. If MemEvolve is installed, this ``VectorStore`` passes its checks for its own
``StorageBackend``, and its memory system, health endpoint and dashboard show the store's report (``health_hook``);
nothing else changes. If it is not installed, ``memevolve`` and the inner paths that both packages have
(``components``, ``utils``, ``memory_system``) are those of this package.

New processes (``subprocess``, ``multiprocessing`` with spawn, server workers) start without the replacement, unless the
program itself imports this module first.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from .health_hook import add_to_app, add_to_memory_system

_OURS = "memevolve_gpu"
_THEIRS = "memevolve"
_STORE = ".components.store.vector_store"
_BACKEND = ".components.store.base"
_SHARED_ROOTS = frozenset({"components", "utils", "memory_system"})

_USAGE = """\
usage: python -m memevolve_gpu.dropin SCRIPT [ARGUMENTS...]
       python -m memevolve_gpu.dropin -m MODULE [ARGUMENTS...]

Runs a program with memevolve_gpu's vector store instead of MemEvolve's.
"""


def install() -> None:
    """Make ``memevolve.components.store.vector_store`` resolve to this package's module.

    Importing ``memevolve_gpu.dropin`` calls this. A second call changes nothing.

    Raises:
        ImportError: MemEvolve's own store is imported already; objects of two different classes would be mixed.

    Examples:
        >>> from memevolve_gpu import VectorStore, dropin
        >>> dropin.install()
        >>> import memevolve.components.store.vector_store as memevolve_store
        >>> memevolve_store.VectorStore is VectorStore
        True
        >>> dropin.uninstall()
    """
    loaded = sys.modules.get(_THEIRS + _STORE)
    if loaded is not None and loaded is not sys.modules.get(_OURS + _STORE):
        raise ImportError(
            f"{_THEIRS + _STORE} is imported already, from {getattr(loaded, '__file__', None)}; that is too late to "
            f"replace it. Import {_OURS}.dropin before anything of {_THEIRS}, or run: "
            f"python -m {_OURS}.dropin your_script.py",
            name=_THEIRS + _STORE,
        )
    if not any(map(_is_ours, sys.meta_path)):
        sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Undo :func:`install`. Names that MemEvolve has imported from this package's store stay imported.

    Examples:
        >>> import sys
        >>> from memevolve_gpu import dropin
        >>> dropin.uninstall()
        >>> "memevolve.components.store.vector_store" in sys.modules
        False
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]
    _serve(False)
    for name, module in list(sys.modules.items()):
        if _below(name, _THEIRS) and _below(getattr(module, "__name__", ""), _OURS):
            del sys.modules[name]
            _forget_in_parent(name, module)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``SCRIPT arguments...`` or ``-m MODULE arguments...`` as Python would, with the replacement installed.

    Args:
        arguments: The command line; None for that of the process.

    Returns:
        0 after the program has ended, 2 when it is not named or not found. What the program raises passes through.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_module = given[:1] == ["-m"]
    program = given[as_module:]
    if not program or program[0].startswith("-"):
        wants_help = program[:1] in (["-h"], ["--help"]) and not as_module
        (sys.stdout if wants_help else sys.stderr).write(_USAGE)
        return 0 if wants_help else 2
    install()
    sys.argv[:] = program
    if not as_module:
        return _run_script(Path(program[0]))
    runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    return 0


def _run_script(script: Path) -> int:
    if not script.exists():
        sys.stderr.write(f"{_OURS}.dropin: SCRIPT {script} does not exist; name a Python file\n")
        return 2
    if not getattr(sys.flags, "safe_path", False):
        folder = script.resolve()
        sys.path[0] = str(folder if folder.is_dir() else folder.parent)  # python -m puts the current folder there
    runpy.run_path(str(script), run_name="__main__")
    return 0


class _Finder(MetaPathFinder):
    """Finds the modules of MemEvolve that are this package's, and those that get the store's report."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname == _THEIRS:
            return None if _memevolve_is_installed() else _alias(fullname)
        if not _below(fullname, _THEIRS):
            return None
        if fullname == _THEIRS + _STORE or sys.modules.get(_THEIRS) is sys.modules.get(_OURS):
            return _alias(fullname)
        add_report = _REPORTING.get(fullname.removeprefix(_THEIRS))
        return None if add_report is None else _hooked(fullname, path, target, add_report)


class _HookedLoader(Loader):
    """Loads a module of MemEvolve as its own loader does, then calls ``hook`` with it."""

    def __init__(self, loader: Any, hook: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.hook = hook

    def __getattr__(self, name: str) -> Any:
        """Forward the loader's other methods: ``get_source`` for tracebacks, ``get_code`` for ``python -m``."""
        if name == "loader":
            raise AttributeError(name)  # it is missing while a copy is made
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let MemEvolve's loader create the module."""
        found: ModuleType | None = self.loader.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then the hook."""
        self.loader.exec_module(module)
        self.hook(module)


def _hooked(
    fullname: str, path: Sequence[str] | None, target: ModuleType | None, hook: Callable[[ModuleType], None]
) -> ModuleSpec | None:
    spec = next(_other_specs(fullname, path, target), None)
    if spec is not None and spec.loader is not None:
        spec.loader = _HookedLoader(spec.loader, hook)
    return spec


def _other_specs(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Iterator[ModuleSpec]:
    """Yield what the other finders find."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = None if _is_ours(finder) or find is None else find(fullname, path, target)
        if spec is not None:
            yield spec


def _memory_system_reports(module: ModuleType) -> None:
    if isinstance(getattr(module, "MemorySystem", None), type):
        add_to_memory_system(module.MemorySystem)


def _server_reports(module: ModuleType) -> None:
    if hasattr(module, "get_memory_system") and hasattr(getattr(module, "app", None), "add_middleware"):
        add_to_app(module.app, module.get_memory_system)


_REPORTING = {".memory_system": _memory_system_reports, ".api.server": _server_reports}
"""Modules of MemEvolve that get the store's report when they are loaded."""


class _AliasLoader(Loader):
    """Loads a module under a second name: the module itself, not a copy."""

    def __init__(self, target: str) -> None:
        self.target = target

    def exec_module(self, module: ModuleType) -> None:
        """Put the target into ``sys.modules``, from where the import system returns it."""
        target = importlib.import_module(self.target)
        sys.modules[module.__name__] = target
        if module.__name__ == _THEIRS + _STORE:
            _serve(True)
            _pass_for_their_backend(target)


def _alias(fullname: str) -> ModuleSpec:
    rest = fullname.removeprefix(_THEIRS)
    target = _OURS + rest
    shared = not rest or rest.split(".")[1] in _SHARED_ROOTS
    if not shared or importlib.util.find_spec(target) is None:
        raise ModuleNotFoundError(
            f"No module named {fullname!r}: MemEvolve is not installed, and {_OURS} has no such module; install "
            f"MemEvolve to use it",
            name=fullname,
        )
    return ModuleSpec(fullname, _AliasLoader(target), origin=target)


def _pass_for_their_backend(store: ModuleType) -> None:
    """Register this package's store as a subclass of MemEvolve's ABC, which MemEvolve checks for."""
    try:
        backend = importlib.import_module(_THEIRS + _BACKEND).StorageBackend
    except (ModuleNotFoundError, AttributeError):
        return  # a MemEvolve without that class cannot check for it
    if backend not in store.VectorStore.__mro__ and hasattr(backend, "register"):
        backend.register(store.VectorStore)


def _serve(does: bool) -> None:
    """Set whether MemEvolve creates the stores, in the configuration if that is loaded."""
    config = sys.modules.get(f"{_OURS}.utils.config")
    if config is not None:
        config.serve_memevolve(does)


def _memevolve_is_installed() -> bool:
    """Whether the import system finds MemEvolve without this finder. An unrelated folder of its name does not count."""
    for spec in _other_specs(_THEIRS, None):
        folders = spec.submodule_search_locations or ()
        if spec.origin is not None or any(Path(folder, "components", "store").is_dir() for folder in folders):
            return True
    return False


def _is_ours(finder: object) -> bool:
    """Compare by name, so that a reloaded module recognises the finder that it installed before."""
    return (type(finder).__module__, type(finder).__qualname__) == (__name__, _Finder.__qualname__)


def _below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _forget_in_parent(name: str, module: ModuleType) -> None:
    parent, _, child = name.rpartition(".")
    package = sys.modules.get(parent)
    if package is not None and not _below(package.__name__, _OURS) and vars(package).get(child) is module:
        delattr(package, child)


if __name__ == "__main__":
    sys.exit(
        importlib.import_module(f"{_OURS}.dropin").main()
    )  # the module that programs import, not its copy __main__
else:
    install()
