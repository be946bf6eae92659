"""``python -m genai_quant``: the same as the console command ``genai-quant``."""

from __future__ import annotations

from genai_quant.command import main

if __name__ == "__main__":
    main("python -m genai_quant")
