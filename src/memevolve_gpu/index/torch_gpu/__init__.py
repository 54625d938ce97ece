"""Indexes on a GPU through torch and Triton: flat and inverted lists, reranked with the host's vectors.

The same code runs on CPU tensors, where the reference implementations of :mod:`.kernel_ops` replace the Triton kernels.
Importing this package imports neither torch nor triton; :mod:`.runtime` does, when an index is built.

Reading order: ``device_rows`` says how vectors lie on a device, ``upload`` brings them there, ``search`` finds
candidates, ``index`` puts it together, with ``flat`` and ``ivf`` for the two kinds. ``device_masks`` holds filters and
tombstones, ``delta_buffer`` the newest rows, ``cuda_graphs`` recorded queries. ``kernel_ops`` chooses between
``kernels`` and their references; ``kmeans`` trains. On failure ``runtime`` classifies exceptions and holds the device
lock, ``failover`` decides, and ``memory_accounting`` keeps to a limit.
"""
