#!/usr/bin/env bash
# Format, lint, types, tests: what CI runs. --fast leaves out types and slow tests; what else is given goes to pytest.
# Makes its own .venv; later runs reuse it.
set -euo pipefail
extras=genai,dev
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

fast=
if [ "${1:-}" = --fast ]; then
    fast=yes
    shift
fi

say "format"
ruff format --check .
say "lint"
ruff check .
if [ -z "$fast" ]; then
    say "types"
    mypy
fi
say "tests"
# The models are tiny: one thread for each of two workers is several times faster than two threads that wait for each other.
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile ${fast:+-m "not slow"} "$@"
