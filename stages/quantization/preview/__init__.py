"""Forecast bytes, memory and seconds of a run, for --dry_run."""
