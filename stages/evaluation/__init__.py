"""Judge models on text that calibration never saw, and measure what making them costs."""
