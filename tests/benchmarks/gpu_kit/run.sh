#!/bin/bash
# Install without network beside the torch of this machine, run the GPU tests and benchmarks, and
# write result.json. With --dry no CUDA session is opened: a tiny model runs on the CPU instead.
#
#   PYTHON=/opt/torch/bin/python3 bash run.sh [--dry]
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}

wanted=$(cat PYTHON)
found=$("$PYTHON" -c 'import sys; print(".".join(map(str, sys.version_info[:2])))')
if [ "$wanted" != "$found" ]; then
  echo "run.sh: $PYTHON is Python $found, and this kit is for $wanted; set PYTHON, or collect a kit with --python $found" >&2
  exit 2
fi
beside=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2> /dev/null) || {
  echo "run.sh: $PYTHON has no torch; set PYTHON to one that has" >&2
  exit 2
}
[ -d source ] || bash join.sh

# An environment of our wheels first; what it lacks comes from the place where torch lies.
env=source/.venv
"$PYTHON" -m venv --clear --without-pip "$env"
pips=(wheels/pip-*.whl) # a wheel is a program too: the Python here may have no pip
"$PYTHON" "${pips[0]}/pip" --python "$env/bin/python" install --quiet --no-index --no-deps \
  --no-compile wheels/*.whl
echo "$beside" > "$env/lib/python$found/site-packages/beside.pth"
touch "$env/.ready"

cd source
exec .venv/bin/python -m tests.benchmarks.gpu_kit.measure --out ../result.json "$@"
