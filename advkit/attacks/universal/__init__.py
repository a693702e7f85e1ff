"""One change for many samples, and patches."""
