"""Management: prune, consolidate, deduplicate, forget, and the metrics of a memory."""

from .base import HealthMetrics, ManagementStrategy, MemoryManager, Merged, Operation, Removal
from .simple_strategy import SimpleManagementStrategy

__all__ = [
    "HealthMetrics",
    "ManagementStrategy",
    "MemoryManager",
    "Merged",
    "Operation",
    "Removal",
    "SimpleManagementStrategy",
]
