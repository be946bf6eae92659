"""A report that people read in a browser: report.json, and one page made from it alone."""
