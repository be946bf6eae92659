"""Write the HTML report of a quantized model or a sweep."""
