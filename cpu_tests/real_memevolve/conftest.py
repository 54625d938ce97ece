"""Skips what needs the real MemEvolve where it is not there, and prints what was found as a table."""

from __future__ import annotations

from collections.abc import Iterator

import memevolve_kit
import pytest

FOUND: list[tuple[str, str, str]] = []
"""(what, without the drop-in, with it), as the summary prints it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them with the reason where MemEvolve is missing."""
    reason = memevolve_kit.why_not()
    for item in items:
        if item.path.parent.name == "real_memevolve":
            item.add_marker(pytest.mark.memevolve)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table: one line for each thing that was counted."""
    if FOUND:
        terminalreporter.section(f"MemEvolve {memevolve_kit.commit_name()}")
        for row in [("", "its own store", "through the drop-in"), *FOUND]:
            terminalreporter.write_line(f"{row[0]:<50} {row[1]:<20} {row[2]}")


@pytest.fixture
def found() -> list[tuple[str, str, str]]:
    """Rows for the summary."""
    return FOUND


@pytest.fixture
def stub() -> Iterator[memevolve_kit.Stub]:
    """The model services of one test."""
    with memevolve_kit.Stub() as running:
        yield running
