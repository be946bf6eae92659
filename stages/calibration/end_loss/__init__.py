"""Statistics in which each token counts as much as an error there changes the model's answers."""
