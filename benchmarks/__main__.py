"""`python -m benchmarks` (or `make bench`): the benchmarks that need nothing but this repository.

Each is a module of its own with flags of its own; docs/benchmarks.md says what they measure.
"""

from __future__ import annotations

import subprocess
import sys

MODULES = ("service_overhead", "memory_overhead", "compare")


def main() -> int:
    """One after the other, never side by side: they would measure each other."""
    failed = 0
    for module in MODULES:
        print(f"\n== benchmarks.{module}", flush=True)
        failed |= subprocess.run([sys.executable, "-m", f"benchmarks.{module}"]).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
