"""Measure the parts of a benchmark."""
