"""Run other quantizers beside ours."""
