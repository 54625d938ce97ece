"""Helpers that every layer may use: arguments, vectors, configuration, embedding functions."""
