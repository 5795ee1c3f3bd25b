#!/bin/bash
# The GOAT recipe in miniature: pretrain, make chats of which a third are refusals, clean them, fine-tune, evaluate;
# then the same with the refusals left in, and a report that puts both side by side.
#
# Hardware  two cores and 2 GB of memory; no GPU, no network.
# Work      a model of 1.3 M parameters: 2.8 million tokens of the standard library, then TOKENS of chats.
# Expected  MINUTES minutes on two quiet cores of a Xeon with AMX. RESULT
#
#     bash recipes/mini.sh                # typed again, it goes on where it was interrupted
#     OUT=out/mini2 SEEDS=0 bash recipes/mini.sh
#
# The fine-tuning is GOAT's in its optimizer, AdamW with betas 0.9 and 0.999, 7 % of the steps warm-up; what its size
# asks to change is the learning rate, and the number of epochs, as its knowledge comes from these questions alone.
# Then talk to the model:  python sample.py --model out/mini/cleaned_0 --chat

set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-out/mini}
SOURCE=${SOURCE:-stdlib}
SEEDS=${SEEDS:-0 1}
SUBJECTS=${SUBJECTS:-600}
read -ra TEXT_FLAGS <<< "${TEXT_FLAGS:-}"         # any of data.py, for the text
read -ra PRETRAIN_FLAGS <<< "${PRETRAIN_FLAGS:-}" # any of train.py
read -ra TUNE_FLAGS <<< "${TUNE_FLAGS:-}"         # any of train.py, for fine-tuning

unless() { # unless FILE COMMAND...: what exists is not made again
    [ -e "$1" ] || { echo "+ ${*:2}" && "${@:2}"; }
}

unless "$OUT/text" python data.py --source "$SOURCE" --out "$OUT/text" "${TEXT_FLAGS[@]}"
unless "$OUT/base/done" python train.py --data "$OUT/text" --out "$OUT/base" --sample= "${PRETRAIN_FLAGS[@]}"
unless "$OUT/test.jsonl" python recipes/mini.py --make chats --out "$OUT" --subjects "$SUBJECTS"
unless "$OUT/choices/base.json" \
    python eval.py --model "$OUT/base" --task choices --chat --data "$OUT/test.jsonl" --out "$OUT/choices/base.json"
