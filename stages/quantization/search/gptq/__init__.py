"""Compensate rounding errors: GPTQ, and coordinate descent on what it found."""
