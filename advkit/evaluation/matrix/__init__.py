"""The transfer matrix, a grid with several victims: sources x attacks x targets.

plan: from a request to parts; participants: sources, targets, attacks by name; images: made once, kept by content;
answers: of targets, kept likewise; table: every attack on every source; budget: attacks scaled to an equal cost; rates:
figures of decisions; document: matrix.json; api: `advkit.matrix`.
"""

from __future__ import annotations

from advkit.evaluation.matrix.api import Matrix, MatrixRequest, execute, matrix, read_matrix

__all__ = ["Matrix", "MatrixRequest", "execute", "matrix", "read_matrix"]
