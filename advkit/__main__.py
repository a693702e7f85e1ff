"""`python -m advkit` is the `advkit` command."""

from __future__ import annotations

import sys

from advkit.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
