#!/bin/bash
# RaySwift under Slurm: the same line on every node starts Ray, runs the command on the first one, and stops Ray.
#
#   sbatch cluster/slurm.sh sft --model Qwen/Qwen2.5-7B-Instruct --dataset train.jsonl --num_nodes 2
#
# Needs an environment with RaySwift on a file system that the nodes share (CHANGE below), and the token:
# `ray get-auth-token --generate` once. A job that is put back into the queue (--requeue) runs the same line again and
# goes on from its last checkpoint.
#SBATCH --job-name=rayswift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=rayswift-%j.log
set -euo pipefail

VENV=${RAYSWIFT_VENV:-$HOME/rayswift/.venv}     # CHANGE
RUNS=${RAYSWIFT_RUNS:-$HOME/runs}               # CHANGE: shared, with room for checkpoints
export PATH="$VENV/bin:$PATH" RAY_AUTH_MODE=token
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker}
# Nodes that load Python from a busy file system take longer than Ray's 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

if [ $# -eq 0 ]; then
  set -- pt --model Qwen/Qwen2.5-7B --dataset swift/chinese-c4 --streaming true --train_type full --deepspeed zero2 \
    --num_nodes "$SLURM_JOB_NUM_NODES" --max_steps 10000 --save_steps 500
fi
# `sed` reads to the end: under pipefail a pipe that `head` closes early ends the script.
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
PORT=$((20000 + SLURM_JOB_ID % 10000)) # of this job: two may share a node
ulimit -n 65536 || true

srun --kill-on-bad-exit=1 ray symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" -- \
  rayswift "$@" --address "$HEAD:$PORT" --storage_path "$RUNS" --resume_from_checkpoint auto
