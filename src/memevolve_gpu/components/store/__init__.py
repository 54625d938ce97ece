"""Storage backends: the contract, the vector store, and the types of their reports."""

from ...utils.report_types import (
    Inventory,
    MaintenanceReport,
    MilvusStatistics,
    OperationEntry,
    StorageHealth,
    StoreStatistics,
)
from .base import MetadataMixin, StorageBackend
from .history import Erasure, Operation, UnitChange, UnitVersion
from .namespaces import NamespaceInfo
from .vector_store import VectorStore

__all__ = [
    "Erasure",
    "Inventory",
    "MaintenanceReport",
    "MetadataMixin",
    "MilvusStatistics",
    "NamespaceInfo",
    "Operation",
    "OperationEntry",
    "StorageBackend",
    "StorageHealth",
    "StoreStatistics",
    "UnitChange",
    "UnitVersion",
    "VectorStore",
]
