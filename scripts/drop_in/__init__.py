"""Accept the command line of the tool that this project replaces."""
