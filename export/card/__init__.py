"""Describe an output for people and programs: README.md, a Hugging Face model card, and genai_quant.json."""
