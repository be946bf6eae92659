"""Explain what lies on disk: models of any quantizer, and this project's own folders."""
