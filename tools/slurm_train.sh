#!/usr/bin/env bash
# Train through Slurm:  slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS as in OpenMMLab's script; GPUS=0 asks for no GPU and runs
# TASKS (1) processes through gloo.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/srun.sh"
run_tasks "$partition" "$job" "$here/train.py" "$config" --work-dir "$work_dir" --launcher slurm "$@"
