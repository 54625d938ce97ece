"""Let two processes write, search and read each other's units: count what was lost, and time how long writes waited.

    python benchmarks/two_processes.py [--seconds 60] [--processes 2] [--seed 1]

The harness is the one of the tests. ``write_waiting_ms``: from the call that begins a write transaction to its begin,
over every write of every process. ``lost``, ``doubled``, ``missed`` and ``lock_errors`` must be 0 or empty.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cpu_tests" / "helpers"))

from writers import main

if __name__ == "__main__":
    main()
