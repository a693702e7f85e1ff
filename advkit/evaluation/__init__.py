"""Scenarios, harness, verdict, store, statistics and reports: where numbers are made."""
