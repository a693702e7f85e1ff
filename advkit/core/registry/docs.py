"""What docstrings say of a part, read from the source where that will do, without importing it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FieldInfo:
    """A field as `advkit show` prints it; default is None where the field must be given."""

    name: str
    type: str
    default: str | None
    doc: str


@dataclass(frozen=True)
class Signature:
    """What a registered name stands for.

    doc:    the class docstring
    papers: arXiv identifiers that the module and class docstrings cite, in order
    """

    kind: str
    name: str
    target: str
    summary: str
    doc: str
    papers: tuple[str, ...]
    fields: tuple[FieldInfo, ...]


def source_file(module: str) -> Path | None:
    """The file of a module, found without importing its parent packages."""
    top, *rest = module.split(".")
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if found is None:
        return None
    if not rest:
        return Path(found.origin) if found.origin and found.origin.endswith(".py") else None
    for folder in found.submodule_search_locations or ():
        base = Path(folder, *rest)
        for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def glimpse(module: str, attribute: str) -> str:
    """The docstring of a class, parsed without the rest of its file; "" where that is not enough to find it.

    Listing every name parses every file otherwise, which is most of the time that `advkit list` takes.
    """
    path = source_file(module)
    try:
        source = path.read_text(encoding="utf-8") if path else ""
    except (OSError, ValueError):
        return ""
    start = re.search(rf"^(?:class|def) {re.escape(attribute)}\b", source, re.MULTILINE)
    if start is None:
        return ""
    opening = source.find('"""', start.start())
    closing = source.find('"""', opening + 3)
    try:
        node = ast.parse(source[start.start() : closing + 3]).body[0]
    except (SyntaxError, ValueError, IndexError):
        return ""
    return (ast.get_docstring(node) or "") if isinstance(node, ast.ClassDef | ast.FunctionDef) else ""


def imported_from(node: ast.ImportFrom, module: str) -> str:
    """The full name of the module that an import statement of another one names."""
    if not node.level:
        return node.module or ""
    path = source_file(module)
    package = module if path and path.name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return ".".join(filter(None, (package, node.module)))


def docstrings(module: str, attribute: str, hops: int = 4) -> tuple[str, str]:
    path = source_file(module)
    if path is None:
        return "", ""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return "", ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return ast.get_docstring(tree) or "", ast.get_docstring(node) or ""
    for node in tree.body:  # re-exported: follow the import to where the class is written
        if isinstance(node, ast.ImportFrom) and hops:
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    return docstrings(imported_from(node, module), alias.name, hops - 1)
    return ast.get_docstring(tree) or "", ""


_FIELD = r"(?:[a-z]\w*|[A-Z])"
"""How a field may be called: a word, or one capital letter, such as the C of a support vector machine."""


def field_docs(cls: type) -> dict[str, str]:
    """`name: meaning` paragraphs of the class docstrings; a deeper indented line goes on with the one above."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        names: list[str] = []
        indent = 0
        for line in inspect.cleandoc(base.__doc__).splitlines() if base.__doc__ else ():
            start = re.match(rf"(\s*)({_FIELD}(?:, {_FIELD})*):\s+(\S.*)", line)
            depth = len(line) - len(line.lstrip())
            if start and (not names or depth <= indent):
                names = [name for name in start[2].split(", ") if name not in found]
                indent = depth
                found.update(dict.fromkeys(names, start[3].strip()))
            elif names and line.strip() and depth > indent:
                found.update({name: f"{found[name]} {line.strip()}" for name in names})
            else:
                names = []
    return found
