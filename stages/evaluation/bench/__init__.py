"""Make and judge many quantized models of one base."""
