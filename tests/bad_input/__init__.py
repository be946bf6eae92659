"""Bad input of every kind, one row a case, and the legal input that looks odd."""
