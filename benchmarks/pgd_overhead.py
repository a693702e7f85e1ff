"""PGD's loop beside the bare passes it makes, and dispatcher operations per step: `advkit benchmark` without suites.

python benchmarks/pgd_overhead.py [--out FOLDER]
"""

from __future__ import annotations

import sys

from advkit.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["benchmark", "--parts", "overhead,ops", *sys.argv[1:]]))
