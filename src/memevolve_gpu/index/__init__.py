"""Indexes of vectors behind one contract, and the snapshot file that keeps one.

An index is immutable: it is built from rows, searched by any number of threads, extended into a longer one, saved as
named arrays and loaded from them. It finds candidates by whatever means it has; exact float32 distances decide.

Where to find what:

* the contract: :mod:`.base` (``Index``, ``BuildJob``), :mod:`.registry` (``build`` and ``from_parts`` by engine and
  kind), :mod:`.bitmap` (``RowFilter``, the rows a search may return);
* on the CPU: :mod:`.flat` (exact), :mod:`.fastscan` (4-bit codes and exact reranking), :mod:`.ivf` (inverted lists of
  such codes), :mod:`.hnsw` (a graph);
* on a GPU: :mod:`.torch_gpu` and :mod:`.faiss_gpu` (exact and inverted lists), :mod:`.device_failover` (what happens
  when a device fails);
* what they share: :mod:`.vector_table` (float32 vectors in memory or mapped from a file), :mod:`.exact_scan` (exact
  search and reranking), :mod:`.sample` (training samples), :mod:`.costs` (when a scan is cheaper),
  :mod:`.faiss_support` and :mod:`.faiss_helpers` (loading and using faiss);
* on disk: :mod:`.snapshot_file`.

Importing this package loads neither faiss nor torch.
"""
