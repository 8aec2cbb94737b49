#!/usr/bin/env bash
# Start a run on several machines with torchrun: once on each machine, with the same arguments.
#
#   MASTER_ADDR=first-machine NUM_NODES=2 NODE_RANK=0 examples/launch_torchrun.sh CONFIG [key=value …]
#
# On one machine this is not needed: `megatron-sr1 train CONFIG` starts torchrun by itself.
# As the tasks of srun, one a node, it takes its number from Slurm.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    sed -n '2,7p' "$0"
    exit 2
fi

# Slurm warns every process of a job with it: it is meant for the ranks, torchrun would die of it.
trap '' USR1

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NUM_NODES:-1}" \
    --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}" \
    --nproc-per-node "${RANKS_PER_NODE:-gpu}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${MASTER_PORT:-29500}" \
    -m megatron_sr1 train "$@"
