"""The Milvus client: retries where they are safe, and errors translated to ours.

``pymilvus`` is imported when the first connection is made. Tests pass a client of their own.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ..errors import (
    ConfigurationError,
    ReadOnlyError,
    StorageError,
    StorageFullError,
    StoreClosedError,
    StoreUnavailableError,
)
from ..utils.arguments import callback, having
from ..utils.config import MilvusConfig
from ..utils.forking import lock, renew_in_child

_Result = TypeVar("_Result")

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
ATTEMPT_SHARE = 1 / 3
"""Share of the whole time that one attempt may take, so that a node that hangs leaves time for another."""


class GaveUp(Exception):  # noqa: N818 - it never leaves this package: MilvusClient translates it
    """The time is over; ``last`` is what the last attempt raised."""

    def __init__(self, last: BaseException, attempts: int) -> None:
        super().__init__(str(last))
        self.last = last
        self.attempts = attempts


@dataclass
class Retrying:
    """Repeats a call until it succeeds, fails for good, or ``seconds`` have passed.

    Only what may be done twice is given to it: reads, and writes that name every row by its id. ``clock`` and
    ``sleep`` are there for tests.
    """

    seconds: float
    clock: Callable[[], float] = field(default=time.monotonic)
    sleep: Callable[[float], None] = field(default=time.sleep)

    def run(
        self,
        call: Callable[[float], _Result],
        foreign: tuple[type[BaseException], ...],
        is_final: Callable[[BaseException], bool],
        seconds: float | None = None,
    ) -> _Result:
        """Return what ``call(seconds that this attempt may take)`` returns.

        Raises GaveUp when the time is over, and the foreign error itself when ``is_final`` says that another try
        would end the same.
        """
        allowed = self.seconds if seconds is None else seconds
        until, pause, attempts = self.clock() + allowed, FIRST_PAUSE, 0
        while True:
            attempts += 1
            left = max(0.001, until - self.clock())
            try:
                return call(min(left, max(1.0, allowed * ATTEMPT_SHARE)))
            except foreign as error:
                if is_final(error):
                    raise
                if self.clock() + pause >= until:
                    raise GaveUp(error, attempts) from error
            self.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


OLDEST = (2, 3, 2)
"""The first version that deletes by any expression and has ``json_contains_any``, ``upsert`` and ``count(*)``."""

LONG = 600.0
"""Seconds for what the server does at its own pace: loading a collection, flushing, building an index."""

_FULL = frozenset({3, 7})
_READ_ONLY = frozenset({9})
_FINAL = frozenset({100, 102, 1100, 1101, 1400, 1401, 1700, 1800, 1801})
"""Error codes that another try does not change: no such collection, bad parameter, not allowed, no field."""
_FINAL_GRPC = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "INVALID_ARGUMENT", "UNIMPLEMENTED"})
_FINAL_CLASSES = frozenset({"ParamError", "DataNotMatchException", "PrimaryKeyException", "DataTypeNotMatchException"})
_FINAL_WORDS = ("cannot parse", "failed to create query plan", "invalid parameter", "auth check failure", "not match")

Client = Any


class Version(NamedTuple):
    """What the server says it is; ``gpu``: it was built for GPUs."""

    numbers: tuple[int, int, int]
    gpu: bool
    text: str

    @classmethod
    def parse(cls, text: str) -> Version:
        """``v2.4.5-gpu``; what cannot be read counts as the oldest that is served."""
        found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
        numbers = (int(found[1]), int(found[2]), int(found[3] or 0)) if found else OLDEST
        return cls(numbers, "-gpu" in text.lower(), text)


class MilvusClient:
    """Calls the server. Safe to use from several threads; a forked child connects again."""

    def __init__(self, config: MilvusConfig, make: Callable[[float], Client] | None = None) -> None:
        """``make(seconds)`` connects; None takes pymilvus. Connects at the first call."""
        self.config = config
        self.retrying = Retrying(config.timeout)
        self._make = callback("client", make) or self._connect
        self._lock = lock()
        self._client: Client | None = None
        self._inherited: Client | None = None
        self._closed = False
        renew_in_child(self)

    def call(self, name: str, *arguments: object, seconds: float | None = None, **named: object) -> Any:
        """``client.name(*arguments, timeout=..., **named)``, repeated until the stated time is over.

        Only for what may be done twice. Raises StoreUnavailableError and other errors of ours.
        """
        return self.attempt(lambda client, left: getattr(client, name)(*arguments, timeout=left, **named), seconds)

    def attempt(self, call: Callable[[Client, float], Any], seconds: float | None = None) -> Any:
        """As :meth:`call` for whatever is done with the client."""
        allowed = self.config.timeout if seconds is None else seconds
        try:
            return self.retrying.run(lambda left: call(self._open(left), left), _foreign(), _is_final, allowed)
        except GaveUp as ended:
            raise StoreUnavailableError(
                f"the Milvus server at {self.config.uri} gave no answer within {allowed:g} s ({ended.attempts} "
                f"attempts, the last: {self._said(ended.last)}); start it, check MEMEVOLVE_MILVUS_URI, "
                "or raise MEMEVOLVE_MILVUS_TIMEOUT"
            ) from self._without_token(ended.last)
        except _foreign() as error:
            raise self._ours(error) from self._without_token(error)

    def version(self) -> Version:
        """The server's own word for what it is. Raises ConfigurationError when it is too old."""
        version = Version.parse(str(self.call("get_server_version")))
        if version.numbers < OLDEST:
            raise ConfigurationError(
                f"MEMEVOLVE_MILVUS_URI: the server is Milvus {version.text}, at least "
                f"{'.'.join(map(str, OLDEST))} is needed; upgrade it"
            )
        return version

    def timestamp(self) -> int | None:
        """A moment of the server's clock after everything that it has acknowledged; None where it cannot be asked."""
        return self.attempt(_timestamp)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give the connection back; further calls raise StoreClosedError."""
        with self._lock:
            client, self._client, self._closed = self._client, None, True
        if client is not None:
            client.close()

    def after_fork(self) -> None:
        """A child connects again; the parent's connection is kept unused, for closing it would notify the server."""
        self._inherited, self._client = self._client, None

    def _open(self, seconds: float) -> Client:
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"the store {self.config.address} is closed; open a new MilvusStore")
            if self._client is None:
                self._client = having("client", self._make(seconds), "query", "a function that makes a client")
            return self._client

    def _connect(self, seconds: float) -> Client:
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise ConfigurationError(
                f"MEMEVOLVE_STORAGE_BACKEND_TYPE=milvus needs pymilvus ({error}); pip install 'memevolve-gpu[milvus]'"
            ) from error
        _quiet("pymilvus")
        config = self.config
        return MilvusClient(
            uri=config.uri, token=config.secret_token, db_name=config.database or "", timeout=seconds, dedicated=True
        )

    def _said(self, error: BaseException) -> str:
        """The first line of what the client said, without the token and the password in it."""
        text, token = _first_line(error), self.config.secret_token
        for secret in (token, token.partition(":")[2]):
            text = text.replace(secret, "***") if secret else text
        return text

    def _without_token(self, error: BaseException) -> BaseException | None:
        """The error as the cause of ours; None when it shows the token or the password."""
        return error if self._said(error) == _first_line(error) else None

    def _ours(self, error: BaseException) -> StorageError | ConfigurationError:
        code, text = _code(error), self._said(error)
        where = f"the Milvus server at {self.config.uri}"
        if code in _FULL:
            return StorageFullError(f"{where} has no room: {text}; give it more memory or disk, or delete units")
        if code in _READ_ONLY:
            return ReadOnlyError(f"{where} refuses writes: {text}; see its quotas")
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED", 1400, 1401) or "auth check failure" in text:
            return ConfigurationError(f"MEMEVOLVE_MILVUS_TOKEN is not accepted by {where}: {text}")
        if code == 100:
            return StorageError(
                f"{where} has lost the collection {self.config.collection!r}: {text}; open the store again"
            )
        return StorageError(f"{where} refused a request: {text}")


def _timestamp(client: Client, seconds: float) -> int | None:
    """The call is not part of the client's API; where a version lacks it, reads use consistency Strong instead."""
    connection = getattr(client, "_get_connection", lambda: None)()
    ask = getattr(connection, "alloc_timestamp", None)
    return int(ask(timeout=seconds)) if ask is not None else None


def _foreign() -> tuple[type[BaseException], ...]:
    """Return the exception classes of the client, as far as it is installed."""
    found: list[type[BaseException]] = [ConnectionError, TimeoutError]
    try:
        import grpc
        from pymilvus.exceptions import MilvusException
    except ImportError:
        return tuple(found)
    return (*found, MilvusException, grpc.RpcError)


def _is_final(error: BaseException) -> bool:
    if type(error).__name__ in _FINAL_CLASSES or getattr(error, "is_input_error", False) is True:
        return True
    code, text = _code(error), str(error).lower()
    if code in _FULL | _READ_ONLY | _FINAL | _FINAL_GRPC:
        return True
    return any(word in text for word in _FINAL_WORDS)


def _code(error: BaseException) -> int | str:
    """Return the server's error number, or gRPC's status name."""
    code = getattr(error, "code", None)
    value = code() if callable(code) else code
    return value if isinstance(value, int) and not hasattr(value, "name") else str(getattr(value, "name", value))


def _first_line(error: BaseException) -> str:
    details = getattr(error, "details", None)  # gRPC's own errors print as a page
    said = f"{_code(error)}: {details()}" if callable(details) else str(getattr(error, "message", "") or error)
    text = said or type(error).__name__
    return text.strip().splitlines()[0][:300]


def _quiet(name: str) -> None:
    """Silence a client's log: its failures reach callers as errors already.

    A level that was set explicitly is kept; pymilvus sets WARNING when it is imported.
    """
    log = logging.getLogger(name)
    if log.level in (logging.NOTSET, logging.WARNING):
        log.setLevel(logging.CRITICAL)
