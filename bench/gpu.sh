#!/usr/bin/env bash
# Everything that is to be done on a machine with a GPU, phase by phase; each phase ends within ten minutes and can be
# called alone, on a fresh machine, without a network.
#
#   bench/gpu.sh                    all phases in order
#   bench/gpu.sh check table        some of them
#
#   check      the GPU tests, compute-sanitizer on small shapes
#   tune       forms and tiles of every piece, into $OUT/tune.json and from there into fused_lora/tuned.json
#   table      correctness, ceilings, the table of LoRA taxes
#   model      training steps of a Llama
#
# What it measures goes to $OUT (default: bench/results). No phase stops the next; the exit code is 1 if one failed. Where
# the machine has a copy without .git, COMMIT names the commit that the JSON files are to say.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
out=${OUT:-$root/bench/results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
failed=()

# The package as it is imported by users: fused_lora.kernels is the folder kernels/. Installed where that works without a
# network, else put together from links.
build() {
  cd /tmp || return 1 # not here: the folder kernels/ must not be found as a package
  if ! python3 -c 'import fused_lora.kernels.linear' 2>/dev/null; then
    python3 -m pip install -q --no-index --disable-pip-version-check --no-deps --no-build-isolation -e "$root" ||
      echo "no editable install: a folder of links on PYTHONPATH instead"
  fi
  if ! python3 -c 'import fused_lora.kernels.linear' 2>/dev/null; then
    local site=${TMPDIR:-/tmp}/fused-lora-site
    mkdir -p "$site/fused_lora"
    ln -sfn "$root"/fused_lora/* "$site/fused_lora/"
    ln -sfn "$root/kernels" "$site/fused_lora/kernels"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  fi
  python3 -c 'import fused_lora.kernels.linear, torch; print("built:", fused_lora.__file__, torch.__version__)'
  local built=$?
  cd "$root" || return 1
  return $built
}

# step PHASE SECONDS COMMAND...: the command with a limit, its output kept in $OUT/PHASE.log
step() {
  local name=$1 limit=$2
  shift 2
  echo "== $name: $* (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/$name.log" | tail -n 40
  local code=${PIPESTATUS[0]}
  echo "== $name: exit code $code"
  [ "$code" = 0 ] || failed+=("$name")
}

check() {
  local parallel=()
  python3 -c 'import xdist' 2>/dev/null && parallel=(-n 4) # more would not fit the largest tests into memory
  # Not python3 -m pytest, which finds the folder kernels/ as a package.
  step check 340 python3 -c 'import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))' \
    tests/test_gpu.py -q -ra "${parallel[@]}"
  step check 60 python3 bench/gpu_sanitize.py # compiles what the tools below are to watch
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
      # Each tensor in an allocation of its own: within torch's blocks nothing is out of bounds or uninitialised.
      step check 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python3 bench/gpu_sanitize.py
    done
  else
    echo "no compute-sanitizer here"
  fi
}

tune() {
  rm -f "$out/tune.json"
  step tune 590 python3 bench/gpu.py --tune --seconds 540 --output "$out/tune.json"
  if python3 bench/gpu_tune.py "$out/tune.json"; then
    cp fused_lora/tuned.json "$out/tuned.json"
  else
    failed+=("tuned.json")
  fi
}

table() {
  step table 520 python3 bench/gpu.py --seconds 460 --output "$out/gpu.json"
}

model() {
  step model 500 python3 bench/model_step.py --seconds 440 --output "$out/model-step.json"
}

[ $# -gt 0 ] || set -- check tune table model
for name in "$@"; do
  case $name in
    check | tune | table | model) ;;
    *) echo "no phase $name: check, tune, table, model" && exit 2 ;;
  esac
done
build || { echo "fused_lora cannot be imported"; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null
for name in "$@"; do
  rm -f "$out/$name.log"
  "$name"
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
