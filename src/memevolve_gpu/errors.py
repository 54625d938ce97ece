"""The errors of the package, all below :class:`MemEvolveError`.

Every message names the parameter at fault and the remedy. Errors of arguments are also ``ValueError``, errors of the
outside world also ``RuntimeError``, as MemEvolve's callers expect::

    MemEvolveError
    ├── ConfigurationError          (ValueError)    a setting is unknown or out of range
    ├── InvalidUnitError            (ValueError)    a unit that cannot be kept: no dict, empty id, not JSON, too large
    ├── InvalidVectorError          (ValueError)    wrong type or shape, NaN or infinity, zero under cosine
    │   └── DimensionMismatchError                  "Embedding dimension mismatch: expected 384, got 768"
    ├── InvalidFilterError          (ValueError)    unknown operator, bad path or value
    ├── InvalidQueryError           (ValueError)    top_k, recall, query text
    ├── ModelMismatchError          (ValueError)    the store was filled by another embedding model
    ├── EmbeddingError              (RuntimeError)  the embedding function failed or returned nonsense
    ├── EngineError                 (RuntimeError)  faiss is missing, doubled or half installed; an engine failed
    │   └── DeviceError                             a GPU refused: no memory, no driver, lost; the CPU can go on
    ├── CapacityError               (RuntimeError)  a limit is reached; nothing was written
    ├── ConflictError               (RuntimeError)  units changed since they were read; nothing was written
    ├── LegacyImportError           (RuntimeError)  an old pickle that is garbage or hostile
    └── StorageError                (RuntimeError)  the database file, or the server
        ├── NotAStoreError                          the file exists and is not ours
        ├── NewerSchemaError                        written by a newer version of this package
        ├── CorruptStoreError                       SQLite reports damage, or the records contradict each other
        ├── LockTimeoutError                        another process kept the writer lock for too long
        ├── StorageFullError                        disk full or quota reached
        ├── TooManyFilesError                       no more files may be open
        ├── ReadOnlyError                           file, folder or file system is read-only
        ├── NetworkFilesystemError                  locks cannot be trusted there
        ├── ReentrantCallError                      a handler or callback calls inside a call that it interrupts
        ├── StoreUnavailableError                   the server does not answer within the stated time
        └── StoreClosedError                        used after close()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

__all__ = [
    "CapacityError",
    "ConfigurationError",
    "ConflictError",
    "CorruptStoreError",
    "DeviceError",
    "DimensionMismatchError",
    "EmbeddingError",
    "EngineError",
    "HistoryError",
    "InvalidFilterError",
    "InvalidQueryError",
    "InvalidUnitError",
    "InvalidVectorError",
    "LegacyImportError",
    "LockTimeoutError",
    "MemEvolveError",
    "ModelMismatchError",
    "NetworkFilesystemError",
    "NewerSchemaError",
    "NotAStoreError",
    "ReadOnlyError",
    "ReentrantCallError",
    "StorageError",
    "StorageFullError",
    "StoreClosedError",
    "StoreUnavailableError",
    "TooManyFilesError",
]


class MemEvolveError(Exception):
    """Base class of all errors of this package.

    Examples:
        >>> from memevolve_gpu import ConfigurationError, MemEvolveError, StorageConfig
        >>> try:
        ...     StorageConfig(target_recall=2, _env_file=None)
        ... except MemEvolveError as error:
        ...     print(type(error).__name__, isinstance(error, ValueError))
        ConfigurationError True
    """


class ConfigurationError(MemEvolveError, ValueError):
    """A setting is unknown or its value cannot be used."""


class InvalidUnitError(MemEvolveError, ValueError):
    """A memory unit that cannot be kept."""


class InvalidVectorError(MemEvolveError, ValueError):
    """A vector of wrong type or shape, not finite, or zero under cosine."""


class DimensionMismatchError(InvalidVectorError):
    """A vector of another length than the store's."""

    def __init__(self, expected: int, got: int, remedy: str = "") -> None:
        """Make the error.

        Args:
            expected: length of the store's vectors.
            got: length that was given.
            remedy: what to do, for the message.
        """
        super().__init__(
            f"Embedding dimension mismatch: expected {expected}, got {got}" + (f"; {remedy}" if remedy else "")
        )


class InvalidFilterError(MemEvolveError, ValueError):
    """A filter outside the grammar."""


class InvalidQueryError(MemEvolveError, ValueError):
    """A search argument that has no meaning."""


class ModelMismatchError(MemEvolveError, ValueError):
    """The store was filled by another embedding model."""


class EmbeddingError(MemEvolveError, RuntimeError):
    """The embedding function failed or returned nonsense."""


class EngineError(MemEvolveError, RuntimeError):
    """A search engine is missing or failed."""


class DeviceError(EngineError):
    """A device refused or failed; the CPU can do the same work.

    Attributes:
        cause: as in :class:`~.types.DeviceIncident`. ``device-lost`` and ``device-error`` last until this process
            restarts, the others do not. After a fork the child stays on the CPU.
    """

    def __init__(
        self,
        message: str,
        cause: Literal["out-of-memory", "device-lost", "device-error", "fork", "limit"] = "device-error",
    ) -> None:
        super().__init__(message)
        self.cause = cause


class CapacityError(MemEvolveError, RuntimeError):
    """A limit is reached; nothing was written."""


class ConflictError(MemEvolveError, RuntimeError):
    """Units that were to be replaced changed since they were read; nothing was written.

    Attributes:
        ids: of these units.
    """

    def __init__(self, ids: Iterable[str], message: str = "") -> None:
        """Make the error.

        Args:
            ids: ids of the units that changed.
            message: what failed and what to do; empty for units that were to be deleted.
        """
        self.ids = list(ids)
        shown = ", ".join(map(repr, self.ids[:5])) + (", ..." if len(self.ids) > 5 else "")
        told = f"{message} ({len(self.ids)} units: {shown})"
        read = f"delete_ids: {len(self.ids)} changed since they were read ({shown}); read them again"
        super().__init__(told if message else read)


class HistoryError(MemEvolveError, LookupError):
    """The history does not reach so far back, or has no such operation."""


class LegacyImportError(MemEvolveError, RuntimeError):
    """An old store's pickle that is garbage or hostile."""


class StorageError(MemEvolveError, RuntimeError):
    """The database file could not be used."""


class NotAStoreError(StorageError):
    """The file exists and is not one of ours."""


class NewerSchemaError(StorageError):
    """The file was written by a newer version of this package."""


class CorruptStoreError(StorageError):
    """SQLite reports damage, or the records contradict each other."""


class LockTimeoutError(StorageError):
    """Another writer held the lock for longer than the stated time; nothing was written."""


class StorageFullError(StorageError):
    """The disk is full or a quota is reached."""


class TooManyFilesError(StorageError):
    """This process, or the machine, may open no more files."""


class ReadOnlyError(StorageError):
    """The file, its folder or its file system is read-only."""


class NetworkFilesystemError(StorageError):
    """File locks cannot be trusted on this file system."""


class ReentrantCallError(StorageError):
    """A signal handler, finalizer or callback called the store inside a call of the same thread that must go on first.

    Nothing was done. Call again once the interrupted call has returned.
    """


class StoreClosedError(StorageError):
    """The store was used after ``close()``."""


class StoreUnavailableError(StorageError):
    """The server that keeps the store did not answer within the stated time; what was acknowledged is safe."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 300 characters; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
