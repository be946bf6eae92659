"""Cut one decoder block out of the ONNX graph and run it as a torch module whose weights can be exchanged."""
