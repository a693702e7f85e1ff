"""Attacks that only ask for answers."""
