"""Define the options of every command and what a command prints."""
