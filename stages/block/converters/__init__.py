"""Torch modules for the operators that onnx2torch lacks: one family of operators a module."""
