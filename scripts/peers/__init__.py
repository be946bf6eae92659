"""Run other quantizers for comparison."""
