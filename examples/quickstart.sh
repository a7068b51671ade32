#!/usr/bin/env bash
# From nothing to two trained, exported, evaluated and analysed models and a plot of their layer variance, on a laptop's CPU:
#     bash examples/quickstart.sh [OUTPUT]              (default: runs/quickstart; an earlier result there is replaced)
# STEPS=20 DOCUMENTS=400 QUESTIONS=20 bash examples/quickstart.sh is a shorter look at the same path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT="${1:-runs/quickstart}"
STEPS="${STEPS:-150}"
DOCUMENTS="${DOCUMENTS:-1000000}" # more than there are
QUESTIONS="${QUESTIONS:-100}"
DATA="$OUTPUT/data/stdlib"

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ sparsecod %s\n' "$*"; bash tools/run_in_venv.sh sparsecod "$@"; }
train() { # NAME: half of the steps, then the same command again, which resumes
    local options=(
        "examples/configs/quickstart_$1.yaml" "data.prefix=$DATA" "logging.run_dir=$OUTPUT/$1" "logging.log_interval=10"
        "train.train_steps=$STEPS" "schedule.lr_warmup_steps=$((STEPS / 8))" "checkpoint.save_interval=$((STEPS / 2))"
    )
    run train "${options[@]}" "train.exit_step=$((STEPS / 2))" --nproc 2
    run train "${options[@]}" --nproc 2
}

bash tools/run_in_venv.sh true
rm -rf "$OUTPUT"
mkdir -p "$OUTPUT"

step "1/7 Data: the Python standard library's own text, and a tokenizer learnt from it"
run data --input stdlib --tokenizer train:4096 --output "$DATA" --val-fraction 0.02 --max-documents "$DOCUMENTS"

step "2/7 A dense model with grouped-query attention, tensor parallel over 2 processes, stopped and resumed half-way"
train dense

step "3/7 The same model as a mixture of 8 experts, expert parallel over 2 processes, stopped and resumed half-way"
train moe

for model in dense moe; do
    step "4/7 $model: a HuggingFace directory, its logits compared with Megatron's before it is published"
    run export --checkpoint "$OUTPUT/$model" --output "$OUTPUT/$model-hf"
done

for model in dense moe; do
    step "5/7 $model: perplexity on held-out text, and which of four continuations is the true one"
    run eval --model "$OUTPUT/$model-hf" --perplexity "${DATA}_val" --continuation-task "${DATA}_val" \
        --questions "$QUESTIONS" --limit "$QUESTIONS" --output "$OUTPUT/$model-eval"
done

for model in dense moe; do
    step "6/7 $model: depth scores of the exported model: what each layer changes, and what is lost without it"
    run analyze "$OUTPUT/$model-hf" --data "${DATA}_val" --scores causal,usefulness,skip,similarity \
        --samples 16 --seq-length 128 --output "$OUTPUT/$model-depth"
done

step "7/7 Variance by depth, dense against mixture of experts"
run report "$OUTPUT/dense" "$OUTPUT/moe" --output "$OUTPUT/variance_by_depth.png"
run report "$OUTPUT"/{dense,moe,dense-depth,moe-depth} --output "$OUTPUT/report.html"

step "What was learnt"
bash tools/run_in_venv.sh python3 - "$OUTPUT" <<'PYTHON'
import json, pathlib, sys

output = pathlib.Path(sys.argv[1])
for name in ("dense", "moe"):
    losses = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
    layers = json.loads((output / name / "layer_statistics.jsonl").read_text().splitlines()[-1])["layers"]
    first, last = losses[0], losses[-1]
    print(
        f"{name:>6}: loss {first['loss']:.2f} -> {last['loss']:.2f} ({first['loss'] - last['loss']:.2f} nats lower), held-out "
        f"{last['validation_loss']:.2f}; variance of the residual stream {layers[0]['out_var']:.3f} after layer 0, "
        f"{layers[-1]['out_var']:.3f} after layer {len(layers) - 1}"
    )
PYTHON
cat <<END

Everything lies in $OUTPUT:
  dense/ moe/                     run directories: config.yaml metrics.jsonl layer_statistics.jsonl checkpoints/ log.txt
  dense-hf/ moe-hf/               models for AutoModelForCausalLM.from_pretrained, with their tokenizer
  dense-eval/ moe-eval/           results.json and results.md
  dense-depth/ moe-depth/         scores.json, one CSV per score, plots/
  variance_by_depth.png           the plot
  report.html                     every curve and score, offline by double click
Next: examples/configs/ holds the paper's models; sparsecod train CONFIG a.b=c --nproc N trains them.
END
