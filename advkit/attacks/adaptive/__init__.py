"""Attacks that are made for what stands in front of a model."""
