#!/usr/bin/env bash
# Build the wheels into dist/cpu and (where nvcc is) dist/cuda, install each in a clean environment and use it there.
#   bench/wheel.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
root=$PWD
kinds=cpu
if command -v nvcc >/dev/null; then kinds="cpu cuda"; fi
for kind in $kinds; do
  rm -rf "dist/$kind" build/lib* build/temp*
  switch=OFF
  if [ "$kind" = cuda ]; then switch=ON; fi
  CPD_CUDA=$switch "$python" -m pip wheel --quiet --no-deps --wheel-dir "dist/$kind" .
  clean=$(mktemp -d)
  "$python" -m venv "$clean/venv"
  "$clean/venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt "dist/$kind"/*.whl
  cp bench/wheel_check.py "$clean"
  cd "$clean" # so that the clone is not what is imported
  venv/bin/python wheel_check.py "$kind"
  cd "$root"
  rm -rf "$clean"
  ls -l "dist/$kind"/*.whl
done
