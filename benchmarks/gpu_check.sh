#!/usr/bin/env bash
# Everything that needs a GPU, in one command: benchmarks/gpu_check.sh [OUT_DIR] [PART ...]
#
# Needs python3 with torch >= 2.11, triton and the engine's other dependencies; no network, no installation. A package that
# only some part needs is named where that part is skipped. Parts that have a result in OUT_DIR are not run again, so an
# interrupted check goes on where it stopped; OUT_DIR/table.md is written last, from whatever results there are.
#
# Variables:
#   PYTHON            the interpreter (default: python3)
#   INFERNEO_MODEL    the default model's .gguf file; without it the golden texts of that model are skipped
#   GPU_SITE          a directory of unpacked wheels to import from (default: .gpu_site beside the Makefile, if there)
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
out="${1:-$root/build/gpu_check}"
shift || true
site="${GPU_SITE:-$root/.gpu_site}"
mkdir -p "$out"
packages="$(cd "$out" && pwd)/packages"  # benchmarks/ under the name that an installation gives it
mkdir -p "$packages"
ln -sfn "$root/benchmarks" "$packages/inferneo_benchmarks"
export PYTHONPATH="$root:$root/kernels:$packages${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
cd "$root"
exec "${PYTHON:-python3}" -m inferneo_benchmarks.gpu.check "$out" "$@"
