"""Decide the formats, search the weights, and store them."""
