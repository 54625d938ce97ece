"""The source of record: units, vectors and the log of changes in one SQLite file. Indexes are derived from it."""

from ..types import Filters
from .check import Finding
from .connections import Durability
from .filters import F, Where, canonical, matches
from .records import Records
from .schema import MODEL_KEY, StoreInfo
from .transaction import Stored, Transaction
from .writer import WriteContext

__all__ = [
    "MODEL_KEY",
    "Durability",
    "F",
    "Filters",
    "Finding",
    "Records",
    "StoreInfo",
    "Stored",
    "Transaction",
    "Where",
    "WriteContext",
    "canonical",
    "matches",
]
