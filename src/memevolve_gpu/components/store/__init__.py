"""Storage backends: the contract, the vector store, and the types of their reports."""

from .base import MetadataMixin, StorageBackend
from .namespaces import NamespaceInfo
from .report_types import (
    Inventory,
    MaintenanceReport,
    MilvusStatistics,
    OperationEntry,
    StorageHealth,
    StoreStatistics,
)
from .vector_store import VectorStore

__all__ = [
    "Inventory",
    "MaintenanceReport",
    "MetadataMixin",
    "MilvusStatistics",
    "NamespaceInfo",
    "OperationEntry",
    "StorageBackend",
    "StorageHealth",
    "StoreStatistics",
    "VectorStore",
]
