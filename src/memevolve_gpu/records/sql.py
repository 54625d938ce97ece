"""Two ways to read: a row, or every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw

__all__ = ["all_rows", "first_row"]


def all_rows(con: apsw.Connection, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
    """Every row of a query, as tuples."""
    return con.execute(sql, parameters).fetchall()


def first_row(con: apsw.Connection, sql: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
    """The first row of a query that has one, read to its end, so that no statement stays open."""
    return con.execute(sql, parameters).fetchall()[0]
