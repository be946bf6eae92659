"""Tools for work in a clone."""
