"""Attacks that descend the oracle's gradient."""
