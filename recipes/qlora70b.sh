#!/bin/bash
# LLaMA-2 70B as a chat model by QLoRA (Dettmers et al. 2023, arXiv:2305.14314), 32 sequences a step.
#
# Hardware  8 A100-40GB. Work: 1,000 steps of 32 × 4,096 tokens.
# Expected  about 376 tokens/s a GPU, 12.1 hours, 17.4 of 39.5 GiB a GPU. This is the forecast of
#           python train.py --plan --size 70B --lora_rank 64 --lora_dropout 0.05 --quantize nf4 --checkpointing full \
#               --seq_len 4096 --batch_size 32 --micro_batch 1 --steps 1000 --gpus 8 --gpu A100-40GB
#
# Hardware  or one GPU of 48 GB, half as many tokens: GPUS=1 LORA_RANK=16 SEQ_LEN=2048 recipes/qlora70b.sh
# Expected  about 196 tokens/s a GPU, 93.1 hours, 42.3 of 47.5 GiB. This is the forecast of
#           python train.py --plan --size 70B --lora_rank 16 --lora_dropout 0.05 --quantize nf4 --checkpointing full \
#               --seq_len 2048 --batch_size 32 --micro_batch 1 --steps 1000 --gpus 1 --gpu A6000-48GB
#
# Published the paper's settings for 65B, with its batch doubled; it has no 70B to compare with.
#
#     MODEL=/models/Llama-2-70b-hf DATA=data/oasst recipes/qlora70b.sh

MODEL=${MODEL:?a folder with the weights of LLaMA-2 70B}
DATA=${DATA:?a folder made by data.py}
OUT=${OUT:-out/qlora70b}
GPUS=${GPUS:-8}
SEQ_LEN=${SEQ_LEN:-4096}
LORA_RANK=${LORA_RANK:-64}
STEPS=${STEPS:-1000}
read -ra EXTRA_FLAGS <<< "${EXTRA_FLAGS:-}" # any others of train.py

torchrun --standalone --nproc_per_node "$GPUS" \
    train.py --init_from "$MODEL" --data "$DATA" --out "$OUT" --lora_rank "$LORA_RANK" --lora_alpha 16 \
    --lora_dropout 0.05 --quantize nf4 --seq_len "$SEQ_LEN" --pack --batch_size 32 --micro_batch 1 \
    --steps "$STEPS" --checkpointing full --learning_rate 1e-4 --final_lr 1 \
    --warmup 0.03 --beta2 0.999 --weight_decay 0 --grad_clip 0.3 "${EXTRA_FLAGS[@]}"
