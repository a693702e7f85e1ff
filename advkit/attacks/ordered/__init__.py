"""Attacks that order classes at the top of the answer, as near to the row as they can (arXiv 2312.11510)."""
