"""The kit for a machine with a card, run without one: the smoke test, the parts of cuda_tests, the offline bundle."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def ran(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "src", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=whole, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@needs_torch
def test_each_step_of_the_smoke_test_writes_its_own_line(tmp_path: Path) -> None:
    """A step that fails (faiss on CPU tensors) costs only its own line, and the command says so by its status."""
    out, steps = tmp_path / "smoke.jsonl", ("facts", "query", "kmeans", "faiss", "fork", "routing")
    size = ("--rows", "2000", "--dim", "48")
    done = ran("scripts/gpu-smoke", str(out), "--device", "cpu", *size, "--only", *steps)
    lines = {line["step"]: line.get("found", line) for line in map(json.loads, out.read_text().splitlines())}
    assert tuple(lines) == steps
    assert lines["query"]["finds_itself"] is True
    assert lines["query"]["incidents"] == []
    assert lines["routing"]["device"] == "cpu"
    assert "failed" in lines["faiss"]
    assert lines["fork"]["child"] == 0
    assert done.returncode == 1
    assert ran("scripts/gpu-smoke", str(out), "--device", "cpu", *size, "--only", "query").returncode == 0


@pytest.mark.slow
@needs_torch
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_smoke_test_measures_each_candidate_of_the_kernels(tmp_path: Path) -> None:
    """In Triton's interpreter, so that the lines that only a card runs are run once without one."""
    out = tmp_path / "smoke.jsonl"
    size = ("--rows", "512", "--dim", "48", "--only", "kernels", "sweep")
    done = ran("scripts/gpu-smoke", str(out), "--device", "cpu", *size, TRITON_INTERPRET="1")
    lines = {line["step"]: line.get("found", line) for line in map(json.loads, out.read_text().splitlines())}
    assert done.returncode == 0, lines
    assert lines["kernels"]["gave_way"] == []
    swept = {name: line for name, line in lines["sweep"].items() if name.startswith("many")}
    assert {name.endswith("True)") for name in swept} == {True, False}, "queries that stay in shared memory, and not"
    assert all(line["agrees"] is True for line in swept.values())
    assert {name.split(" by ")[1] for name in lines["sweep"] if " by " in name} == {"torch", "kernel"}


@needs_torch
def test_the_parts_of_the_tests_on_a_card_hold_each_file_once_and_end_in_time() -> None:
    from cuda_tests.conftest import PARTS

    files = sorted(name for part in PARTS.values() for name in part)
    assert files == sorted(path.name for path in (ROOT / "cuda_tests").glob("test_*.py"))
    done = ran("-m", "pytest", "cuda_tests", "--rehearse", "--part", "programs", "--minutes", "0", "-q")
    assert "0 minutes are used up" in done.stdout, done.stdout + done.stderr
    assert "failed" not in done.stdout
    assert "passed" not in done.stdout


def pack_gpu() -> Any:
    loader = importlib.machinery.SourceFileLoader("pack_gpu", str(ROOT / "scripts" / "pack-gpu"))
    spec = importlib.util.spec_from_loader("pack_gpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def test_code_for_other_gpus_is_overwritten_and_the_rest_stays(tmp_path: Path) -> None:
    pack = pack_gpu()

    def entry(kind: int, arch: int, code: bytes) -> bytes:
        return struct.pack("<HHIQIIHHI", kind, 1, 64, len(code), 0, 0, 0, 0, arch).ljust(64, b"\1") + code

    held = entry(2, 80, b"ampere--") + entry(2, 90, b"hopper--") + entry(1, 90, b"ptx-----")
    whole = b"elf" + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(held)) + held + b"end"
    library = tmp_path / "lib.so"
    library.write_bytes(whole)
    assert pack.keep_architecture(library, 90) == 1
    assert library.read_bytes() == whole.replace(b"ampere--", bytes(8)).replace(b"ptx-----", bytes(8))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
def test_the_bridge_hands_every_argument_on(tmp_path: Path) -> None:
    """The stand-in for cuBLAS 13 adds up what it is given; a real one has the same functions."""
    pack = pack_gpu()
    values = ", ".join(f"long a{n}" for n in range(14))
    total = " + ".join(f"{n + 1} * a{n}" for n in range(14))
    source = tmp_path / "cublas.c"
    source.write_text(f"long cublasSgemmEx({values}) {{ return {total}; }}\n")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "libcublas13.so")], check=True)
    pack.compiled(pack.bridge(), "libcublas.so.12", tmp_path)
    os.environ["CUBLAS13"] = str(tmp_path / "libcublas13.so")
    try:
        found = ctypes.CDLL(str(tmp_path / "libcublas.so.12")).cublasSgemmEx
        found.restype, found.argtypes = ctypes.c_long, [ctypes.c_long] * 24
        assert found(*range(10, 24), *[0] * 10) == sum((n + 1) * (n + 10) for n in range(14))
    finally:
        del os.environ["CUBLAS13"]


def test_the_plan_of_four_calls_stands_in_the_first_lines() -> None:
    head = (ROOT / "scripts" / "test-gpu").read_text(encoding="utf-8").splitlines()[:12]
    calls = [line.split("#")[1].split() for line in head if line.startswith("#   scripts/test-gpu")]
    assert [call[1] for call in calls] == ["smoke", "tests", "tests", "bench"]
    parts = {name for call in calls if call[1] == "tests" for name in call[2:]}
    assert parts == {"torch", "faiss", "stores", "programs"}
