"""Command lines around the two stages: base models, accuracy, generation. Run as ``python -m scripts.NAME``."""
