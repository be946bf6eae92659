"""What scripts.benchmark measures, one kind of figure a module."""
