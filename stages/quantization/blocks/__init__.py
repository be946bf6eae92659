"""Tune quantized weights by the output of whole decoder blocks, which run as torch modules."""
