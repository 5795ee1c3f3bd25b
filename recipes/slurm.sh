#!/bin/bash
# LLaMA-2 7B from scratch under Slurm, over any number of preemptions and time limits.
#
# Hardware  4 nodes of 8 A100-80GB, a filesystem that all of them see. Each node holds one copy of the model, sharded
#           over its 8 GPUs; between nodes only gradients travel.
# Work      10,000 steps of 512 sequences of 4,096 tokens: 21.0 billion tokens, 2.1 million in a step.
# Expected  about 3,661 tokens/s a GPU, 49.7 hours in all, 68.8 of 79.2 GiB a GPU. This is the forecast of
#           python train.py --plan --size 7B --seq_len 4096 --batch_size 512 --micro_batch 2 --steps 10000 --gpus 32 \
#               --gpu A100-80GB --shard_over 8
#
# Submit it from the project's folder, its Python environment activated:
#
#     DATA=/shared/data/mine OUT=/shared/out/7B sbatch recipes/slurm.sh
#     sbatch --nodes 16 recipes/slurm.sh                  # any number that divides BATCH_SIZE / MICRO_BATCH / 8
#
# Before its time ends or when it is preempted, Slurm sends SIGTERM: the run finishes its step, saves, and the job
# queues up again by itself; scancel ends it for good. After a crash torchrun starts the processes anew, three times.
# Every start is this same command: it continues from the last checkpoint.

#SBATCH --job-name=plainllama
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=plainllama-%j.log
#SBATCH --signal=B:TERM@300

DATA=${DATA:-data/mine}
OUT=${OUT:-out/7B}
SIZE=${SIZE:-7B}
SEQ_LEN=${SEQ_LEN:-4096}
BATCH_SIZE=${BATCH_SIZE:-512}
MICRO_BATCH=${MICRO_BATCH:-2}
STEPS=${STEPS:-10000}
LEARNING_RATE=${LEARNING_RATE:-3e-4}
SAVE_EVERY=${SAVE_EVERY:-250}
read -ra EXTRA_FLAGS <<< "${EXTRA_FLAGS:-}" # any others of train.py
GPUS=${SLURM_GPUS_ON_NODE:-8}

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280 # seconds for the last step and its checkpoint; torchrun's own 30 are too few

# srun itself would end its tasks on SIGTERM; scancel hands it to torchrun, which hands it to train.py
stopped=no
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# this script runs on the first node; a node that has saved first must not end the others
srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS" --max-restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "$(hostname):$((20000 + SLURM_JOB_ID % 10000))" --rdzv_id "$SLURM_JOB_ID" \
    train.py --data "$DATA" --out "$OUT" --size "$SIZE" --seq_len "$SEQ_LEN" --batch_size "$BATCH_SIZE" \
    --micro_batch "$MICRO_BATCH" --steps "$STEPS" --learning_rate "$LEARNING_RATE" --shard_over "$GPUS" \
    --beta2 0.95 --save_every "$SAVE_EVERY" "${EXTRA_FLAGS[@]}" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do # the signal ended the waiting, not what was waited for
    wait "$step"
    status=$?
done

if [ "$stopped" = yes ]; then
    [ "$(cat "$OUT/last")" = "$(printf 'step_%08d' "$STEPS")" ] && exit 0 # it was the last step
    state=$(squeue --noheader --job "$SLURM_JOB_ID" --format %T) # COMPLETING where somebody cancelled the job
    [ "$state" = RUNNING ] && exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
