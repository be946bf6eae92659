"""Build base models from packages, and models of any size and family."""
