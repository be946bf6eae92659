"""Feed damaged files to the loaders."""
