"""Packages for parts of one's own: `init_attack` and `init_defense` write one, with its tests."""

from __future__ import annotations

from advkit.skeleton.package import Package, init_attack, init_defense

__all__ = ["Package", "init_attack", "init_defense"]
