"""Randomized smoothing: defenses whose models vote over noisy copies of an input, with a proven radius."""
