"""Run graphs in ONNX Runtime and onnxruntime-genai."""
