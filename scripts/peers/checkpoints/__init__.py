"""Run quantizers of Hugging Face checkpoints, and write their weights into our graph."""
