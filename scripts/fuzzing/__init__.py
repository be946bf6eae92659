"""What scripts.fuzz is made of: mutations of valid files, and the loaders that must refuse what they can't use."""
