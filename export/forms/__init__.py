"""Build the nodes that hold quantized weights."""
