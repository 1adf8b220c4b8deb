#!/usr/bin/env bash
# Build mmcv with its compiled ops, or take the wheel from the cache.
#
#   build_mmcv.sh PYTHON VERSION [FILE]
#
# PYTHON is an interpreter that has torch, setuptools<81, wheel, ninja and alimm's sources next to this script. The path
# of the wheel is the last line on stdout, and is written to FILE if one is given.
#
# mmcv comes as sources only. Its two hundred C++ files spend most of their time on torch's headers, so we compile those
# once into a precompiled header: minutes instead of half an hour.
set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 PYTHON VERSION [FILE]" >&2
  exit 2
fi
python=$1 version=$2 result=${3:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

# CUDA ops need nvcc beside a CUDA build of torch; without it mmcv's CPU ops are built.
ops=cpu
if [[ -n ${CUDA_HOME:-} || -n $(type -P nvcc) ]] && "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
then
  ops=cuda
else
  export CUDA_VISIBLE_DEVICES=
fi

# The wheel fits one mmcv, torch, Python and platform; torch promises no binary compatibility between releases.
cache=$(cd "$root" && "$python" -c 'from alimm.paths import cache_dir; print(cache_dir() / "wheels")')
key=$("$python" - "$version" "$ops" <<'PYTHON'
import platform
import sys
import sysconfig

import torch

print(
    f"mmcv-{sys.argv[1]}-{sys.argv[2]}",
    f"torch-{torch.__version__}",
    sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag,
    sysconfig.get_platform(),
    "-".join(part for part in platform.libc_ver() if part) or "libc",
    sep="_",
)
PYTHON
)
folder=$cache/$key
if [[ $cache == *[[:space:]]* ]]; then
  echo "the cache folder's path contains a space, which compilers break on: '$cache'. Set XDG_CACHE_HOME to another." >&2
  exit 1
fi

finish() {
  local wheels=("$folder"/mmcv-*.whl)
  if [[ -n $result ]]; then
    printf '%s\n' "${wheels[0]}" >"$result"
  fi
  printf '%s\n' "${wheels[0]}"
}

cached() {
  local wheels=("$folder"/mmcv-*.whl)
  [[ -f ${wheels[0]} ]] && "$python" -m zipfile -t "${wheels[0]}" >/dev/null 2>&1
}

if cached; then
  finish
  exit 0
fi

mkdir -p "$cache"
# Two builds of the same wheel: the second waits, then finds it done. The lock ends with this process.
exec 8>"$cache/$key.lock"
"$python" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)'
if cached; then
  finish
  exit 0
fi

# Built beside its place in the cache and moved in whole, so that an interrupted build leaves no broken wheel.
rm -rf "$cache/.build-$key-"*  # of a build that was killed; ours is the only one now
work=$(mktemp -d "$cache/.build-$key-XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

compiler=${CXX:-c++}
standard=c++17
if "$python" -c 'import sys, torch; sys.exit(tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 14))'; then
  # These headers refuse C++17, and mmcv puts its own -std=c++17 last: swap it on the way to the compiler.
  standard=c++20
  for name in c++ cc; do
    real=$(type -P "$([[ $name == cc ]] && echo "${CC:-cc}" || echo "$compiler")")
    {
      echo '#!/usr/bin/env bash'
      echo 'arguments=()'
      echo 'for argument in "$@"; do arguments+=("${argument/#-std=c++17/-std=c++20}"); done'
      printf 'exec %q "${arguments[@]}"\n' "$real"
    } >"$work/$name"
    chmod +x "$work/$name"
  done
  export CXX=$work/c++ CC=$work/cc
  compiler=$CXX
fi

includes=$("$python" - <<'PYTHON'
import sysconfig

from torch.utils.cpp_extension import include_paths

print(*(f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]))
PYTHON
)
# A precompiled header is used only where these flags and macros equal those of the build.
flags="-O2 -g0 -DNDEBUG -w"
echo '#include <torch/types.h>' >"$work/torch_headers.h"
# shellcheck disable=SC2086  # the flags are words
"$compiler" $flags -fPIC $includes -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_ext "-std=$standard" \
  -x c++-header "$work/torch_headers.h" -o "$work/torch_headers.h.gch"

jobs=${MAX_JOBS:-$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')}
mkdir "$work/wheel" "$work/tmp"
TMPDIR=$work/tmp CFLAGS="$flags -include $work/torch_headers.h" LDFLAGS="-Wl,-s" MMCV_WITH_OPS=1 MAX_JOBS=$jobs \
  "$python" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --no-binary mmcv -w "$work/wheel" "mmcv==$version"

"$python" - "$work/wheel" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("mmcv-*.whl")
if not any(name.startswith("mmcv/_ext.") for name in zipfile.ZipFile(wheel).namelist()):
    sys.exit(f"{wheel.name} was built without its compiled ops")
PYTHON
rm -rf "$folder"
mv "$work/wheel" "$folder"
finish
