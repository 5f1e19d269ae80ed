#!/usr/bin/env bash
# All that needs a GPU, in one go: the tests on the device, then the benches; result lines under bench/results.
# Usage: bench/gpu.sh [OUTPUT_FOLDER]. Stops each part at its time limit and goes on, so the lines there are kept.
set -u
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu-run}
mkdir -p "$out"
python=${PYTHON:-python3}
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "bench/gpu.sh: no CUDA device")' || exit 2
"$python" -c 'import stablekern' 2>/dev/null || "$python" -m pip install --quiet --no-build-isolation --no-deps -e . || exit 2
"$python" -m stablekern doctor --json >"$out/doctor.json" 2>"$out/doctor.log"
timeout 220 "$python" -m pytest tests/test_ops.py -q -k "cuda or registration or compiles" -p no:cacheprovider >"$out/tests.log" 2>&1
tests=$?
timeout 60 "$python" -m pytest tests/test_eigh_cuda.py -q -m gpu -p no:cacheprovider >"$out/tests-cuda.log" 2>&1 || tests=1
tail -n 15 "$out/tests.log" "$out/tests-cuda.log"
timeout 240 "$python" -m bench.run --device cuda --seconds 3 --save 2>&1 | tee "$out/bench.log"
cp -r bench/results/cuda-* "$out/" 2>/dev/null
exit $tests
