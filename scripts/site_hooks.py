"""What mkdocs does to the pages: the repository's other files that they link to, and lists as GitHub reads them.

Pages link to one another and to files outside docs/ by paths that hold in the repository. CONTRIBUTING, CHANGELOG and
SECURITY become pages of the site; other linked files are copied into it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
AS_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
_UP = re.compile(r"\]\(\.\./([^)#\s]+)")
_DOWN = re.compile(r"\]\(docs/")
_ITEM = re.compile(r" *([-*]|\d+\.) ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    from mkdocs.structure.files import File

    for name in AS_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for page in sorted((ROOT / "docs").glob("*.md")):
        for target in _UP.findall(page.read_text(encoding="utf-8")):
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Paths as they are on the site, and lists as Python-Markdown wants them."""
    return _listed(_DOWN.sub("](", _UP.sub(r"](\1", markdown)))


def _listed(markdown: str) -> str:
    """A blank line before a list, and four blanks before a list in a list: GitHub does without and with two."""
    lines: list[str] = []
    fenced = inside = False
    for line in markdown.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        item = not fenced and _ITEM.match(line)
        if item and not inside and lines and lines[-1].strip():
            lines.append("")
        blanks = len(line) - len(line.lstrip())
        lines.append(" " * blanks + line if item and blanks in (2, 4) else line)
        inside = bool(item) or (inside and bool(line.strip()))
    return "\n".join(lines) + "\n"
