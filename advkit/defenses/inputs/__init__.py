"""Defenses that change the input before the model sees it."""
