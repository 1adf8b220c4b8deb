# Sourced by slurm_train.sh and slurm_test.sh.

# run_tasks PARTITION JOB_NAME SCRIPT [arguments]: start the script as the tasks of one Slurm job.
run_tasks() {
    local partition=$1 job=$2 gpus=${GPUS:-8} python=${PYTHON:-python}
    shift 2
    if [ -z "${PYTHON:-}" ] && [ -x "$here/../.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ]; then
        python="$here/../.venv/bin/python"
    fi
    local size=()
    if [ "$gpus" = 0 ]; then
        size=(--ntasks="${TASKS:-1}")
    else
        local per_node=${GPUS_PER_NODE:-8}
        if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
        size=(--gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node")
    fi
    # SRUN_ARGS holds several options in one variable, so it is split into words here.
    # shellcheck disable=SC2086
    exec srun -p "$partition" --job-name="$job" "${size[@]}" --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 ${SRUN_ARGS:-} "$python" -u "$@"
}
