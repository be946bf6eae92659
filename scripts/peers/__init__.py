"""Run the competitors."""
