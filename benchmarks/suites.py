"""Our suites beside AutoAttack's reference code: `advkit benchmark`, with its options.

python benchmarks/suites.py [--models zoo:NAME,zoo:NAME] [--n 200] [--repetitions 3] [--out docs]
"""

from __future__ import annotations

import sys

from advkit.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["benchmark", "--parts", "suites", *sys.argv[1:]]))
