"""Build base models, from a hub, a folder, a GGUF file or Python packages."""
