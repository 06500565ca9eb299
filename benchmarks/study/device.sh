#!/usr/bin/env bash
# On a machine with a GPU: as many whole arms of the word problems as SECONDS allow; rows, table, figure and log in FOLDER, four files.
#   COMMIT=<what rows call the code> benchmarks/study/device.sh FOLDER SECONDS [JOBS]
# Rows that are committed are gone on from. Where the machine lacks `datasets`, its wheel and those of dill and multiprocess lie in .whl:
#   pip download --no-deps --python-version 3.12 --only-binary=:all: -d .whl datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
# Afterwards: cp FOLDER/rows.jsonl benchmarks/study/word_problems.jsonl
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "$1")
mkdir -p "$out"
if compgen -G ".whl/*.whl" > /dev/null; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1
cp benchmarks/study/word_problems.jsonl "$out/rows.jsonl" 2> /dev/null
scratch=${SCRATCH:-$(mktemp -d)}
python3 -m benchmarks.study.word_problems run --directory "$scratch" --out "$out" --seconds "$2" --jobs "${3:-5}" \
    --size "${SIZE:-full}" ${COMMIT:+--commit "$COMMIT"} 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
