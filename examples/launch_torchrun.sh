#!/usr/bin/env bash
# Start a run on several machines with torchrun: once on each machine, with the same arguments.
#
#   MASTER_ADDR=first-machine NUM_NODES=2 NODE_RANK=0 examples/launch_torchrun.sh CONFIG [key=value …]
#
# Not needed on one machine: `megatron-sr1 train CONFIG` starts torchrun itself.
# Under srun, with one task per node, the node's rank comes from Slurm.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    sed -n '2,7p' "$0"
    exit 2
fi

# Slurm's warning signal reaches every process of a job; it is for the ranks and would kill torchrun.
trap '' USR1
# For launch.save_on_sigterm: torchrun kills ranks 30 seconds after SIGTERM by default.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-604800}"

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NUM_NODES:-1}" \
    --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}" \
    --nproc-per-node "${RANKS_PER_NODE:-gpu}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${MASTER_PORT:-29500}" \
    -m megatron_sr1 train "$@"
