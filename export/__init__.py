"""Write quantized weights into the ONNX graph and verify the result."""
