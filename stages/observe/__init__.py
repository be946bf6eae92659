"""Watching the base model: token batches, streaming activation statistics, the calibration cache."""
