"""Tasks of lm-eval, an optional package, on ONNX Runtime."""
