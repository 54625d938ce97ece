"""This store beside its peers: the same work, in the same run, one thread. ``scripts/benchmark`` runs it."""
