"""Defenses that are trained by a convex program."""
