#!/usr/bin/env bash
# Depth scores of a pretrained model beside those of a small model trained here with the same tokenizer, so that both are
# measured on the same sequences and can be compared pair by pair:
#     bash examples/analyze_pretrained.sh MODEL_DIR HELD_OUT_TEXT [OUTPUT]      (default: runs/pretrained)
# MODEL_DIR is any HuggingFace causal language model with its tokenizer, HELD_OUT_TEXT a UTF-8 text file.
# STEPS (150), SAMPLES (64), SEQ_LENGTH (128) and NPROC (2) in the environment change the sizes.
set -euo pipefail
if [[ $# -lt 2 ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
PRETRAINED="$(realpath "$1")"
TEXT="$(realpath "$2")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUTPUT="${3:-runs/pretrained}"
STEPS="${STEPS:-150}"
SCORES=causal,permutation,usefulness,jacobian,similarity,skip,lens,weights,attention,activation

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ sparsecod %s\n' "$*"; bash tools/run_in_venv.sh sparsecod "$@"; }

bash tools/run_in_venv.sh true
rm -rf "$OUTPUT"
mkdir -p "$OUTPUT"

step "1/5 Data: the Python standard library's own text in the pretrained model's tokens"
run data --input stdlib --tokenizer "$PRETRAINED" --output "$OUTPUT/data/stdlib" --val-fraction 0.02

step "2/5 The quickstart's dense model on it"
run train examples/configs/quickstart_dense.yaml "data.prefix=$OUTPUT/data/stdlib" "logging.run_dir=$OUTPUT/quickstart" \
    "train.train_steps=$STEPS" "schedule.lr_warmup_steps=$((STEPS / 8))" --nproc 2

step "3/5 Depth scores and sparsity of both on the same held-out sequences"
for model in pretrained quickstart; do
    source="$OUTPUT/quickstart"
    [[ $model = pretrained ]] && source="$PRETRAINED"
    run analyze "$source" --data "$TEXT" --scores "$SCORES" --samples "${SAMPLES:-64}" \
        --seq-length "${SEQ_LENGTH:-128}" --nproc "${NPROC:-2}" --output "$OUTPUT/analysis/$model"
done

step "4/5 Paired differences: quickstart minus pretrained"
run analyze --compare "$OUTPUT/analysis/pretrained" "$OUTPUT/analysis/quickstart" --output "$OUTPUT/analysis/comparison"

step "5/5 One page with the training run and both analyses"
run report "$OUTPUT/quickstart" "$OUTPUT/analysis/pretrained" "$OUTPUT/analysis/quickstart" --output "$OUTPUT/report.html"
