"""Names for parts: lazy tables, entry points, and the spec grammar `name:key=value,key=value`.

`grammar` takes a spec apart, `fields` reads and writes the values by the annotations of a dataclass, `docs` reads
docstrings, mostly without importing their modules, `outside` tells what a spec would load from elsewhere, `own` loads
what `python:MODULE:NAME` names, `familiar` holds what users of other packages write, and `table` is the registry
itself.
"""

from __future__ import annotations

from advkit.core.registry.docs import FieldInfo, Signature, imported_from, source_file
from advkit.core.registry.familiar import Familiar, bare
from advkit.core.registry.fields import Named, describe_type
from advkit.core.registry.grammar import Argument, ParsedSpec, parse_arguments, parse_spec
from advkit.core.registry.outside import OUTSIDE, outside
from advkit.core.registry.own import imported
from advkit.core.registry.table import Registry

__all__ = [
    "Argument",
    "OUTSIDE",
    "Familiar",
    "FieldInfo",
    "Named",
    "ParsedSpec",
    "Registry",
    "Signature",
    "bare",
    "describe_type",
    "imported",
    "imported_from",
    "outside",
    "parse_arguments",
    "parse_spec",
    "source_file",
]
