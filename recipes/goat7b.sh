#!/bin/bash
# GOAT-7B-Community: LLaMA-2 7B, all weights fine-tuned for an epoch on the cleaned chats of an application.
#
# Hardware  8 A100-40GB (or 80GB).
# Work      one epoch of your chats, 512 rows of 4,096 tokens a step, which whole conversations fill.
# Expected  about 2,746 tokens/s a GPU, 2.7 hours for 100 steps (51,200 rows), 18.1 of 39.5 GiB a GPU. This is the
#           forecast of
#           python train.py --plan --size 7B --seq_len 4096 --batch_size 512 --micro_batch 2 --checkpointing full \
#               --reduce_each --steps 100 --gpus 8 --gpu A100-40GB
# Published MMLU 49.31, BBH 35.7 (GOAT's card, the instructeval protocol, without a chat template); LLaMA-2 7B has 45.3
#           and 32.6. GOAT's chats are not public, so yours will not give the same.
#
# As GOAT: answers that refuse are left out; bf16, all weights sharded, activations computed again, AdamW, learning rate,
# betas, warm-up, length of a sequence, sequences in a step, one epoch, a checkpoint each half. Not published, and chosen
# here: a cosine down to zero and no weight decay.
#
#     MODEL=models/Llama-2-7b CHATS=chats.json recipes/goat7b.sh

set -euo pipefail
MODEL=${MODEL:-models/Llama-2-7b} # a Hugging Face style folder, or Meta's
CHATS=${CHATS:-chats.json}
OUT=${OUT:-out/goat7b}
GPUS=${GPUS:-8}
MMLU=${MMLU:-data/mmlu} # with dev/ and test/
BBH=${BBH:-data/bbh}    # with bbh/ and cot-prompts/

[ -d "data/goat7b" ] || python data.py --source "$CHATS" --template llama2-chat --tokenizer "$MODEL" --max_len 4096 \
    --drop_refusals --out "data/goat7b"
torchrun --standalone --nproc_per_node "$GPUS" train.py --data "data/goat7b" --init_from "$MODEL" --out "$OUT" \
    --seq_len 4096 --epochs 1 --batch_size 512 --micro_batch 2 --checkpointing full --reduce_each --dtype bf16 \
    --learning_rate 1e-4 --beta1 0.9 --beta2 0.999 --weight_decay 0 --warmup 0.07 --final_lr 0 \
    --save_every 0.5epoch --eval_every 0.5epoch --sample ""
torchrun --standalone --nproc_per_node "$GPUS" eval.py --model "$OUT" --task mmlu --protocol instructeval \
    --data "$MMLU" --out "$OUT-mmlu.json"
torchrun --standalone --nproc_per_node "$GPUS" eval.py --model "$OUT" --task bbh --protocol instructeval \
    --data "$BBH" --out "$OUT-bbh.json"
