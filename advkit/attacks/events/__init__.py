"""Attacks on spiking victims and on event data."""
