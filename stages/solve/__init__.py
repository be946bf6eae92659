"""Choosing quantized weights: pure functions of weights and activation statistics."""
