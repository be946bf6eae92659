"""Check what a CUDA GPU does with this project: figures beside the aims, in one run of a few minutes."""
