"""Check a graph that was read, and give it one form: constant matrices are read by MatMuls, whoever wrote it."""
