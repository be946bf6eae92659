"""Convert ONNX operators that onnx2torch lacks."""
