"""Indexes behind one contract: exact, two-stage, inverted lists, graph; and the snapshot that keeps them."""
