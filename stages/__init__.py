"""Turn a language model's ONNX graph into quantized weights: calibrate, plan, search."""
