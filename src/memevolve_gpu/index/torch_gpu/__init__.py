"""Indexes on a GPU through torch and Triton: flat and inverted lists, reranked by float32 vectors.

The same code runs on CPU tensors, where the reference implementations of :mod:`.kernel_ops` replace the Triton kernels.
Importing this package imports neither torch nor triton; :mod:`.runtime` does, when an index is built.

Where to find what, in reading order:

* :mod:`.device_rows`: how vectors are stored on a device (padded groups of 32 rows, float16 or int8);
* :mod:`.upload`: brings rows to the device; :mod:`.search`: finds candidates there;
* :mod:`.index`: the base class that puts it together, and the flat index; :mod:`.ivf`: inverted lists, with k-means;
* :mod:`.device_masks`: filters and tombstones; :mod:`.delta_buffer`: the newest rows; :mod:`.cuda_graphs`: recorded
  single queries;
* :mod:`.kernels`: the Triton kernels; :mod:`.kernel_ops`: chooses between them and plain torch;
* :mod:`.runtime`: imports torch, classifies its errors, holds the device lock; :mod:`.memory_accounting`: predicts and
  limits bytes. :mod:`..device_failover` decides what follows a failure.
"""
