"""Run the base model once and cache the statistics of every MatMul input."""
