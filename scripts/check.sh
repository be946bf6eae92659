#!/usr/bin/env bash
# Format, lint, types, tests: what CI runs. --fast leaves out types and slow tests, --all adds thorough ones (whole
# comparisons with competitors, further variants); what else is given goes to pytest.
# Makes its own .venv; later runs reuse it.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n 's/^# //;2,4p' "$0"
    exit
    ;;
esac
extras=genai,dev
# shellcheck source=scripts/environment/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment/venv.sh"

fast=
chosen="not thorough"
if [ "${1:-}" = --fast ]; then
    fast=yes
    chosen="not slow and not thorough"
    shift
elif [ "${1:-}" = --all ]; then
    chosen=
    shift
fi

say "format"
ruff format --check .
say "lint"
ruff check .
types=
if [ -z "$fast" ]; then
    # Beside the tests: a worker that waits for a process, or has ended before the other, leaves a core to it.
    mypy >"$venv/types.log" 2>&1 &
    types=$!
    trap 'kill "$types" 2>/dev/null || true' EXIT
fi
say "tests"
failed=0
# The models are tiny: one thread for each of two workers is several times faster than two threads that wait for each other.
# Long files come first (tests/conftest.py), so that both workers end at about the same time.
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder ${chosen:+-m "$chosen"} "$@" || failed=$?
if [ -n "$types" ]; then
    say "types"
    wait "$types" || failed=$?
    cat "$venv/types.log"
fi
exit "$failed"
