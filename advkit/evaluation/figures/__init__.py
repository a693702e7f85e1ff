"""Plots of reports and records."""
