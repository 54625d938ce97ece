"""The real MemEvolve for the tests: a private copy of a checkout, a stub of its model services, and its API server.

``scripts/test-memevolve`` makes the environment and names the checkout. Nothing here leaves the loopback: every address
in the environment of a child is the stub's, and a proxy that nobody listens on takes what would go elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from support import FakeEmbedder

__all__ = [
    "CHECKOUT",
    "COMMIT",
    "DIM",
    "Server",
    "Stub",
    "commit_name",
    "copy_of",
    "digests",
    "environment",
    "outcomes",
    "python_of",
    "why_not",
]

CHECKOUT = os.environ.get("MEMEVOLVE_CHECKOUT", "")
"""A checkout (or a git directory) of MemEvolve-API; conftest.py keeps the variable for these tests."""

COMMIT = os.environ.get("MEMEVOLVE_COMMIT", "")
"""The commit to take; the checked-out one when empty."""

DIM = 96
DEAD_PROXY = "http://127.0.0.1:9"
NEEDED = ("faiss", "fastapi", "uvicorn", "httpx", "dotenv", "yaml", "requests", "pytest_timeout")


def why_not() -> str:
    """Why the real MemEvolve cannot be run here; empty if it can."""
    if not CHECKOUT:
        return "MEMEVOLVE_CHECKOUT names no checkout of MemEvolve-API (scripts/test-memevolve CHECKOUT); CI has none"
    if sys.version_info < (3, 12):
        return "MemEvolve needs Python 3.12: PYTHON=python3.12 scripts/test-memevolve CHECKOUT"
    missing = [name for name in NEEDED if not _installed(name)]
    return f"{', '.join(missing)} of MemEvolve's requirements missing: scripts/test-memevolve" if missing else ""


def copy_of(folder: Path) -> Path:
    """Put the files into ``folder``, with ``.env.example`` as its ``.env``; nobody's keys or data come along."""
    folder.mkdir(parents=True)
    archive = folder.with_suffix(".tar")
    with archive.open("wb") as file:
        subprocess.run([*_git(), "archive", COMMIT or "HEAD"], stdout=file, check=True, timeout=120)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    shutil.copy(folder / ".env.example", folder / ".env")
    return folder


def environment(tree: Path, stub: Stub, **more: str) -> dict[str, str]:
    """What a child of MemEvolve starts with: its settings from ``.env.example``, all services at the stub.

    Addresses say 127.0.0.1: one test of MemEvolve turns ``localhost`` into a machine of its authors.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("MEMEVOLVE_", "OPENAI_", "PYTEST_")) and not name.lower().endswith("_proxy")
    }
    services = ("UPSTREAM", "EMBEDDING", "ENCODER", "MEMORY")
    return {
        **kept,
        **{f"MEMEVOLVE_{name}_BASE_URL": stub.url for name in services},
        **{f"MEMEVOLVE_{name}_API_KEY": "none" for name in services},
        "MEMEVOLVE_EMBEDDING_DIMENSION": str(DIM),
        "MEMEVOLVE_DATA_DIR": str(tree / "data"),
        "MEMEVOLVE_CACHE_DIR": str(tree / "cache"),
        "MEMEVOLVE_LOGS_DIR": str(tree / "logs"),
        "HOME": str(tree),
        "HTTP_PROXY": DEAD_PROXY,
        "HTTPS_PROXY": DEAD_PROXY,
        "http_proxy": DEAD_PROXY,
        "https_proxy": DEAD_PROXY,
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONPATH": str(tree / "src"),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def python_of(dropped_in: bool, *arguments: str) -> list[str]:
    """A Python command line, run through the drop-in or not."""
    return [sys.executable, *(["-m", "memevolve_gpu.dropin"] if dropped_in else []), *arguments]


def digests(folder: Path) -> dict[str, str]:
    """File name to SHA-256 of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Stub:
    """An OpenAI-compatible service on the loopback: models, embeddings by words, chat.

    A prompt of MemEvolve's encoder gets one JSON object whose content is the answer to encode; every other chat gets an
    answer that names the user's last message. ``prompts`` keeps the messages of those others, in order.
    """

    def __init__(self) -> None:
        self.prompts: list[list[dict[str, Any]]] = []
        self.encoded = 0
        self._embed = FakeEmbedder(DIM)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Stub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to one request."""
        if path.endswith("/embeddings"):
            texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
            rows = [{"index": at, "embedding": self._embed.vector(text).tolist()} for at, text in enumerate(texts)]
            return {"object": "list", "model": "stub", "data": rows, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        if path.endswith("/chat/completions"):
            said = self._chat(asked["messages"])
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            return {"id": "stub", "object": "chat.completion", "model": "stub", "choices": [choice], "usage": usage}
        return {"object": "list", "data": [{"id": "stub-model", "object": "model"}]}

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        last = str(messages[-1]["content"])
        experience = re.search(r"^Experience[^\n]*:\n(\{.*?^\})", last, re.DOTALL | re.MULTILINE)
        if experience is None:
            self.prompts.append(messages)
            return f"Answer to the question {last}: measure first, then change one thing."
        self.encoded += 1
        return json.dumps({"type": "lesson", "content": json.loads(experience[1]).get("content", "nothing was said")})

    def _handler(stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(stub.answer(self.path, {}))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._send(stub.answer(self.path, json.loads(body or b"{}")))

            def _send(self, found: dict[str, Any]) -> None:
                body = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class Server:
    """MemEvolve's API server, started by its own ``scripts/start_api.py``; ``log`` is what it prints."""

    def __init__(self, tree: Path, stub: Stub, *, dropped_in: bool, **settings: str) -> None:
        self.port = _free_port()
        self.log = tree / f"server-{self.port}.log"
        settings = {"MEMEVOLVE_API_HOST": "127.0.0.1", "MEMEVOLVE_API_PORT": str(self.port), **settings}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                python_of(dropped_in, "scripts/start_api.py"),
                cwd=tree,
                env=environment(tree, stub, **settings),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Server:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                self.get("/health")
                return self
            time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"MemEvolve's server did not start:\n{self.text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._end(signal.SIGKILL)

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """The JSON answer to GET; text where it is none."""
        return self._ask(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to POST."""
        headers = {"Content-Type": "application/json"}
        return self._ask(
            urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), headers)
        )

    def chat(self, question: str) -> str:
        """One request of a user, as their client would send it."""
        found = self.post(
            "/v1/chat/completions", {"model": "stub", "messages": [{"role": "user", "content": question}]}
        )
        return str(found["choices"][0]["message"]["content"])

    def _ask(self, request: urllib.request.Request) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            body = answer.read().decode()
            return json.loads(body) if "json" in answer.headers.get("Content-Type", "") else body

    def _end(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """(test, passed / failed / skipped) of a JUnit report."""
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        yield (
            f"{case.get('classname')}::{case.get('name')}",
            "failed" if bad else "skipped" if "skipped" in kinds else "passed",
        )


def commit_name() -> str:
    """The commit as git names it, short."""
    show = [*_git(), "log", "-1", "--format=%h of %cs", COMMIT or "HEAD"]
    return subprocess.run(show, capture_output=True, text=True, check=False).stdout.strip()


def _git() -> list[str]:
    """Git in the checkout; in many containers its files belong to another user, and it is only read."""
    source = Path(CHECKOUT).resolve()
    trusted = [argument for folder in (source, source / ".git") for argument in ("-c", f"safe.directory={folder}")]
    return ["git", *trusted, "-C", str(source)]
