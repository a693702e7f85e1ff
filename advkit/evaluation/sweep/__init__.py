"""Sweeps: a grid of evaluations, resolved to a list of commands that any queue can run.

grid: the file, and the cells it stands for; plan: cells to lines, each a command with a digest and a folder; line: one
of them, carried out; shards: large cells cut by samples and joined; engines: who carries lines out; driver: rounds,
retries, quarantine; table: what came out, from the files alone; curve: robust accuracy over radii; api: `advkit.sweep`.
"""

from __future__ import annotations

from advkit.evaluation.sweep.api import Sweep, sweep
from advkit.evaluation.sweep.curve import Curve, radii

__all__ = ["Curve", "Sweep", "radii", "sweep"]
