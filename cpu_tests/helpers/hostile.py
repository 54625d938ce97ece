"""Calls with every odd value for every parameter."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np

from memevolve_gpu import MemEvolveError

DIM = 8


def deep() -> list[Any]:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


class Odd:
    """Its ``repr`` fails."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    -(10**30),
    10**5000,
    1.5,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    " ",
    "\ud800",
    "a\0b",
    "x" * 300,
    "/" + "y" * 5000,
    b"bytes",
    b"\xff",
    [],
    [[]],
    ["a"],
    [None],
    [b"a"],
    [{"content": 1}],
    ["\ud800"],
    {},
    {"a": 1},
    {1: 2},
    {"\ud800": "\ud800"},
    {"id": "\ud800", "content": "\ud800"},
    {"content": "text", "metadata": {"n": float("nan")}},
    {"type": {"in": [Odd()]}},
    {"type": deep()},
    deep(),
    {"a", "b"},
    range(3),
    object(),
    Odd(),
    lambda *_: None,
    np.array([]),
    np.full((1, DIM), np.nan, np.float32),
    np.ones((2, 3, 4)),
    np.array(["a"]),
    np.array([object()]),
    np.float64("nan"),
    2 + 3j,
    iter([1]),
    Ellipsis,
]


def parameters(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        name: one
        for name, one in inspect.signature(call).parameters.items()
        if name != "self" and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }


def arguments(call: Callable[..., Any], good: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every parameter with every odd value, the others as they should be; and every required one left out."""
    known = parameters(call)
    required = {name: good[name] for name, one in known.items() if one.default is one.empty}
    for name in known:
        for at, value in enumerate(VALUES):
            yield name, at, {**required, name: value}


def told(error: Exception) -> str:
    try:
        return str(error)[:100]
    except Exception as odd:  # noqa: BLE001 - the value that the message would show
        return f"a message that cannot be made: {odd!r}"


def first_ones(call: Callable[..., Any]) -> list[str]:
    """The parameters that can be given by position alone."""
    return [name for name, one in parameters(call).items() if one.kind is one.POSITIONAL_ONLY]


async def taken(result: Any) -> None:
    """Wait for a result, take the first of several, and close it."""
    if inspect.isawaitable(result):
        result = await result
    if isinstance(result, Iterator):
        next(result, None)
    elif isinstance(result, AsyncIterator):
        await anext(result, None)
    elif hasattr(result, "close"):
        closing = result.close()
        if inspect.isawaitable(closing):
            await closing


def walk(
    name: str, call: Callable[..., Any], good: dict[str, Any], allowed: tuple[type[Exception], ...] = (MemEvolveError,)
) -> list[str]:
    """What came out of the calls that is neither a result nor an error of ours, or one that is allowed."""
    loop = asyncio.new_event_loop()  # one for all: to make one costs more than most calls
    try:
        return [wrong for one in arguments(call, good) if (wrong := _odd_end(name, call, one, allowed, loop))]
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _odd_end(
    name: str,
    call: Callable[..., Any],
    one: tuple[str, int, dict[str, Any]],
    allowed: tuple[type[Exception], ...],
    loop: asyncio.AbstractEventLoop,
) -> str:
    """What came out of one call, if that is wrong."""
    parameter, at, given = one
    try:
        result = call(*[given.pop(first) for first in first_ones(call)], **given)
        loop.run_until_complete(taken(result))
    except allowed:
        return ""
    except TypeError as error:
        if "for several ids call" in told(error):  # the one raw error that is promised
            return ""
        return f"{name}({parameter}, value {at}): TypeError: {told(error)}"
    except Exception as error:  # noqa: BLE001 - collected
        return f"{name}({parameter}, value {at}): {type(error).__name__}: {told(error)}"
    return ""
