"""Choose the format of every site, by rules or for a budget."""
