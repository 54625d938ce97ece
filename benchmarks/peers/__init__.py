"""Compare this store with others: the same work, in the same run, one thread. ``scripts/benchmark`` runs it."""
