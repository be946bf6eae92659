#!/usr/bin/env bash
# What a CUDA GPU does with this project, in about 4 minutes of computing: bash scripts/gpu_check.sh [FOLDER]
# Downloads Python packages only. Writes FOLDER/gpu_check.json (default: models/gpu-check) and prints a table; the
# models that it makes are removed. Without a GPU the same steps run on the CPU with tiny shapes.
set -euo pipefail
extras=genai
# shellcheck source=scripts/environment/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment/venv.sh"

exec python -m scripts.benchmarks.gpu --output "${1:-models/gpu-check}"
