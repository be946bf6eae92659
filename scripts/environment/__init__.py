"""Make the virtual environment of a clone."""
