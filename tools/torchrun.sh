# Sourced by dist_train.sh and dist_test.sh.

# run_ranks PROCESSES SCRIPT [arguments]: start the script on every rank of this machine.
run_ranks() {
    local processes=$1 python=${PYTHON:-python}
    shift
    if [ -z "${PYTHON:-}" ] && [ -x "$here/../.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ]; then
        python="$here/../.venv/bin/python"
    fi
    local where=(--standalone)
    if [ "${NNODES:-1}" != 1 ] || [ -n "${PORT:-}" ]; then
        where=(
            --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
            --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}"
        )
    fi
    # One rank a core is the rule here; torchrun would set the same value and warn about it.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$processes" "$@"
}
