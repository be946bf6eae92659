"""Reach the operating system: files, hardware, processes."""
