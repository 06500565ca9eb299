#!/usr/bin/env bash
# On a machine with a GPU: the kernels' correctness suite, then the benchmark, all results in one folder of at most 8 files.
#   COMMIT=<what rows call the code> benchmarks/device.sh FOLDER SECONDS [arguments of the benchmark]
# WHAT=training measures training steps and the longest context in place of the ops; TESTS=0 leaves the suite out. Exits with 1 where a
# test failed or ours could not be measured. Peers come by PYTHONPATH; for training, of TRL and what it imports:
#   pip install --no-deps --target .peers trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
# A third of the time is for steps, the rest for the searches: 24 GiB first, whole GPU after; what has no time left is a lower bound.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "$1")
seconds=$2
shift 2
mkdir -p "$out"
# Without it, holes between blocks would count as memory that a step needs.
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
status=0
start=$SECONDS
if [ "${TESTS:-1}" != 0 ]; then
    timeout $((seconds / 2)) python3 -m pytest tests/kernels -n 0 -q -ra 2>&1 | tee "$out/tests.log" | tail -n 15 || status=1
fi
left=$((seconds - (SECONDS - start)))
commit=(${COMMIT:+--commit "$COMMIT"})
if [ "${WHAT:-logprobs}" = training ]; then
    third=$((left / 3))
    python3 -m benchmarks train_step --seconds "$third" --out "$out" "${commit[@]}" "$@" > "$out/table.txt" 2> "$out/errors.txt" || status=1
    left=$((seconds - (SECONDS - start) - 20))
    python3 -m benchmarks memory --seconds "$left" --out "$out" "${commit[@]}" "$@" >> "$out/table.txt" 2>> "$out/errors.txt" || status=1
else
    python3 -m benchmarks logprobs --seconds "$left" --out "$out" "${commit[@]}" "$@" > "$out/table.txt" 2> "$out/errors.txt" || status=1
fi
tail -n 5 "$out/errors.txt"
python3 -m benchmarks plots "$out" > /dev/null || status=1
python3 -m benchmarks summary "$out"
exit $status
