"""Indexes on a GPU through faiss' classic GPU indexes.

Their limits shape this package. They are not safe for two threads at once, not even to read: one owner per device holds
the lock (:mod:`.resources`). They cannot delete and ignore selectors: more results than wanted are fetched and masked
on the host until there are enough (:mod:`.index`). They return at most 2,048 results and probe at most 2,048 lists:
above that, the host's vectors answer. They take 1.5 GiB of temporary memory unless a size is set, so it is set. Most
CUDA errors end the process; what can be caught is handled in :mod:`.index`. Memory for the code of kernels is requested
before their first launch, and half-initialised resources are discarded, since both would end the process
(:mod:`.resources`). Under l2, float16 is used only where squares fit it (:mod:`.index`).
"""
