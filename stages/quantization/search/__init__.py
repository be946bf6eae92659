"""Quantize the weights of one activation group: pure functions of tensors."""
