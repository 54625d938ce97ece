"""What work costs, so that an index can choose between its structure and a plain scan.

Units of 10 picoseconds: reading one 4-bit code of one row in a fast scan costs 1. Measured in one thread on a 2-core
x86-64 machine with AVX-512 over 39,320 real embeddings of 384 dimensions (``benchmarks/index_bodies.py``); only the
ratios matter, and they move little between machines because all of it is memory traffic.
"""

from __future__ import annotations

SCANNED_FLOAT = 13.0
"""One component of a row, in an exact scan."""
GATHERED_FLOAT = 13.0
"""One component of a candidate that is fetched and compared."""
CANDIDATE = 4000.0
"""Keeping one more row in the result of a fast scan."""
LIST = 35_000.0
"""Visiting one more inverted list."""
WHOLE_ROWS = 1_000_000
"""Up to here the codes lie in one piece. At a million rows reading all of them costs as much as visiting a third of the
lists, with which unforeseen queries found 0.965 instead of 0.988."""
HNSW_ROWS_PER_BEAM = 43
"""Rows that a scan compares in the time in which a walk widens its beam by one."""
_CALL = 2_000_000.0
"""A second stage: buffers, calls, and testing candidates."""


def scan_cost(rows: int, dim: int) -> float:
    """An exact scan of ``rows`` vectors."""
    return SCANNED_FLOAT * rows * dim


def codes_cost(code_reads: float, width: int, want: int, dim: int) -> float:
    """A fast scan that reads ``code_reads`` codes and keeps ``width`` rows, of which ``want`` are reranked."""
    return _CALL + code_reads + width * CANDIDATE + want * dim * GATHERED_FLOAT


def lists_cost(n: int, dim: int, codes: int, lists: tuple[int, int], want: int) -> float:
    """Time of reading the codes of ``lists`` (probed, all) and reranking ``want`` of the n rows."""
    nprobe, nlist = lists
    return codes_cost(n * nprobe / nlist * codes + nprobe * LIST + scan_cost(nlist, dim), want, want, dim)
