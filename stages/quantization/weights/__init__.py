"""Store quantized weights, check them, and sum them up."""
