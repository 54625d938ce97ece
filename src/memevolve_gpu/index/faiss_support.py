"""Import faiss late, check the installation, and translate its errors.

The faiss distributions (``faiss-cpu``, ``faiss-gpu-cu12``, conda's ``faiss``, ...) all install one folder named
``faiss``, and pip does not notice when a second one overwrites the first. :func:`load_faiss` imports it late, checks
that it can work, and says what to install or uninstall when it cannot.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ..errors import EngineError, first_line
from ..types import FAISS_FOR_GPUS
from ..utils.forking import call_in_child, lock

_DISTRIBUTIONS = ("faiss", "faiss-cpu", *FAISS_FOR_GPUS)
_NEEDED = (
    "IDSelectorAll",
    "IDSelectorArray",
    "IDSelectorBitmap",
    "IndexFlat",
    "IndexHNSWFlat",
    "IndexIVFPQFastScan",
    "IndexPQFastScan",
    "SearchParametersHNSW",
    "SearchParametersIVF",
    "deserialize_index",
    "fvec_L2sqr_by_idx",
    "fvec_inner_products_by_idx",
    "knn_L2sqr",
    "knn_L2sqr_by_idx",
    "knn_inner_product",
    "knn_inner_products_by_idx",
    "omp_set_num_threads",
    "serialize_index",
    "swig_ptr",
)
_INSTALL = "pip install 'memevolve-gpu[cpu]' (or the extra 'gpu' on a CUDA machine)"

_lock = lock()
_module: ModuleType | None = None


def load_faiss() -> ModuleType:
    """Return the faiss module, imported and examined on the first successful call.

    Raises:
        EngineError: faiss is missing, two distributions lie over each other, the folder lacks its compiled module,
            functions are missing (too old), or its CUDA libraries cannot be loaded. The message says what to install
            or uninstall. Failures are not remembered: the next call looks again.
    """
    global _module  # noqa: PLW0603 - the cache of a process-wide fact
    if _module is not None:
        return _module
    with _lock:
        if _module is None:
            _refuse_clash()
            module = _import()
            _refuse_incomplete(module)
            call_in_child(after_fork)
            _module = module
        return _module


def require_faiss() -> ModuleType:
    """As :func:`load_faiss`, for a store that is about to be opened: an import blocked since the first load counts.

    ``sys.modules["faiss"] = None`` blocks an import. Stores that are open keep the module that they have.
    """
    blocked = "faiss" in sys.modules and sys.modules["faiss"] is None
    return _import() if blocked else load_faiss()


def installed_distributions() -> dict[str, str]:
    """Names and versions of the installed distributions that own the ``faiss`` folder."""
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _owns_folder(distribution):
            found[name] = distribution.version
    return found


def after_fork() -> None:
    """Limit faiss to one thread in a forked child: the parent's OpenMP pool does not exist there and would hang."""
    if _module is not None:
        _module.omp_set_num_threads(1)


def leave_half() -> None:
    """Have faiss use half of its threads, at least one, for later calls of this thread; the rest is for others."""
    faiss = load_faiss()
    faiss.omp_set_num_threads(max(1, faiss.omp_get_max_threads() // 2))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run faiss single-threaded in the calling thread, so that results do not depend on timing."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def translate_error(doing: str) -> Iterator[None]:
    """Turn what faiss raises while ``doing`` something into an EngineError that names it."""
    try:
        yield
    except EngineError:
        raise
    except MemoryError as error:
        raise EngineError(f"out of memory while {doing}; lower max_memory_mb or precision, or free memory") from error
    except RuntimeError as error:
        raise EngineError(f"faiss failed while {doing}: {first_line(error)}") from error


def _owns_folder(distribution: importlib.metadata.Distribution) -> bool:
    """Whether a distribution says that it installed files below ``faiss``, or keeps no list of its files."""
    files = distribution.files
    return files is None or any(file.parts[:1] == ("faiss",) for file in files)


def _refuse_clash() -> None:
    found = installed_distributions()
    if len(found) < 2:
        return
    names = ", ".join(f"{name} {version}" for name, version in found.items())
    raise EngineError(
        f"faiss is installed {len(found)} times ({names}); these distributions share one folder and overwrite "
        f"each other. Run: pip uninstall -y {' '.join(found)}; then {_INSTALL}"
    )


def _import() -> ModuleType:
    try:
        return importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        if error.name == "faiss":
            raise EngineError(f"faiss is not installed. Run: {_INSTALL}") from error
        raise EngineError(f"{_half_installed()}; module {error.name!r} is missing. {_reinstall()}") from error
    except (ImportError, AttributeError, NameError, TypeError, SyntaxError) as error:
        raise EngineError(f"{_half_installed()}: {first_line(error)}. {_reinstall()}") from error
    except (RuntimeError, OSError) as error:
        raise EngineError(
            f"faiss is installed but its libraries cannot be loaded: {first_line(error)}. Install the CUDA "
            f"libraries that this faiss wants, or replace it by the CPU one: {_reinstall()}"
        ) from error


def _refuse_incomplete(module: ModuleType) -> None:
    if getattr(module, "__file__", None) is None:
        sys.modules.pop("faiss", None)
        raise EngineError(f"{_half_installed()}: the folder 'faiss' holds no __init__.py. {_reinstall()}")
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        sys.modules.pop("faiss", None)
        version = getattr(module, "__version__", "unknown")
        raise EngineError(
            f"faiss (version {version}) lacks {', '.join(missing[:4])}: it is too old or half installed. {_reinstall()}"
        )


def _half_installed() -> str:
    return "faiss is half installed"


def _reinstall() -> str:
    names = " ".join(installed_distributions()) or "faiss-cpu"
    return f"Run: pip uninstall -y {names}; then {_INSTALL}"
