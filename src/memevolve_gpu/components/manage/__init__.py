"""Management: prune, consolidate, deduplicate, forget, and the figures of a memory."""

from .base import HealthMetrics, ManagementStrategy, MemoryManager, Removal
from .simple_strategy import SimpleManagementStrategy

__all__ = ["HealthMetrics", "ManagementStrategy", "MemoryManager", "Removal", "SimpleManagementStrategy"]
