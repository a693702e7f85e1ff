"""Whether a number can be believed: diagnostics, indicators, advice."""
