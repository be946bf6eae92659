"""Convert the ONNX operators that onnx2torch lacks to torch modules."""
