"""Verify that an exported model fuses, computes what it should, and has the right bytes."""
