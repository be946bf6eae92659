"""Run llama.cpp's own quantizer and the model that it makes."""
