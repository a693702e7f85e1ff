"""What goals share that hold a tensor with an entry per row; it lives in `advkit.core.rows`."""

from __future__ import annotations

from advkit.core.rows import PerRow as PerRow
