#!/usr/bin/env bash
# On a machine with a GPU: build, run the tests, benchmark, print a short table; then the same as an RTX 2080 Ti would:
# sm_75 code, 11 GiB, no tf32. Writes gpu.json (the table, versions, date, commit) and the raw results to $OUT, else to
# bench/results.
# Needs nvcc, torch with CUDA and what build isolation would install (setuptools, cmake, ninja, pybind11): no network.
# PYTHON: the interpreter. DRY_RUN=1: print the commands only.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
raw=()

step() {
  printf '\n== %s\n' "$*" >&2
  [ -n "${DRY_RUN:-}" ] || "$@"
}

build() { step env CPD_CUDA=ON "$@" "$python" -m pip install --quiet --no-build-isolation --no-deps -e .; }
tests() { step "$python" -m pytest tests/ops tests/distill tests/score tests/prune tests/memory tests/recipes -q; }
benches() { # name, environment
  local name=$1
  shift
  step env "$@" "$python" -m pytest bench -q --benchmark-enable --benchmark-only --benchmark-json="$out/raw_$name.json"
  raw+=("$out/raw_$name.json")
}

mkdir -p "$out"
step "$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.cuda.get_device_name())'
build
tests
benches gpu CPD_EMULATE=
# PTX for compute_75 alone: the driver makes this GPU's code of it, so the kernels of sm_75 run.
build CPD_CUDA_ARCHS=75-virtual
tests
benches 2080ti CPD_EMULATE=2080ti
build # leave the library as it is for this GPU
step "$python" bench/summary.py --json "$out/gpu.json" "${raw[@]}"
