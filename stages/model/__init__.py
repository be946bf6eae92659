"""Read the base model: its folder, its graph, its weights."""
