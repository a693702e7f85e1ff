"""Defenses against poisoned labels: each is a way to learn a classifier from labels that may be wrong."""
