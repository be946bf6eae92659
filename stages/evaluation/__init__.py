"""Evaluate models against their base: accuracy on text, generated answers, lm-eval tasks, speed and memory."""
