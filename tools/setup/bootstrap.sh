#!/usr/bin/env bash
# Set up .venv with the pinned stack, so that "make demo" and "make test" work on a fresh clone.
#
# Needs Python 3.10 to 3.12 with its headers, a C++ compiler and git. Writes to .venv and .setup in the checkout and to
# alimm's cache folder, where the built mmcv wheel is kept. A second run finds the stamp and ends at once.
#
#   PYTHON=/path/to/python3.11     which Python to take (default: the first fit one, 3.11 before 3.12 before 3.10)
#   ALIMM_TORCH=cpu|cuda           which build of PyTorch (default: cuda where nvidia-smi works, else cpu)
#   ALIMM_TORCH_INDEX=URL          one more package index to look for PyTorch, handed to pip as it is
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
venv=$root/.venv
stamp=$venv/alimm-setup.stamp
logs=$root/.setup/log

die() {
  printf 'set-up: %s\n' "$@" >&2
  exit 1
}

# ---- nothing to do? ------------------------------------------------------------------------------------------------

case ${ALIMM_TORCH:-} in
  '' | cpu | cuda) ;;
  *) die "ALIMM_TORCH must be 'cpu' or 'cuda', got '$ALIMM_TORCH'." ;;
esac

# What the environment was made from, as one line. Any change here means a new set-up.
inputs() {
  cd "$root"
  cat constraints.txt pyproject.toml setup.py alimm/version.py tools/setup/bootstrap.sh tools/setup/build_mmcv.sh | git hash-object --stdin
}

if [[ -f $stamp ]] && command -v git >/dev/null; then
  { read -r done_inputs && read -r done_torch && read -r done_root; } <"$stamp" || true
  if [[ ${done_inputs:-} == "$(inputs)" && ${done_root:-} == "$root" ]] &&
    [[ -z ${ALIMM_TORCH:-} || $ALIMM_TORCH == "${done_torch:-}" ]] &&
    "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
  fi
fi

# ---- what must be there before we start ----------------------------------------------------------------------------

case $root in
  *[[:space:]]*) die "the checkout's path contains a space: '$root'." \
    "Compilers and build tools break on that. Move the checkout to a path without one." ;;
esac

# Prints "X.Y" for a Python that runs and that we support, else fails. A pyenv shim may exist and not run.
supported() {
  "$1" -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v); sys.exit(not (3, 10) <= v <= (3, 12))' 2>/dev/null </dev/null
}

# Prints what a supported Python lacks: "venv", "headers", both or nothing.
lacking() {
  "$1" - <<'PYTHON' 2>/dev/null
import importlib.util
import os
import sysconfig

if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
    print("venv")
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print("headers")
PYTHON
}

problems=()
python='' python_lacks='' seen=''
find_python() {
  local name path version lacks names=(python3.11 python3.12 python3.10 python3 python)
  if [[ -n ${PYTHON:-} ]]; then
    names=("$PYTHON")
  fi
  for name in "${names[@]}"; do
    while read -r path; do
      [[ -n $path ]] || continue
      if version=$(supported "$path"); then
        lacks=$(lacking "$path")
        if [[ -z $python || -z $lacks ]]; then
          python=$path python_version=$version python_lacks=$lacks
        fi
        [[ -n $lacks ]] || return 0
      elif [[ -n $version ]]; then
        seen+="${seen:+, }$version ($path)"
      fi
    done < <(type -aP "$name" || true)
  done
  [[ -n $python ]]
}

if ! find_python; then
  if [[ -n ${PYTHON:-} ]]; then
    problems+=("PYTHON='$PYTHON' must be Python 3.10, 3.11 or 3.12; it is ${seen:-no Python that runs}.")
  else
    problems+=("Python 3.10, 3.11 or 3.12 is missing (found: ${seen:-none})."
      "    Debian, Ubuntu: apt install python3.11 python3.11-venv python3.11-dev"
      "    Fedora:         dnf install python3.11 python3.11-devel"
      "    or name one that you have: make setup PYTHON=/path/to/python3.11")
  fi
else
  if [[ $python_lacks == *venv* ]]; then
    problems+=("$python has no working 'venv' module."
      "    Debian, Ubuntu: apt install python$python_version-venv"
      "    Fedora:         dnf install python$python_version")
  fi
  if [[ $python_lacks == *headers* ]]; then
    problems+=("the headers of $python (Python.h) are missing."
      "    Debian, Ubuntu: apt install python$python_version-dev"
      "    Fedora:         dnf install python$python_version-devel")
  fi
fi
if ! ${CXX:-c++} -x c++ -fsyntax-only - >/dev/null 2>&1 <<<'int main() { return 0; }'; then
  problems+=("a C++ compiler (${CXX:-c++}) is missing or does not run."
    "    Debian, Ubuntu: apt install g++"
    "    Fedora:         dnf install gcc-c++")
fi
if ! command -v git >/dev/null; then
  problems+=("git is missing."
    "    Debian, Ubuntu: apt install git"
    "    Fedora:         dnf install git")
fi
if ((${#problems[@]})); then
  die "cannot start:" "${problems[@]}"
fi

# ---- helpers -------------------------------------------------------------------------------------------------------

# step TITLE LOG COMMAND...: run it with its output in a log; one line on the terminal; on failure say where to look.
step() {
  local title=$1 log=$logs/$2.log begin=$SECONDS
  shift 2
  printf '  %-62s' "$title"
  if "$@" >"$log" 2>&1 </dev/null; then
    printf '%5d s\n' $((SECONDS - begin))
  else
    printf ' failed\n'
    printf -- '---- the last lines of %s\n' "$log" >&2
    tail -n 15 "$log" >&2
    die "stopped at the step '$title'. The whole log: $log" "Mend it and run the same command again; done work is kept."
  fi
}

pip() {
  PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip "$@"
}

# The pins that we install: the list up to the extras' marker, less what has a step of its own.
stack() {
  sed -e '/^# ---- extras/,$d' -e '/^torch==/d' -e '/^mmcv==/d' "$root/constraints.txt"
}

pin() {
  sed -n "s/^$1==//p" "$root/constraints.txt" | head -n 1
}

# ---- the set-up ----------------------------------------------------------------------------------------------------

mkdir -p "$logs"
# One set-up at a time in a checkout. The lock goes with file descriptor 9, also when we are killed.
exec 9>"$root/.setup/lock"
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
  echo "set-up: another one is running in this checkout; waiting for it." >&2
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  exec "${BASH_SOURCE[0]}" 9>&-
}

torch_kind=${ALIMM_TORCH:-}
if [[ -z $torch_kind ]]; then
  if nvidia-smi -L >/dev/null 2>&1; then torch_kind=cuda; else torch_kind=cpu; fi
fi
torch_version=$(pin torch)
torch_index=()
if [[ -n ${ALIMM_TORCH_INDEX:-} ]]; then
  torch_index=(--extra-index-url "$ALIMM_TORCH_INDEX")
fi
echo "Setting up alimm in .venv: Python $python_version ($python), PyTorch $torch_version for $torch_kind"

old_root=$(sed -n 3p "$stamp" 2>/dev/null || true)
rm -f "$stamp"
if [[ -d $venv ]]; then
  # A moved checkout, another Python or a half-made environment: start anew. Else pip brings it up to date in place.
  if [[ -n $old_root && $old_root != "$root" ]] || [[ $(supported "$venv/bin/python") != "$python_version" ]] ||
    ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
  fi
fi
[[ -d $venv ]] || step "virtual environment" venv "$python" -m venv "$venv"

# Fails without a word where pip knows no CPU build under its own name.
torch_cpu() {
  pip install ${torch_index[@]+"${torch_index[@]}"} --no-deps "torch==$torch_version+cpu" >"$logs/torch.log" 2>&1
}
# "===" leaves out builds with a local name ("+cpu"), which pip prefers otherwise.
torch_any() {
  local requirement="torch==$torch_version"
  if [[ $torch_kind == cuda && ${#torch_index[@]} -eq 0 ]]; then
    requirement="torch===$torch_version"
  fi
  pip install ${torch_index[@]+"${torch_index[@]}"} -c "$root/constraints.txt" "$requirement"
}
torch_check() {
  "$venv/bin/python" - "$torch_kind" <<'PYTHON'
import sys

import torch

print("torch", torch.__version__, "CUDA", torch.version.cuda)
if sys.argv[1] == "cuda" and torch.version.cuda is None:
    sys.exit("pip found only a CPU build. Set ALIMM_TORCH=cpu, or point ALIMM_TORCH_INDEX at an index with CUDA builds.")
PYTHON
}
install_torch() {
  if [[ $torch_kind == cpu ]] && torch_cpu; then
    return 0
  fi
  torch_any
}
if [[ $torch_kind == cpu && $(uname -s)-$(uname -m) == Linux-x86_64 && -z ${ALIMM_TORCH_INDEX:-} ]] &&
  ! pip install -q --dry-run --no-deps "torch==$torch_version+cpu" >/dev/null 2>&1; then
  echo "  note: pip finds no CPU build of PyTorch here and takes the one with CUDA, several GB to download."
  echo "        ALIMM_TORCH_INDEX=<PyTorch's CPU package index> makes that about 200 MB."
fi
step "PyTorch $torch_version ($torch_kind)" torch install_torch

# Without resolving: the list is complete, and the OpenMMLab packages ask for things that it replaces.
install_stack() {
  stack >"$root/.setup/stack.txt" && pip install --no-deps -r "$root/.setup/stack.txt"
}
step "the pinned stack" stack install_stack
step "PyTorch loads" torch-check torch_check

mmcv_version=$(pin mmcv)
build_mmcv() {
  "$root/tools/setup/build_mmcv.sh" "$venv/bin/python" "$mmcv_version" "$root/.setup/mmcv-wheel.txt"
}
step "mmcv $mmcv_version with compiled ops (built once, then cached)" mmcv-build build_mmcv
# Force: a wheel built for another torch has the same version.
install_mmcv() {
  pip install --no-deps --force-reinstall "$(cat "$root/.setup/mmcv-wheel.txt")"
}
step "mmcv into .venv" mmcv install_mmcv

install_alimm() {
  pip install --no-deps --no-build-isolation -e "$root"
}
step "alimm itself, editable" alimm install_alimm
check_imports() {
  cd / && "$venv/bin/python" -c 'import torch, mmengine, mmcv._ext, faiss, numba, alimm, alimm.projects, alimm_ops'
}
step "everything imports" check check_imports

inputs_now=$(inputs)
printf '%s\n%s\n%s\n' "$inputs_now" "$torch_kind" "$root" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "Set-up done in $SECONDS s. Next: make demo, make test, or .venv/bin/alimm --help"
