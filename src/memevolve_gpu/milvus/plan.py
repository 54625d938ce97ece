"""The index plan and search parameters for a Milvus server."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..planner.nlist import ListsRule
from ..types import JsonObject, Metric
from ..utils.config import StorageConfig
from .client import Version

METRICS: dict[Metric, str] = {"l2": "L2", "cosine": "COSINE", "ip": "IP"}

SEGMENT_BYTES = 512 * 2**20
"""Vectors of a full segment (``dataCoord.segment.maxSize``); every segment has lists of its own, and one with fewer
than 39 vectors for each is given fewer lists by the server."""

_EFFORT = ((0.0, 0.02), (0.8, 0.06), (0.9, 0.16), (0.95, 0.32), (0.98, 0.6), (0.99, 0.8), (1.0, 1.0))
"""Recall asked for, and the share of the lists that is probed for it: what out-of-distribution queries needed on
39,320 real embeddings (benchmarks/milvus.py), so that others find more."""

_HNSW = ((0.0, 32.0), (0.9, 64.0), (0.95, 128.0), (0.98, 256.0), (0.99, 512.0), (1.0, 2048.0))
_M, _EF_CONSTRUCTION = 32, 200
_GPU_SINCE = (2, 3, 0)
_CAGRA_SINCE = (2, 4, 0)
_GPU_COSINE_SINCE = (2, 5, 0)


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """``index`` is the server's word for it; ``exact``: it compares every vector; ``reason``: one sentence."""

    index: str
    nlist: int
    exact: bool
    reason: str
    params: JsonObject = field(default_factory=dict)


def plan_for(version: Version, dim: int, metric: Metric, config: StorageConfig) -> ServerPlan:
    """The index of a new collection. A GPU index only where the server was built for GPUs and takes the metric."""
    gpu, why = _gpu(version, metric, config)
    if config.index_type == "flat":
        kind = "GPU_BRUTE_FORCE" if gpu and version.numbers >= _CAGRA_SINCE else "FLAT"
        return ServerPlan(kind, 0, True, f"exact, as asked; {why}")
    if config.index_type == "hnsw":
        return ServerPlan("HNSW", 0, False, "a graph, as asked", {"M": _M, "efConstruction": _EF_CONSTRUCTION})
    if gpu and config.index_type == "auto" and version.numbers >= _CAGRA_SINCE:
        params = {"intermediate_graph_degree": 64, "graph_degree": 32}
        return ServerPlan("GPU_CAGRA", 0, False, f"a graph on the GPU; {why}", params)
    nlist = _nlist(dim, config)
    return ServerPlan("GPU_IVF_FLAT" if gpu else "IVF_FLAT", nlist, False, f"lists; {why}", {"nlist": nlist})


def search_params(index: str, nlist: int, recall: float, top_k: int) -> JsonObject:
    """The search parameters for a target recall; 1.0 tries as hard as the index can."""
    if index in ("FLAT", "GPU_BRUTE_FORCE"):
        return {}
    if index == "HNSW":
        return {"ef": max(top_k, int(_between(_HNSW, recall)))}
    if index == "GPU_CAGRA":
        return {"itopk_size": max(-(-top_k // 32) * 32, int(_between(_HNSW, recall)) // 32 * 32)}
    return {"nprobe": min(nlist, max(1, int(np.ceil(nlist * _between(_EFFORT, recall)))))}


def _gpu(version: Version, metric: Metric, config: StorageConfig) -> tuple[bool, str]:
    if config.device == "cpu":
        return False, "DEVICE=cpu"
    if not version.gpu or version.numbers < _GPU_SINCE:
        return False, f"the server ({version.text}) was not built for GPUs"
    if metric == "cosine" and version.numbers < _GPU_COSINE_SINCE:
        return False, f"GPU indexes of {version.text} know no cosine"
    return True, f"the server ({version.text}) was built for GPUs"


def _nlist(dim: int, config: StorageConfig) -> int:
    most = config.nlist_max if "nlist_max" in config.model_fields_set else None
    return ListsRule(config.vectors_per_centroid, config.nlist_min, most).lists_for(SEGMENT_BYTES // (4 * dim))


def _between(table: tuple[tuple[float, float], ...], recall: float) -> float:
    return float(np.interp(recall, [row[0] for row in table], [row[1] for row in table]))
