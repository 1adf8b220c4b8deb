#!/usr/bin/env bash
# Train on several processes of one or more machines:  dist_train.sh CONFIG PROCESSES [options of train.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT as in OpenMMLab's script. On one machine a free port is taken unless PORT is
# set. Without CUDA the processes talk through gloo.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG PROCESSES [options of train.py]" >&2
    exit 2
fi
config=$1 processes=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/torchrun.sh"
run_ranks "$processes" "$here/train.py" "$config" --launcher pytorch "$@"
