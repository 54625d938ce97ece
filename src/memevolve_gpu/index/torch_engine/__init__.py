"""Bodies on a GPU through torch and Triton: exact scans and inverted lists, with the host's vectors to decide.

The same code runs on CPU tensors, where the references of :mod:`.reference` stand in for the Triton kernels.
Importing this room imports neither torch nor triton; :mod:`.door` does, when a body is built.
"""
