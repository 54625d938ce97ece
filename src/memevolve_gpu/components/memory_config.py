"""What a memory system is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from ..errors import ConfigurationError
from ..types import MemoryUnit
from ..utils.arguments import whole_number
from .manage import ManagementStrategy
from .retrieve import RetrievalResult, RetrievalStrategy
from .store import StorageBackend

__all__ = ["ComponentType", "MemorySystemConfig", "PrunePolicy"]

POLICIES = ("lru", "lfu", "random", "oldest")

PrunePolicy = Literal["lru", "lfu", "random", "oldest"]


class ComponentType(Enum):
    """What ``MemorySystem.reconfigure_component`` can replace."""

    ENCODER = "encoder"
    STORAGE = "storage"
    RETRIEVAL = "retrieval"
    MANAGER = "manager"

    @classmethod
    def parse(cls, value: ComponentType | str) -> ComponentType:
        """The component of that name. Raises ConfigurationError."""
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(kind.value for kind in cls)
            raise ConfigurationError(f"component_type must be one of {names}, got {value!r}") from None


@dataclass
class MemorySystemConfig:
    """What a memory system is made of. Every field has MemEvolve's name where MemEvolve has it.

    ``memory_*`` belong to MemEvolve's encoder; nothing here reads them.
    """

    memory_base_url: str = ""
    memory_api_key: str = field(default="", repr=False)
    memory_model: str | None = None
    memory_timeout: int = 600
    storage_backend: StorageBackend | None = None
    """Used as it is, and left open by ``close()``; None: a ``VectorStore`` by the environment's settings."""
    retrieval_strategy: RetrievalStrategy | None = None
    """None: hybrid where the backend has both indexes, else keyword."""
    management_strategy: ManagementStrategy | None = None
    """None: ``SimpleManagementStrategy``."""
    default_retrieval_top_k: int = 5
    enable_auto_management: bool = True
    """Whether room is made before the backend would refuse."""
    auto_prune_threshold: int | None = None
    """Units beyond which room is made; None: MEMEVOLVE_STORAGE_PRUNE_THRESHOLD of the backend's limits."""
    prune_policy: PrunePolicy = "lru"
    """Who goes first: read longest ago, least often, at random, or the oldest."""
    prune_to: float | None = None
    """Share of the limit to go down to; None: MEMEVOLVE_STORAGE_WARNING_THRESHOLD less 0.1."""
    log_level: str | None = None
    """Level of this package's loggers; None leaves it alone."""
    on_encode_complete: Callable[[str, MemoryUnit], Any] | None = None
    on_retrieve_complete: Callable[[str, list[RetrievalResult]], Any] | None = None
    on_manage_complete: Callable[[str, Any], Any] | None = None

    def __post_init__(self) -> None:
        whole_number("default_retrieval_top_k", self.default_retrieval_top_k, error=ConfigurationError)
        if self.prune_policy not in POLICIES:
            raise ConfigurationError(f"prune_policy must be one of {', '.join(POLICIES)}, got {self.prune_policy!r}")
        if self.log_level is not None and not isinstance(logging.getLevelName(self.log_level.upper()), int):
            raise ConfigurationError(f"log_level must be a level of Python's logging, got {self.log_level!r}")
