#!/usr/bin/env bash
# For clusters that forbid requeue: submits the same job N times. Each starts when the one before it has
# ended, for whatever reason. The job that finishes the run, or finds that it cannot continue, cancels the
# others.
#
#   slurm/chain.sh 10 --nodes 4 --gpus-per-node 8 slurm/train.sbatch base_1p7b.toml run.directory=runs/base
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: slurm/chain.sh N [options of sbatch] slurm/train.sbatch arguments" >&2
    exit 2
fi
links=$1
shift
export CHAIN=1
name="megatron-eso-$(date +%y%m%d-%H%M%S)-$$"
for ((link = 0; link < links; link++)); do
    # One at a time by name and user; the name is the chain's own.
    sbatch --parsable --no-requeue --job-name="$name" --dependency=singleton "$@"
done
