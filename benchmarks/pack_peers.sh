#!/usr/bin/env bash
# The benchmark's peers, and what TRL and tspin import, as one archive for a GPU machine without a network, within 64 MiB:
#   benchmarks/pack_peers.sh ARCHIVE.tar.xz
# There: mkdir peers && tar xJf ARCHIVE.tar.xz -C peers, and PEERS=peers benchmarks/device.sh. Nothing is installed, and none of
# their other requirements come along: torch, triton, transformers, accelerate, einops, pandas and pyarrow must be there.
set -euo pipefail
archive=$(realpath -m "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
platforms=()
for version in 2_17 2_24 2_27 2_28 2_34; do platforms+=(--platform "manylinux_${version}_x86_64"); done
# QuACK 0.6.5 does not import beside any CuTe DSL that it allows (4.7.0 to 4.8.1); 0.6.4 does beside the one that it asks for.
python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --target "$folder" \
    trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 verl==0.9.1 \
    quack-kernels==0.6.4 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5 \
    nvidia-cutlass-dsl{,-libs-base,-libs-core,-libs-cu13}==4.6.2
cd "$folder"
# What nothing here imports; the libraries of torch-c-dlpack-ext are for torch before 2.10.
rm -rf nvidia_cutlass_dsl/dsl_packages/iket nvidia_cutlass_dsl/cu13/lib/stubs tvm_ffi/{3rdparty,include,src} bin scripts tests \
    torch_c_dlpack_ext/*.so trl/experimental liger_kernel/ops/backends/_ascend _multiprocess
rm -rf verl/{workers,trainer,experimental,models}
tar c . | xz --x86 --lzma2=preset=9e,dict=256MiB > "$archive"
ls -l "$archive"
