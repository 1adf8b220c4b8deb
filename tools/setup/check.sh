#!/usr/bin/env bash
# The checks of this repository, in the order of their cost; stops at the first that fails, with its exit code.
#
#   check.sh lint    ruff (rules, format), mypy, import contract, spelling
#   check.sh all     the above, the tests, and the CUDA tests in Numba's simulator (a process of their own)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bin=.venv/bin
summary=''
stage() {
  local name=$1 begin=$SECONDS code
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@"
  code=$?
  summary+=$(printf '%-16s %5d s' "$name" $((SECONDS - begin)))
  if ((code)); then
    printf '\n%s  FAILED (exit code %d)\nThe checks after it were not run.\n' "$summary" "$code"
    exit "$code"
  fi
  summary+=$'  ok\n'
}

stage "ruff rules" $bin/ruff check --quiet .
stage "ruff format" $bin/ruff format --check --quiet .
stage "types" $bin/mypy
stage "import contract" $bin/lint-imports
stage "spelling" $bin/codespell
if [[ ${1:-} == all ]]; then
  # One BLAS thread a process: the tests run in parallel, and sums must not depend on the number of cores.
  export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
  stage "tests" $bin/python -m pytest -q -n 2 --dist loadfile
  stage "CUDA simulator" env NUMBA_ENABLE_CUDASIM=1 $bin/python -m pytest -q -m cudasim
fi
printf '\n%sAll checks passed in %d s.\n' "$summary" "$SECONDS"
