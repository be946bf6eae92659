"""Read quantized Hugging Face checkpoints, and find the graph's weights in them."""
