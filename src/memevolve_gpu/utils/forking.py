"""What a forked child must set right: locks held by threads that it does not have."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["AfterFork", "renew_in_child"]


class AfterFork(Protocol):
    """Something that lives on in a forked child."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""


_watched: weakref.WeakSet[AfterFork] = weakref.WeakSet()


def renew_in_child(one: AfterFork) -> None:
    """Have ``one.after_fork()`` called in every child forked while ``one`` is alive."""
    _watched.add(one)


def _in_child() -> None:
    for one in list(_watched):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
