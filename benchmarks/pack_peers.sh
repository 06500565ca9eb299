#!/usr/bin/env bash
# The benchmark's peers as one archive for a GPU machine without a network: benchmarks/pack_peers.sh ARCHIVE.tar.xz
# There: mkdir peers && tar xJf ARCHIVE.tar.xz -C peers, and PEERS=peers benchmarks/device.sh. Nothing is installed, and none of
# their other requirements come along: torch, triton, transformers, accelerate and einops must be there.
set -euo pipefail
archive=$(realpath -m "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
platforms=()
for version in 2_17 2_24 2_27 2_28 2_34; do platforms+=(--platform "manylinux_${version}_x86_64"); done
python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --target "$folder" \
    trl liger-kernel cut-cross-entropy verl quack-kernels apache-tvm-ffi torch-c-dlpack-ext \
    nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-cu13
cd "$folder"
# What nothing here imports.
rm -rf nvidia_cutlass_dsl/dsl_packages/iket nvidia_cutlass_dsl/cu13/lib/stubs tvm_ffi/3rdparty tvm_ffi/lib/*testing* bin scripts tests
tar c . | xz --x86 --lzma2=preset=6 > "$archive"
ls -l "$archive"
