"""Benchmarks of retrieval on questions with known answers."""
