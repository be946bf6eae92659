"""Write HTML reports: of a quantized model, its evaluations, or a sweep."""
