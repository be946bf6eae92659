"""Reading the base graph: load it lazily, find its MatMul sites, run it with those inputs tapped."""
