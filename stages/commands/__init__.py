"""Define every command's options, run it, and print its results, progress and messages."""
