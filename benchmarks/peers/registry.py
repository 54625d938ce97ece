"""Every peer by name, and whether it can be used here."""

from __future__ import annotations

import importlib
from importlib import metadata, util
from pathlib import Path

from .protocol import BEFORE, Facts, Peer

__all__ = ["NAMES", "OURS", "peer", "usable", "versions"]

_WHERE = {
    "memevolve-gpu": "ours:OursAuto",
    "memevolve-gpu ivf": "ours:OursIvf",
    "chromadb": "chroma:Chroma",
    "lancedb": "lance:Lance",
    "qdrant-edge": "qdrant:Qdrant",
    "sqlite-vec": "sqlite_vec:SqliteVec",
    "milvus-lite": "milvus:Milvus",
    "zvec": "zvec:Zvec",
    "faiss Flat": "flat_faiss:FaissFlat",
    "faiss HNSW": "flat_faiss:FaissHnsw",
    "hnswlib": "hnsw_lib:Hnswlib",
    "usearch": "usearch_index:Usearch",
    "turbovec": "turbo:Turbovec",
    BEFORE: "ours:OursBefore",
}
NAMES = tuple(_WHERE)
OURS = NAMES[:2]
ROOT = Path(__file__).resolve().parents[2]

_DISTRIBUTIONS = {
    "faiss": "faiss-cpu",
    "qdrant_edge": "qdrant-edge-py",
    "sqlite_vec": "sqlite-vec",
    "milvus_lite": "milvus-lite",
}


def peer(name: str) -> Peer:
    """A new adapter of that name. Raises KeyError for a name that is not in ``NAMES``."""
    module, _, kind = _WHERE[name].partition(":")
    made: Peer = getattr(importlib.import_module(f".adapters.{module}", __package__), kind)()
    return made


def usable(name: str) -> str:
    """Why the peer cannot be used here; empty when it can."""
    if name == BEFORE and not (ROOT / "build/before/src").exists():
        return "no older state in build/before"
    facts: Facts = peer(name).facts
    missing = [module for module in facts.modules if util.find_spec(module) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


def versions(name: str) -> dict[str, str]:
    """Module to installed version."""
    return {module: version(module) for module in peer(name).facts.modules}


def version(module: str) -> str:
    if module == "memevolve_gpu":
        return str(importlib.import_module(module).__version__)  # of the checkout, installed or not
    return metadata.version(_DISTRIBUTIONS.get(module, module))
