#!/bin/bash
# LIMA: a LLaMA-1, all weights fine-tuned for fifteen epochs on 1,000 chosen examples.
#
# Hardware  8 A100-80GB, for 7B. The paper's main model is the 65B.
# Work      229 steps of 24 rows of 2,048 tokens. The paper's 750,000 tokens are 2.7 examples a row, so that 24 rows are
#           the 64 examples of the paper's step for small models; for 65B it has 32.
# Expected  about 2,948 tokens/s a GPU, 0.1 hours in all, 15.7 of 79.2 GiB a GPU. This is the forecast of
#           python train.py --plan --size 7B --seq_len 2048 --batch_size 24 --micro_batch 3 --checkpointing full \
#               --steps 229 --gpus 8 --gpu A100-80GB
# Published no MMLU or BBH. People found the answers of the 65B as good as or better than GPT-4's in 43 %, Bard's in
#           58 % and DaVinci003's in 65 % of 300 prompts.
#
# As the paper: AdamW, learning rate from 1e-5 linearly to 1e-6 without a warm-up, betas, weight decay, length. Left
# out: residual dropout, which LLaMA does not have, and the choice of the checkpoint by hand.
#
#     MODEL=models/llama-7b CHATS=lima.jsonl recipes/lima.sh

set -euo pipefail
MODEL=${MODEL:-models/llama-7b} # a Hugging Face style folder, or Meta's
CHATS=${CHATS:-lima.jsonl}
OUT=${OUT:-out/lima}
GPUS=${GPUS:-8}
MMLU=${MMLU:-data/mmlu} # with dev/ and test/
BBH=${BBH:-data/bbh}    # with bbh/ and cot-prompts/

[ -d "data/lima" ] || python data.py --source "$CHATS" --template plain --tokenizer "$MODEL" --max_len 2048 \
    --out "data/lima"
torchrun --standalone --nproc_per_node "$GPUS" train.py --data "data/lima" --init_from "$MODEL" --out "$OUT" \
    --seq_len 2048 --epochs 15 --batch_size 24 --micro_batch 3 --checkpointing full --dtype bf16 \
    --learning_rate 1e-5 --schedule linear --final_lr 0.1 --warmup 0 --beta1 0.9 --beta2 0.95 --weight_decay 0.1 \
    --save_every 5epoch --eval_every 1epoch --sample ""
torchrun --standalone --nproc_per_node "$GPUS" eval.py --model "$OUT" --task mmlu --protocol instructeval \
    --data "$MMLU" --out "$OUT-mmlu.json"
torchrun --standalone --nproc_per_node "$GPUS" eval.py --model "$OUT" --task bbh --protocol instructeval \
    --data "$BBH" --out "$OUT-bbh.json"
