"""Keep what the calibration pass computes in files, row by row."""
