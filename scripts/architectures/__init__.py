"""Take a tiny random model of every architecture that onnxruntime-genai's builder knows the whole way."""
