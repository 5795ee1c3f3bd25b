#!/bin/bash
# LLaMA-2 7B as a chat model by LoRA, its weights in bf16, on one card of 24 GB: from chats to a
# model that you talk to, and a folder that other programs load. Not run yet on such a card.
#
# Hardware  an RTX 4090. Work: one epoch of your chats, 16 rows of 2,048 tokens a step.
# Expected  about 2,032 tokens/s a GPU, 0.9 hours for 200 steps (3,200 rows),
#           16.1 of 23.5 GiB. This is the forecast of
#           python train.py --plan --size 7B --lora_rank 16 --lora_dropout 0.05 --seq_len 2048 \
#               --batch_size 16 --micro_batch 2 --checkpointing full --steps 200 --gpus 1 \
#               --gpu RTX4090-24GB
#
# Hardware  or an A10G, or an RTX 3090, which is as fast.
# Expected  about 861 tokens/s a GPU, 2.1 hours for 200 steps (3,200 rows),
#           16.1 of 22.0 GiB. This is the forecast of
#           python train.py --plan --size 7B --lora_rank 16 --lora_dropout 0.05 --seq_len 2048 \
#               --batch_size 16 --micro_batch 2 --checkpointing full --steps 200 --gpus 1 \
#               --gpu A10G-24GB
#
# Usual values, of no paper: rank 16, alpha 32, a learning rate of 2e-4 that falls to zero. A few
# thousand chats may want EPOCHS=3. Interrupted and typed again, it goes on.
#
#     MODEL=models/Llama-2-7b CHATS=chats.json recipes/lora7b.sh
#     python sample.py --model out/lora7b --chat          # talk to it
#     vllm serve out/lora7b-hf                            # or any other program that loads folders

set -euo pipefail
MODEL=${MODEL:-models/Llama-2-7b} # a Hugging Face style folder, or Meta's
CHATS=${CHATS:-chats.json}
OUT=${OUT:-out/lora7b}
DATA=${DATA:-data/lora7b}
SEQ_LEN=${SEQ_LEN:-2048}
MICRO_BATCH=${MICRO_BATCH:-2}
EPOCHS=${EPOCHS:-1}
read -ra EXTRA_FLAGS <<< "${EXTRA_FLAGS:-}" # any others of train.py

[ -d "$DATA" ] || python data.py --source "$CHATS" --template llama2-chat --tokenizer "$MODEL" \
    --max_len "$SEQ_LEN" --out "$DATA"
python train.py --data "$DATA" --init_from "$MODEL" --out "$OUT" --lora_rank 16 --lora_alpha 32 \
    --lora_dropout 0.05 --seq_len "$SEQ_LEN" --epochs "$EPOCHS" --batch_size 16 \
    --micro_batch "$MICRO_BATCH" --checkpointing full --dtype bf16 --learning_rate 2e-4 \
    --final_lr 0 --warmup 0.03 --beta2 0.999 --weight_decay 0 --save_every 0.5epoch \
    --eval_every 0.5epoch "${EXTRA_FLAGS[@]}"
[ -d "$OUT-hf" ] || python sample.py --model "$OUT" --export "$OUT-hf" # merged into its base
