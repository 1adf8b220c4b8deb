#!/usr/bin/env bash
# Test on several processes of one or more machines:  dist_test.sh CONFIG CHECKPOINT PROCESSES [options of test.py]
# Environment as for dist_train.sh.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT PROCESSES [options of test.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 processes=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/torchrun.sh"
run_ranks "$processes" "$here/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
