"""Run decoder blocks as torch modules: found in the graph, cut out, converted and chained."""
