#!/usr/bin/env bash
# Test through Slurm:  slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
# Environment as for slurm_train.sh.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 checkpoint=$4
shift 4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/srun.sh"
run_tasks "$partition" "$job" "$here/test.py" "$config" "$checkpoint" --launcher slurm "$@"
