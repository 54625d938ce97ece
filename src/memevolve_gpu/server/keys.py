"""API keys: who may call the server, and what for. The file holds hashes only, and is readable by its owner alone."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ConfigurationError
from ..records.file_lock import one_process
from ..utils.arguments import shown
from ..utils.config import namespace_path
from ..utils.drafts import PRIVATE, draft_of, remove_abandoned_drafts, sync_folder
from ..utils.forking import lock

SCOPES = ("read", "write", "admin")
"""read: look and search; write: change units; admin: what concerns the whole file. None includes another."""

_CHECKED_EVERY = 1.0
"""Seconds after which the file is looked at again."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the file holds it.

    Examples:
        >>> from memevolve_gpu.server.keys import Key
        >>> Key("agent", "0" * 64, ("read",), ("org", "alice")).scopes
        ('read',)
    """

    name: str
    digest: str
    """SHA-256 of the token, in hexadecimal. A token has 256 random bits, so a slow hash would add nothing."""
    scopes: tuple[str, ...]
    namespace: tuple[str, ...] = ()
    """The key sees this namespace and those below it as if they were the whole store; empty for all."""
    created_at: float = 0.0
    """Unix time."""


class Keys:
    """The keys of a server, in a JSON file. Keys that are added or removed count within a second, without a restart.

    Examples:
        >>> import tempfile
        >>> from memevolve_gpu.server.keys import Keys
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keys = Keys(f"{folder}/keys.json")
        ...     token = keys.add("agent", ["read", "write"], "org/alice")
        ...     keys.find(token).namespace, keys.find("guessed"), keys.remove("agent")
        (('org', 'alice'), None, True)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the file, or begin without keys.

        Args:
            path: The file; it need not exist.

        Raises:
            ConfigurationError: The file is no file of keys.
        """
        self.path = Path(path)
        self._lock = lock()
        self._looked_at, self._stamp = 0.0, (0, 0)
        self._by_digest: dict[str, Key] = {}
        self._refresh(now=0.0)

    def add(self, name: str, scopes: Iterable[str], namespace: Sequence[str] | str = ()) -> str:
        """Make a key.

        Args:
            name: 1 to 64 letters, digits, dots, dashes and underscores; not in use.
            scopes: Any of :data:`SCOPES`, at least one.
            namespace: The namespace that the key is bound to; empty for the whole store.

        Returns:
            The token, which is shown this once: the file holds its hash.

        Raises:
            ConfigurationError: An argument cannot be used.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise ConfigurationError(f"name must be 1 to 64 letters, digits, dots, dashes, got {shown(name)}")
        chosen = tuple(one for one in SCOPES if one in set(scopes))
        if not chosen or set(scopes) - set(SCOPES):
            raise ConfigurationError(f"scopes must be some of {', '.join(SCOPES)}, got {shown(list(scopes))}")
        token = f"mev_{secrets.token_urlsafe(32)}"
        with self._alone():
            held = self._read()
            if any(key.name == name for key in held):
                raise ConfigurationError(f"name: there is a key {name!r}; remove it first, or choose another name")
            self._write([*held, Key(name, _digest(token), chosen, namespace_path(namespace), time.time())])
        return token

    def remove(self, name: str) -> bool:
        """Revoke a key.

        Args:
            name: Its name.

        Returns:
            False when there is no such key.
        """
        with self._alone():
            held = self._read()
            left = [key for key in held if key.name != name]
            if len(left) < len(held):
                self._write(left)
            return len(left) < len(held)

    def find(self, token: str) -> Key | None:
        """Look a token up.

        Args:
            token: What the caller sent.

        Returns:
            Its key; None when there is none.
        """
        self._refresh(time.monotonic())
        digest = _digest(token)
        key = self._by_digest.get(digest)
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the keys, in the order of their names."""
        with self._lock:
            return iter(sorted(self._read(), key=lambda key: key.name))

    def __bool__(self) -> bool:
        """Return whether there is a key."""
        with self._lock:
            return bool(self._read())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other thread or process changes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, one_process(self.path.with_name(f"{self.path.name}.lock"), wait=True):
            yield

    def _refresh(self, now: float) -> None:
        if now and now - self._looked_at < _CHECKED_EVERY:
            return
        with self._lock:
            self._looked_at = now
            if self._stamp_now() != self._stamp or not now:
                self._read()

    def _stamp_now(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return (0, 0)
        return found.st_mtime_ns, found.st_ino

    def _read(self) -> list[Key]:
        stamp = self._stamp_now()
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))["keys"]
            found = [
                Key(**{**row, "scopes": tuple(row["scopes"]), "namespace": tuple(row["namespace"])}) for row in rows
            ]
        except FileNotFoundError:
            found = []
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{self.path} holds no keys; move it away, or restore it") from error
        self._stamp, self._by_digest = stamp, {key.digest: key for key in found}
        return found

    def _write(self, keys: list[Key]) -> None:
        remove_abandoned_drafts([self.path])
        with draft_of(self.path, PRIVATE) as draft:
            draft.path.write_text(json.dumps({"keys": [asdict(key) for key in keys]}, indent=1), encoding="utf-8")
            os.fsync(draft.handle)
            draft.path.replace(self.path)
        sync_folder(self.path.parent)
        self._read()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
