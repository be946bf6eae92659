"""Store quantized weights on disk, check them when they are read, and sum up what a search chose."""
