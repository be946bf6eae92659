"""Prove that the exported model fuses, computes what it should, and has the right bytes."""
