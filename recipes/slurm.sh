#!/bin/bash
# LLaMA-2 7B from scratch under Slurm, or any fine-tuning, over any number of preemptions and time limits.
#
# Hardware  4 nodes of 8 A100-80GB, a filesystem that all of them see. Each node holds one copy of the model, sharded
#           over its 8 GPUs; between nodes only gradients travel.
# Work      10,000 steps of 512 sequences of 4,096 tokens: 21.0 billion tokens, 2.1 million in a step.
# Expected  about 3,661 tokens/s a GPU, 49.7 hours in all, 68.8 of 79.2 GiB a GPU. This is the forecast of
#           python train.py --plan --size 7B --seq_len 4096 --batch_size 512 --micro_batch 2 --steps 10000 --gpus 32 \
#               --gpu A100-80GB --shard_over 8
# Never run under a real Slurm, nor on two machines: tests/test_recipes.py runs it with stand-ins
#           for srun, scancel, squeue and scontrol, two processes on one CPU. Submit a short run
#           first, such as STEPS=100.
#
# Submit it from the project's folder, its Python environment activated:
#
#     DATA=/shared/data/mine OUT=/shared/out/7B sbatch recipes/slurm.sh
#     sbatch --nodes 16 recipes/slurm.sh                  # any number that divides BATCH_SIZE / MICRO_BATCH / 8
#
# With INIT_FROM it fine-tunes, and what is not given is train.py's default for such a run. Flags
# of a recipe that have no variable below go into EXTRA_FLAGS. GOAT's on two nodes, when data.py has
# made data/goat7b as goat7b.sh does:
#
#     INIT_FROM=models/Llama-2-7b DATA=data/goat7b OUT=out/goat7b EPOCHS=1 SEQ_LEN=4096 \
#         BATCH_SIZE=512 MICRO_BATCH=2 LEARNING_RATE=1e-4 BETA2=0.999 SAVE_EVERY=0.5epoch \
#         EXTRA_FLAGS="--checkpointing full --reduce_each --dtype bf16 --beta1 0.9 \
#         --weight_decay 0 --warmup 0.07 --final_lr 0 --eval_every 0.5epoch --sample=" \
#         sbatch --nodes 2 recipes/slurm.sh
#
# Before its time ends or when it is preempted, Slurm sends SIGTERM: the run finishes its step, saves, and the job
# queues up again by itself; scancel ends it for good. After a crash torchrun starts the processes anew, three times.
# Every start is this same command: it continues from the last checkpoint, or finds that nothing is left to do.

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
if [ -z "${INIT_FROM:-}" ]; then # pretraining
    : "${OUT:=out/7B}" "${SIZE:=7B}" "${SEQ_LEN:=4096}" "${BATCH_SIZE:=512}" "${MICRO_BATCH:=2}"
    : "${STEPS:=10000}" "${LEARNING_RATE:=3e-4}" "${BETA2:=0.95}" "${SAVE_EVERY:=250}"
fi
OUT=${OUT:-out/tuned}
FLAGS=()
for name in INIT_FROM SIZE SEQ_LEN BATCH_SIZE MICRO_BATCH STEPS EPOCHS LEARNING_RATE BETA2 \
    SAVE_EVERY; do
    [ -z "${!name:-}" ] || FLAGS+=("--${name,,}" "${!name}") # SEQ_LEN=4096 is --seq_len 4096
done
read -ra EXTRA_FLAGS <<< "${EXTRA_FLAGS:-}" # any others of train.py
GPUS=${SLURM_GPUS_ON_NODE:-8}

# Gloo, which saves and asks whether to stop, takes the network interface of the host's name. That
# fails where /etc/hosts gives the name 127.0.1.1, and of several networks it may be the wrong one:
# IFACE=eth0 names it. Where NCCL hangs, NCCL_DEBUG=INFO says what it has chosen, and
# NCCL_IB_DISABLE=1 does without InfiniBand, slowly.
[ -z "${IFACE:-}" ] || export GLOO_SOCKET_IFNAME="$IFACE" NCCL_SOCKET_IFNAME="$IFACE"

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280 # seconds for the last step and its checkpoint; torchrun's own 30 are too few

# srun itself would end its tasks on SIGTERM; scancel hands it to torchrun, which hands it to train.py
stopped=no
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# This script runs on the first node. A node that has saved first must not end the others. srun
# takes no --cpus-per-task from sbatch (since Slurm 22.05), and where a cluster binds tasks to cores
# all 8 processes would share one: with --exclusive above, --cpu-bind=none gives them all.
srun --kill-on-bad-exit=0 --cpu-bind=none \
    torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS" --max-restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "$(hostname):$((20000 + SLURM_JOB_ID % 10000))" --rdzv_id "$SLURM_JOB_ID" \
    train.py --data "$DATA" --out "$OUT" --shard_over "$GPUS" "${FLAGS[@]}" "${EXTRA_FLAGS[@]}" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do # the signal ended the waiting, not what was waited for
    wait "$step"
    status=$?
done

if [ "$stopped" = yes ]; then # where that was the last step, the next start says so and ends
    state=$(squeue --noheader --job "$SLURM_JOB_ID" --format %T) # COMPLETING where somebody cancelled the job
    [ "$state" = RUNNING ] && exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
