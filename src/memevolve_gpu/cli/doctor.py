"""The command doctor: check the installation, the machine and the store."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from ..errors import MemEvolveError
from .app import ExitCode
from .options import AsJson, Embedder, EmbedderName, Prefix, choose_embedder, exists, stored_model
from .output import Output, Rows

_Finding = tuple[str, str]
"""A state (``ok``, ``note`` or ``wrong``) and a sentence; one about what is wrong ends with the remedy."""

_FREE_BYTES = 2**30
_FILES_PER_STORE = 7
"""Free disk space and open files below which doctor warns."""


def doctor(*, store: Prefix, embedder: Embedder = "auto", as_json: AsJson = False) -> None:
    """Check the installation, the machine and the store, and say what to do about what is wrong.

    Exits with 1 when something is wrong. Changes nothing; check verifies every unit of a store.
    """
    findings = [(name, *_found(find, store, embedder)) for name, find in _CHECKS.items()]
    wrong = sum(state == "wrong" for _, state, _ in findings)
    document = [{"check": name, "state": state, "finding": text} for name, state, text in findings]
    rows = [[state, name, text] for name, state, text in findings]
    summary = f"{wrong} problem{'' if wrong == 1 else 's'}" if wrong else "nothing is wrong"
    Output(as_json).show(
        {"ok": not wrong, "checks": document}, Rows(("state", "check", "finding"), rows, whole=True), "", summary
    )
    if wrong:
        raise typer.Exit(ExitCode.FAILED)


def _found(find: Callable[[str, EmbedderName], _Finding], store: str, embedder: EmbedderName) -> _Finding:
    from ..utils.config import is_milvus_uri

    if find in (_permissions, _filesystem, _disk) and is_milvus_uri(store):
        return "note", "the store is on a server"
    try:
        return find(store, embedder)
    except (MemEvolveError, ImportError) as error:
        return "wrong", str(error)
    except OSError as error:
        return "wrong", f"{error.filename or store}: {error.strerror or error}"


def _python(_store: str, _embedder: EmbedderName) -> _Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.maxsize < 2**32:
        return "wrong", f"Python {version} has 32 bits; install one with 64, faiss has no other build"
    return "ok", f"Python {version}, {sys.executable}"


def _sqlite(_store: str, _embedder: EmbedderName) -> _Finding:
    import apsw

    return "ok", f"SQLite {apsw.sqlite_lib_version()} of apsw"


def _faiss(_store: str, _embedder: EmbedderName) -> _Finding:
    from ..index.faiss_support import installed_distributions, load_faiss

    load_faiss()
    return "ok", ", ".join(f"{name} {version}" for name, version in installed_distributions().items()) or "installed"


def _settings(_store: str, _embedder: EmbedderName) -> _Finding:
    from ..utils.config import EmbeddingConfig, MilvusConfig, StorageConfig

    for settings in (StorageConfig, EmbeddingConfig, MilvusConfig):
        settings()
    return "ok", "every MEMEVOLVE_ variable is valid"


def _gpu(_store: str, _embedder: EmbedderName) -> _Finding:
    from ..components.store.session import this_machine
    from ..utils.config import StorageConfig

    machine = this_machine(StorageConfig())
    found, choice = machine.gpus(), machine.choice
    if choice.unmet:
        return "wrong", f"{choice.reason}; install a driver, or set MEMEVOLVE_STORAGE_DEVICE=auto"
    if not found.gpus:
        return "note", f"no GPU, the CPU searches: {found.problem}"
    names = ", ".join(f"{gpu.device} {gpu.name}" + (f" ({gpu.problem})" if gpu.problem else "") for gpu in found.gpus)
    return "ok" if all(not gpu.problem for gpu in found.gpus) else "note", f"{names}; {choice.reason}"


def _model(store: str, embedder: EmbedderName) -> _Finding:
    import numpy as np

    from ..utils.embeddings import Embedder as Checked
    from .read_commands import refuse_misfit

    held = stored_model(store)
    logging.disable(logging.WARNING)  # about the stand-in for a model, which is a finding below
    try:
        checked = Checked(choose_embedder(embedder, held))
    finally:
        logging.disable(logging.NOTSET)
    vector = checked.embed_many(["the memory of an agent"])[0]
    refuse_misfit(store, checked, held)
    if str(checked.model_name).startswith("hashing-") and not held:
        return "note", "no embedding model is configured: texts are compared by words; see MEMEVOLVE_EMBEDDING_BASE_URL"
    return "ok", f"{checked.model_name or 'without a name'}: {vector.size} numbers, length {np.linalg.norm(vector):.2f}"


def _permissions(store: str, _embedder: EmbedderName) -> _Finding:
    place = Path(store).absolute()
    kept = [file for file in place.parent.glob(f"{place.name}.*") if not os.access(file, os.R_OK | os.W_OK)]
    folder = _standing(place.parent)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return "wrong", f"{folder} cannot be written by this user; change its owner, or name another with --store"
    if kept:
        return "wrong", f"{kept[0]} cannot be read and written by this user; change its owner or mode"
    return "ok", f"{folder} can be written"


def _filesystem(store: str, _embedder: EmbedderName) -> _Finding:
    from ..records.file_lock import filesystem_of, refuse_network_filesystem

    folder = _standing(Path(store).absolute().parent).resolve()
    refuse_network_filesystem(folder)
    return "ok", f"{filesystem_of(folder) or 'a file system of unknown type'}, not a network"


def _disk(store: str, _embedder: EmbedderName) -> _Finding:
    free = shutil.disk_usage(_standing(Path(store).absolute().parent)).free
    text = f"{free / 2**30:,.1f} GB free"
    return ("ok", text) if free >= _FREE_BYTES else ("wrong", f"{text}; free some, or move the store")


def _files(_store: str, _embedder: EmbedderName) -> _Finding:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return "ok", "no limit of open files"
    text = f"{limit:,} files may be open, enough for {limit // _FILES_PER_STORE:,} stores in a process"
    return ("ok", text) if limit >= 256 else ("wrong", f"{text}; raise it with ulimit -n 1024")


def _store(store: str, _embedder: EmbedderName) -> _Finding:
    from ..records import Records
    from ..records.damage import damage_of
    from ..records.opening import database_path
    from ..utils.config import is_milvus_uri

    if not exists(store):
        return "note", f"there is no store at {store} yet; init or add creates one"
    if is_milvus_uri(store):
        return "ok", f"{store} answers"
    damage = damage_of(database_path(store))
    if damage:
        return "wrong", f"damage was met: {damage}"
    info = Records.peek(store)
    return "ok", f"{store}.db: {'unknown' if info is None else f'{info.dim} numbers, model {info.model}'}"


def _standing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next((one for one in (folder, *folder.parents) if one.is_dir()), folder)


_CHECKS: dict[str, Callable[[str, EmbedderName], _Finding]] = {
    "python": _python,
    "sqlite": _sqlite,
    "faiss": _faiss,
    "settings": _settings,
    "gpu": _gpu,
    "model": _model,
    "permissions": _permissions,
    "file system": _filesystem,
    "disk": _disk,
    "open files": _files,
    "store": _store,
}
