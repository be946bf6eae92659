"""Format half of genai-quant: write quantized weights into an ONNX graph. Knows no algorithm."""
