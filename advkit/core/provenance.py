"""Which code ran: the commit of the checkout that advkit was imported from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def checkout(*folders: str) -> tuple[str | None, bool | None]:
    """The commit, and whether tracked files (of these folders alone, where any are named) differ from it.

    None twice where advkit does not run from a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        told = _git(root, "status", "--porcelain=v2", "--branch", "-uno", "--", *folders).splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, None
    heads = dict(line.split(" ")[1:3] for line in told if line.startswith("# "))
    commit = heads.get("branch.oid", "(initial)")
    return (None, None) if commit == "(initial)" else (commit, any(not line.startswith("#") for line in told))


def commit_text(*folders: str) -> str:
    """The same in one word for files of results: "-dirty" marks a difference, "unknown" stands for no checkout."""
    commit, dirty = checkout(*folders)
    return "unknown" if commit is None else f"{commit}-dirty" if dirty else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
