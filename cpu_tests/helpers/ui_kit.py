"""A small memory to look at, a server for it on a free port, and a headless Chromium."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = os.environ.get("TEST_CHROMIUM") or "/usr/bin/chromium"

MARKUP = "<script>window.broken = true</script><img src=x onerror='window.broken = true'> & \"quoted\""
"""The content of one unit, which must be seen as it is."""

_TOPICS = {
    ("lesson", "git"): """
        Rebase onto main before you push, so that the history stays straight.
        Never rebase a branch that others have already pulled.
        A merge commit keeps the review together; squash only small branches.
        Run git bisect with the failing test to find the commit that broke it.
        git reflog brings back a branch that was deleted by mistake.
        Write the reason for a change in the commit message, because the diff shows what changed.
        Keep generated files out of the repository, or every merge conflicts.
        Use git worktree to review a branch without touching your own checkout.
        Sign the tags of a release, and push them only after the build is green.""",
    ("skill", "python"): """
        Profile with cProfile before you rewrite a loop in Python.
        Use a generator when the list of rows does not fit into memory.
        Pin the versions of the dependencies in the lock file of the application.
        pathlib joins paths on every system, string concatenation does not.
        A dataclass with slots needs half the memory of a plain object.
        Close a pool of processes in a finally block, else the tests hang.
        Catch the narrowest exception and let the others reach the caller.
        Compare floating point numbers with a tolerance in tests.
        Type hints on public functions catch most wrong arguments before they run.""",
    ("tool", "database"): """
        EXPLAIN QUERY PLAN shows whether SQLite uses the index.
        Put all inserts of a batch into one transaction; it is a hundred times faster.
        The connection pool has 20 connections; ask for a timeout of 5 seconds.
        The connection pool has 50 connections; ask for a timeout of 5 seconds.
        Take a backup before each migration of the schema, and try to restore it.
        A partial index on open orders is small and answers the dashboard query.
        Vacuum the table after a large delete, or the file does not shrink.
        Store times as UTC and convert them where they are shown.
        Use keyset pagination for long listings; OFFSET reads all the rows before it.""",
    ("lesson", "operations"): """
        Always retry the payment call when it times out.
        Never retry the payment call when it times out.
        Alert on the error rate that users see, not on the load of a machine.
        Roll back first and look for the cause afterwards.
        Drain the node before the kernel update, one node at a time.
        Rotate the API keys every 90 days and revoke the old ones.
        The disk fills up when the log rotation fails; watch it at 80 percent.
        A canary deployment takes 5 percent of the traffic for ten minutes.
        Write down the steps of an incident while it lasts.""",
    ("abstraction", "planning"): """
        Split a task until each step can be checked by one command.
        Ask for the goal when a request names only a solution.
        Try the cheapest experiment that could prove the plan wrong.
        State what is known, what is assumed and what is open before acting.
        Stop after two failed attempts of the same kind and change the approach.
        Prefer a reversible decision now over a perfect one next week.
        Read the error message to its end before searching for it.
        Summarise long documents section by section, and keep the source of each statement.""",
    ("lesson", "user"): """
        The user prefers short answers with one example.
        The user likes short answers with one example.
        Dates are written as day, month, year in this team.
        Meetings are on Tuesday morning; reminders go out on Monday.
        The staging server is rebuilt every night at two o'clock.
        Reports are wanted as a table first and as text below it.
        The user travels by train and wants connections with few changes.
        Answer in German when the question is in German.""",
}


def units() -> list[dict[str, Any]]:
    """Units of several types and topics, with a conflict, near-duplicates and one text that looks like markup."""
    old = {"created_at": "2025-01-01T09:00:00Z"}
    odd = {"id": "odd/<b>id</b>?&#", "type": "tool", "content": MARKUP, "tags": ["<i>tag</i>"], "metadata": old}
    made = [odd]
    for (kind, topic), text in _TOPICS.items():
        for i, line in enumerate(text.strip().splitlines(), 1):
            made.append({
                "id": f"{topic}-{i}", "type": kind, "content": line.strip(), "tags": [topic],
                "metadata": {"created_at": f"2026-{1 + i:02}-{10 + len(topic):02}T09:00:00Z", "score": i / 10},
            })  # fmt: skip
    return made


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an application on a free port of the loopback; gives its address."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
