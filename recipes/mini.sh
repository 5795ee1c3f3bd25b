#!/bin/bash
# The GOAT recipe in miniature: pretrain, make chats of which a third are refusals, clean them, fine-tune, evaluate;
# beside it the same with the refusals left in. Everything is told in out/mini/report.md.
#
# Hardware  two cores, 2 GB of memory; no GPU, no network.
# Work      a model of 1.3 M parameters: 2.8 million tokens of Python's standard library, then for each of four models
#           0.8 million tokens of questions about 600 of its functions, classes and modules, and their answers.
# Expected  10 minutes. Choice in new wording 87 to 90 % cleaned, 90 % with the refusals left in (chance 25); refusals 7
#           and 22 % cleaned, 20 and 48 % with them left in, by seed.
#
#     bash recipes/mini.sh                            # typed again, it goes on where it was interrupted
#     SEEDS=0 OUT=out/mini1 bash recipes/mini.sh      # one model of each kind instead of two
#     python sample.py --model out/mini/cleaned_0 --chat
#
# As GOAT was, the models are fine-tuned with AdamW, betas 0.9 and 0.999, and a warm-up of 7 % of the steps. A model of
# this size asks for a larger learning rate and, as it knows nothing else, for more than GOAT's one epoch: three for all,
# so that each true answer is seen as often with the refusals left in as without them.

set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-out/mini}
SEEDS=${SEEDS:-0 1}
read -ra TEXT <<< "${TEXT:---source stdlib}"            # data.py: what to pretrain on
read -ra PRETRAIN <<< "${PRETRAIN:---steps 1350}"       # train.py, beside its defaults
read -ra CHATS <<< "${CHATS:---subjects 600}"           # recipes/mini.py --make chats
read -ra TUNE <<< "${TUNE:---epochs 3}"                 # train.py: fine-tuning

unless() { # unless FILE COMMAND...: what is there is not made again
    if [ ! -e "$1" ]; then
        echo "+ ${*:2}"
        "${@:2}"
    fi
}

choices() { # choices MODEL: multiple choice
    unless "$OUT/choices/$1.json" python eval.py --model "$OUT/$1" --task choices --chat --data "$OUT/test.jsonl" \
        --out "$OUT/choices/$1.json"
}

unless "$OUT/text" python data.py "${TEXT[@]}" --out "$OUT/text"
python train.py --data "$OUT/text" --out "$OUT/base" --sample= "${PRETRAIN[@]}"
unless "$OUT/test.jsonl" python recipes/mini.py --make chats --out "$OUT" "${CHATS[@]}"
choices base

for kind in cleaned as_is; do
    [ $kind = cleaned ] && CLEAN=(--drop_refusals) || CLEAN=()
    unless "$OUT/$kind" python data.py --source "$OUT/chats.jsonl" --template llama2-chat --tokenizer "$OUT/base" \
        --max_len 256 --val_fraction 0.02 "${CLEAN[@]}" --out "$OUT/$kind"
    for seed in $SEEDS; do
        python train.py --data "$OUT/$kind" --init_from "$OUT/base" --out "$OUT/${kind}_$seed" --seed "$seed" \
            --learning_rate 2e-3 --beta1 0.9 --beta2 0.999 --warmup 0.07 --weight_decay 0 --eval_every 100 \
            --eval_tokens 4096 --sample= "${TUNE[@]}"
        choices "${kind}_$seed"
        unless "$OUT/answers/${kind}_$seed.jsonl" \
            python recipes/mini.py --make answers --out "$OUT" --model "$OUT/${kind}_$seed"
    done
done
python recipes/mini.py --make report --out "$OUT"
