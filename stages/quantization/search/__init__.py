"""Search how the weights of one activation group are quantized: AWQ, GPTQ, ranges; pure functions of tensors."""
