"""Keep measured results in docs/results and write them into pages as tables."""
