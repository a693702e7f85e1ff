"""Reports: read, checked, merged, compared, ranked and shown. Imports no scenario and no torch.

document: the report object, loaded and saved; schema: what a document may hold; legacy: version 1.0; render: rows,
sentences, tables, HTML; text: numbers and names as people read them; counts: records counted by how they ended;
merge, compare, leaderboard: several reports.
"""

from __future__ import annotations

from advkit.evaluation.report.document import REPORT_NAME, Report, write_atomic
from advkit.evaluation.report.merge import merge
from advkit.evaluation.report.render import Finding, Row, environment
from advkit.evaluation.report.schema import SCHEMA_VERSION, schema
from advkit.evaluation.report.text import describe_threat, level_text, percent, shorten, spell

__all__ = [
    "Finding",
    "Report",
    "Row",
    "describe_threat",
    "environment",
    "level_text",
    "merge",
    "percent",
    "schema",
    "shorten",
    "spell",
    "write_atomic",
    "REPORT_NAME",
    "SCHEMA_VERSION",
]
