#!/usr/bin/env bash
# Format, lint, types, tests: what CI runs. Makes its own .venv; later runs reuse it.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

say "format"
ruff format --check .
say "lint"
ruff check .
say "types"
mypy
say "tests"
# The models are tiny: one thread for each of two workers is several times faster than two threads that wait for each other.
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile "$@"
