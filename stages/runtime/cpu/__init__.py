"""Rewrite graphs exactly, so that the CPU can run what was built for other providers."""
