"""Attacks on language models: tokens put into a slot of the prompt."""
