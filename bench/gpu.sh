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
# Triton compiles each variant of a kernel for seconds: one process per op, as many at a time as there are cores.
test_op() {
  timeout 280 "$1" -m pytest tests/test_ops.py -q -k "$2 and (cuda or registration or compiles)" -p no:cacheprovider >"$3/tests-$2.log" 2>&1
  status=$?
  echo "$2: $(tail -n 1 "$3/tests-$2.log")"
  [ $status -eq 0 ] || [ $status -eq 5 ]  # 5: the op has no such test
}
export -f test_op
ls stablekern/ops/*.py | xargs -n 1 basename -s .py | grep -v __init__ |
  xargs -P "$(nproc)" -I '{}' bash -c 'test_op "$0" "$1" "$2"' "$python" '{}' "$out"
tests=$?
timeout 60 "$python" -m pytest tests/test_eigh_cuda.py -q -m gpu -p no:cacheprovider >"$out/tests-eigh_cuda.log" 2>&1 || tests=1
tail -n 1 "$out/tests-eigh_cuda.log"
for op in $("$python" -c 'from bench.cases import all_cases; print(*dict.fromkeys(case.op for case in all_cases()))'); do
  timeout 60 "$python" -m bench.run --device cuda --op "$op" --seconds 2 --save 2>&1 | tee -a "$out/bench.log"
done
cp -r bench/results/cuda-* "$out/" 2>/dev/null
exit $tests
