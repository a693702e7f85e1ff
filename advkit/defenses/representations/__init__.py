"""Defenses that change what a model computes inside: its embeddings."""
