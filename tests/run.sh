#!/usr/bin/env bash
# Every test: compiled kernels, notebooks, and what pytest holds (golden values, the library in step with the notebooks, the wheel).
set -euo pipefail
cd "$(dirname "$0")/.."
TMPDIR=$(mktemp -d); export TMPDIR                           # what tests and notebooks leave behind, gigabytes of weights, goes with this run
trap 'rm -rf "$TMPDIR"' EXIT
python setup.py -q build_ext --inplace                       # an edited kernel must not go on running its old build
# Two at a time on one thread each: OpenMP threads that share a core wait for one another.
export OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
nbdev_test --n_workers 2 --timing
find "$TMPDIR" -mindepth 1 -delete
python -m pytest tests -n 2 --dist loadfile              # files whole: their tests share runs and browsers
