"""Settings of a store on Milvus: ``MEMEVOLVE_MILVUS_*``, read where all settings are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote, unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from ..errors import ConfigurationError
from .config import Allowed, _Count, _Key, _Seconds, _Settings, _Text, _url, _word

__all__ = ["MilvusConfig", "is_milvus_uri"]

_SCHEMES = {"milvus": "http", "milvus+http": "http", "milvus+https": "https"}
_PORT = 19530

_ServerUrl = Annotated[
    str, AfterValidator(_url), Allowed("an http:// or https:// address without user name, password or query")
]
_Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$"),
    Allowed("letters, digits and _, no digit first, at most 255 characters"),
]
_Consistency = Annotated[
    Literal["session", "strong", "bounded", "eventually"],
    BeforeValidator(_word),
    Allowed("session, strong, bounded or eventually"),
]


class MilvusConfig(_Settings):
    """Settings of ``MilvusStore``: ``MEMEVOLVE_MILVUS_*``. Immutable; see docs/how-to/milvus.md."""

    def __init__(self, **values: Any) -> None:
        """Make a configuration; see ``StorageConfig`` for ``values`` and errors."""
        super().__init__(**values)

    prefix: ClassVar[str] = "MEMEVOLVE_MILVUS_"
    aliases: ClassVar[Mapping[str, str]] = {}
    secret: ClassVar[frozenset[str]] = frozenset({"token", "uri"})

    uri: _ServerUrl = "http://localhost:19530"
    """Address of the server."""
    token: _Key = None
    """``user:password`` or an API key; never shown."""
    database: _Text = None
    """Name of the database on the server; its default one when not set."""
    collection: _Name = "memevolve"
    """Name of the collection that is the store."""
    consistency: _Consistency = "session"
    """Which writes a search waits for."""
    shards: _Count = 1
    """Shards of a new collection: how many writers work side by side."""
    replicas: _Count = 1
    """Copies in memory, each on query nodes of its own."""
    timeout: _Seconds = 30.0
    """Seconds after which a call gives up, retries included."""

    @classmethod
    def at(cls, uri: str) -> MilvusConfig:
        """Settings for ``milvus://host:port/collection`` (``milvus+https://`` for TLS), the rest from the environment.

        Raises ConfigurationError when the address or the collection's name cannot be used.
        """
        parts = urlsplit(uri)
        if parts.scheme not in _SCHEMES or not parts.hostname or parts.username or parts.query:
            raise ConfigurationError(
                f"{parts.scheme}://...: write milvus://host:port/collection, or milvus+https:// for TLS; "
                "the token goes into MEMEVOLVE_MILVUS_TOKEN"
            )
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        name = unquote(parts.path.strip("/"))
        named = {"collection": name} if name else {}
        return cls().replace(uri=f"{_SCHEMES[parts.scheme]}://{host}:{parts.port or _PORT}", **named)

    @property
    def address(self) -> str:
        """The store as :meth:`at` takes it."""
        parts = urlsplit(self.uri)
        scheme = "milvus+https" if parts.scheme == "https" else "milvus"
        return f"{scheme}://{parts.netloc}/{quote(self.collection)}"

    @property
    def secret_token(self) -> str:
        """The token in the clear, "" when there is none."""
        return self.token.get_secret_value() if isinstance(self.token, SecretStr) else ""


def is_milvus_uri(place: object) -> bool:
    """Does this name a store on a Milvus server, rather than a path?"""
    return isinstance(place, str) and place.split("://", 1)[0] in _SCHEMES and "://" in place
