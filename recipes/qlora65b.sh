#!/bin/bash
# LLaMA-1 65B as a chat model by QLoRA, after Guanaco (Dettmers et al. 2023, arXiv:2305.14314, appendix B): rank 64,
# alpha 16, all matrices of the blocks, 16 sequences a step, a constant learning rate of 1e-4, dropout 0.05.
#
# Hardware  8 A100-40GB. Work: 1,875 steps of 16 × 512 tokens.
# Expected  about 432 tokens/s a GPU, 1.2 hours, 8.6 of 39.5 GiB a GPU. This is the forecast of
#           python train.py --plan --size 65B --lora_rank 64 --lora_dropout 0.05 --quantize nf4 --checkpointing full \
#               --seq_len 512 --batch_size 16 --micro_batch 2 --steps 1875 --gpus 8 --gpu A100-40GB
#
# Hardware  or one GPU of 48 GB: GPUS=1 MICRO_BATCH=1 LORA_RANK=32 recipes/qlora65b.sh
# Expected  about 214 tokens/s a GPU, 19.9 hours, 40.6 of 47.5 GiB. This is the forecast of
#           python train.py --plan --size 65B --lora_rank 32 --lora_dropout 0.05 --quantize nf4 --checkpointing full \
#               --seq_len 512 --batch_size 16 --micro_batch 1 --steps 1875 --gpus 1 --gpu A6000-48GB
#           With rank 64 it is 1.1 GiB too much: adapters, their gradients and moments are fp32, 16 bytes a parameter.
#
# Published QLoRA trains 65B on one GPU of 48 GB; the paper has the scores of Guanaco 65B.
#
#     MODEL=/models/llama-65b DATA=data/oasst recipes/qlora65b.sh

MODEL=${MODEL:?a folder with the weights of LLaMA 65B}
DATA=${DATA:?a folder made by data.py}
OUT=${OUT:-out/qlora65b}
GPUS=${GPUS:-8}
MICRO_BATCH=${MICRO_BATCH:-2}
LORA_RANK=${LORA_RANK:-64}
STEPS=${STEPS:-1875}
read -ra EXTRA_FLAGS <<< "${EXTRA_FLAGS:-}" # any others of train.py

torchrun --standalone --nproc_per_node "$GPUS" \
    train.py --init_from "$MODEL" --data "$DATA" --out "$OUT" --lora_rank "$LORA_RANK" --lora_alpha 16 \
    --lora_dropout 0.05 --quantize nf4 --seq_len 512 --pack --batch_size 16 --micro_batch "$MICRO_BATCH" \
    --steps "$STEPS" --checkpointing full --learning_rate 1e-4 --final_lr 1 \
    --warmup 0.03 --beta2 0.999 --weight_decay 0 --grad_clip 0.3 "${EXTRA_FLAGS[@]}"
