"""Callbacks of the user: told, never obeyed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

__all__ = ["notify"]

_log = logging.getLogger("memevolve_gpu.memory_system")


def notify(callback: Callable[..., Any] | None, *arguments: Any) -> None:
    """Call it, if there is one. What it raises is logged: the work that it is told of is done and stays done."""
    if callback is None:
        return
    try:
        callback(*arguments)
    except Exception:  # noqa: BLE001 - it is the user's and may raise anything
        _log.exception("a callback failed; what it was told of is done all the same")
