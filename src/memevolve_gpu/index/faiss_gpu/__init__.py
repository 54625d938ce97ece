"""Bodies that search on a GPU through faiss' classic GPU indexes.

What these indexes cannot do decides how the room is built. They are not safe for two threads at once, not even to
read: one owner per device holds the lock (:mod:`.owner`). They cannot delete and ignore selectors: more results than
wanted are fetched and masked on the host, again and again until there are enough (:mod:`.body`). They give at most
2,048 results and probe at most 2,048 lists: above, the host's vectors answer. They take 1.5 GiB of temporary memory
unless told otherwise: they are told. Most CUDA errors end the process; what can be caught is (:mod:`.duty`). Room for
the code of kernels is asked for before they are first launched, and resources that were set up half are thrown away,
since both would end the process (:mod:`.owner`). Under l2, float16 is kept only where squares fit it (:mod:`.exact`).
"""
