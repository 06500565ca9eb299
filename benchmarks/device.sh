#!/usr/bin/env bash
# On a machine with a GPU: the kernels' correctness suite, the row kernels alone, then the benchmark; all results in one folder of
# at most 8 files.
#   COMMIT=<what rows call the code> PEERS=<folder> benchmarks/device.sh FOLDER SECONDS [arguments of the benchmark]
# The ops: all shapes first, where compiling the four peers takes 46 s of the first process, then peaked data, 131,072 tokens, blocks
# that stay in the L2 cache, and the other peers at one shape. WHAT=training measures training steps and the longest context in place of the ops, and predicted
# memory beside the GPU's count: a fifth of the time for steps, the rest for the searches, 24 GiB first, the whole GPU after; what has
# no time left is a lower bound, so nothing else should run beside it; CAPS names the GiB to search in, where one call is too short for
# all. TESTS names other tests, 0 leaves them out; they run in WORKERS
# processes: two minutes on an H200 with 16 cores. PEERS holds the peers' packages unpacked, as pack_peers.sh packs them.
# Exits with 1 where a test failed or ours could not be measured.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "$1")
seconds=$2
shift 2
mkdir -p "$out"
# Without it, holes between blocks would count as memory that a step needs.
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
if [ -n "${PEERS:-}" ]; then
    # The second is what a .pth file adds, which Python reads in its own folders only.
    export PYTHONPATH="$PEERS:$PEERS/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"
fi
status=0
start=$SECONDS
if [ "${TESTS:-}" != 0 ]; then
    tests=${TESTS:-tests/kernels tests/tspin/test_shared_attention.py tests/tspin/test_tiling.py tests/tspin/test_continuous.py}
    # -v: a run that is cut off has named what failed.
    timeout $((seconds / 2)) python3 -m pytest $tests -n "${WORKERS:-8}" -v -ra 2>&1 | tee "$out/tests.log" | tail -n 15 || status=1
fi
commit=(${COMMIT:+--commit "$COMMIT"})
if [ "${WHAT:-logprobs}" = training ]; then
    left=$((seconds - (SECONDS - start)))
    python3 -m benchmarks attention --seconds $((left / 15)) --out "$out" "${commit[@]}" > "$out/table.txt" 2> "$out/errors.txt" || status=1
    python3 -m benchmarks prediction --out "$out" "${commit[@]}" >> "$out/table.txt" 2>> "$out/errors.txt" || status=1
    python3 -m benchmarks train_step --implementations naive,trl_style,tspin_separate,tspin,tspin_tiled --seconds $((left / 5)) --out "$out" "${commit[@]}" "$@" >> "$out/table.txt" 2>> "$out/errors.txt" || status=1
    left=$((seconds - (SECONDS - start) - 20))
    python3 -m benchmarks memory ${CAPS:+--caps "$CAPS"} --implementations naive,trl_style,tspin,tspin_tiled --seconds "$left" --out "$out" "${commit[@]}" "$@" >> "$out/table.txt" 2>> "$out/errors.txt" || status=1
else
    python3 -m benchmarks row_kernels --shape "${SHAPE:-8192x151936}" --seconds $((seconds / 20)) --out "$out" "${commit[@]}" > "$out/table.txt" 2> "$out/errors.txt" || status=1
    left=$((seconds - (SECONDS - start) - 15))
    logprobs() { # part of the time, in tenths, and arguments
        python3 -m benchmarks logprobs --seconds $((left * $1 / 10)) --out "$out" "${commit[@]}" "${@:2}" >> "$out/table.txt" 2>> "$out/errors.txt" || status=1
    }
    if [ $# -gt 0 ]; then
        logprobs 10 "$@"
    else
        logprobs 5 --cases goals,odd --data random --peers quack,trl,liger_flsce,verl
        logprobs 1 --cases n8192-d4096-v151936 --data peaked --peers quack
        logprobs 2 --cases long --data random --peers trl,liger_flsce
        logprobs 1 --cases l2 --data random
        logprobs 1 --cases n8192-d896-v151936 --data random --peers compile,torch_lce,liger_flce,cce,cce_exact
    fi
fi
tail -n 5 "$out/errors.txt"
python3 -m benchmarks plots "$out" > /dev/null || status=1
python3 -m benchmarks summary "$out"
exit $status
