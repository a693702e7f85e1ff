"""Attacks on training labels: each returns the labels with some of them flipped, before anything is trained."""
