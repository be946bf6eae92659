"""Compute half of genai-quant: calibrate a graph, then search quantized weights from the cache."""
