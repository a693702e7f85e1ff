"""Reports: read, checked, merged, compared and shown. Imports no scenario and no torch."""

from __future__ import annotations

from advkit.evaluation.report.document import (
    REPORT_NAME,
    SCHEMA_VERSION,
    Report,
    Row,
    describe_threat,
    environment,
    level_text,
    merge,
    percent,
    schema,
    spell,
    write_atomic,
)

__all__ = [
    "Report",
    "Row",
    "describe_threat",
    "environment",
    "level_text",
    "merge",
    "percent",
    "schema",
    "spell",
    "write_atomic",
    "REPORT_NAME",
    "SCHEMA_VERSION",
]
