"""Keep measured results in docs/results and write them into README and docs/ as tables."""
