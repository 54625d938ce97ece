"""Bodies on a GPU through torch and Triton: exact scans and inverted lists, with the host's vectors to decide.

The same code runs on CPU tensors, where the references of :mod:`.reference` stand in for the Triton kernels.
Importing this room imports neither torch nor triton; :mod:`.door` does, when a body is built.

To read it: ``space`` and ``resident`` say how vectors lie on a device, ``lists`` and ``geometry`` in which order;
``loaded`` brings them there; ``search`` finds candidates and ``batches`` cuts many queries; ``body`` holds it together,
with ``exact`` and ``ivf`` for the two kinds. Beside the rows: ``masks`` (filters, tombstones), ``tail`` (newest rows),
``replay`` (recorded queries). Below: ``operations`` choose between ``kernels`` and ``reference``; ``kmeans`` trains.
When it fails: ``failures`` reads exceptions, ``guard`` decides, ``turns`` lets one at a time, ``memory`` keeps to a
limit.
"""
