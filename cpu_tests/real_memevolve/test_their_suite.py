"""MemEvolve's own tests on our store: what passes on its own store passes on ours."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from pathlib import Path

from memevolve_kit import Stub, copy_of, environment, outcomes, python_of
from support import SEED

STORE_TESTS = "tests/test_vector_store.py"


def run_suite(folder: Path, stub: Stub, *tests: str, dropped_in: bool) -> dict[str, str]:
    """Outcome by test of one run in a fresh copy, so that no run sees what another left."""
    tree = copy_of(folder)
    report = folder / "report.xml"
    options = ["-q", "--continue-on-collection-errors", "--timeout=120", "-p", "no:cacheprovider"]
    command = python_of(dropped_in, "-m", "pytest", *tests, *options, f"--junitxml={report}")
    done = subprocess.run(
        command, cwd=tree, env=environment(tree, stub), capture_output=True, text=True, timeout=900, check=False
    )
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    (folder / "output.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return dict(outcomes(report))


def counts(outcome: dict[str, str]) -> str:
    found = Counter(outcome.values())
    return f"{found['passed']} of {found.total()} pass"


def node_id(name: str) -> str:
    """What pytest calls the test that its report calls ``name``."""
    where, _, test = name.partition("::")
    folder, module, *classes = where.split(".")
    return "::".join([f"{folder}/{module}.py", *classes, test])


def unstable(folder: Path, stub: Stub, names: list[str]) -> set[str]:
    """Those of the tests that fail on its own store as well, in one of ten more runs: their outcome is chance."""
    found: set[str] = set()
    for turn in range(10):
        if found == set(names):
            break
        again = run_suite(folder / str(turn), stub, *map(node_id, names), dropped_in=False)
        found |= {name for name in names if again[name] != "passed"}
    return found


def test_nothing_that_passes_without_the_drop_in_fails_with_it(
    tmp_path: Path, stub: Stub, found: list[tuple[str, str, str]]
) -> None:
    theirs = run_suite(tmp_path / "theirs", stub, "tests", dropped_in=False)
    ours = run_suite(tmp_path / "ours", stub, "tests", dropped_in=True)
    suspects = sorted(name for name, how in theirs.items() if how == "passed" and ours.get(name) != "passed")
    chance = unstable(tmp_path / "again", stub, suspects)
    broken = [name for name in suspects if name not in chance]
    mended = sorted(name for name, how in ours.items() if how == "passed" and theirs.get(name) != "passed")
    found.append(("its own tests", counts(theirs), counts(ours)))
    found.append(("  pass on this side only", str(len(broken)), str(len(mended))))
    found += [(f"  by chance: {name.partition('::')[2]}", "passes, or fails", "fails, or passes") for name in chance]
    for name in mended:
        print(f"passes with the drop-in only: {name}")
    assert Counter(theirs.values())["passed"] > 200, "its suite did not run"
    assert broken == []


def test_its_tests_of_the_store_pass_in_any_order(
    tmp_path: Path, stub: Stub, found: list[tuple[str, str, str]]
) -> None:
    in_order = run_suite(tmp_path / "in_order", stub, STORE_TESTS, dropped_in=True)
    shuffled = [node_id(name) for name in in_order]
    found.append((f"{STORE_TESTS}, in file order", "", counts(in_order)))
    worst: dict[str, str] = {}
    for turn in range(3):
        random.Random(SEED + turn).shuffle(shuffled)
        outcome = run_suite(tmp_path / f"shuffled_{turn}", stub, *shuffled, dropped_in=True)
        assert outcome.keys() == in_order.keys()
        worst = {**outcome, **{name: how for name, how in worst.items() if how != "passed"}}
    found.append((f"{STORE_TESTS}, in 3 shuffled orders", "", counts(worst)))
    assert len(in_order) > 20, "its tests of the store did not run"
    assert set(in_order.values()) | set(worst.values()) == {"passed"}, {
        name for name in in_order if (in_order[name], worst[name]) != ("passed", "passed")
    }
