"""Backends of the stand-in; like MemEvolve's package it imports them all."""

from .base import StorageBackend
from .vector_store import VectorStore

__all__ = ["StorageBackend", "VectorStore"]
