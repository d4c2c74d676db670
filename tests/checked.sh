#!/usr/bin/env bash
# Tests on kernels that check every access: a read or write beyond a buffer is an error, not luck.
#   tests/checked.sh bounds [quick]     Cython's bounds checks (the default)
#   tests/checked.sh address [quick]    AddressSanitizer: GCC with libasan
#   tests/checked.sh valgrind [quick]   the ordinary kernels under valgrind's memcheck (slow)
# The kernels are built in a folder of their own, which goes with this run. `quick`: what concerns memory alone, about half a minute of CPU; else all tests of what reaches a kernel.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
KIND=${1:-bounds}
PART=${2:-all}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir "$WORK/ccc"
cp "$ROOT"/ccc/*.py "$ROOT"/ccc/*.npz "$ROOT"/ccc/report.ipynb "$WORK/ccc/"
cp "$ROOT/setup.py" "$ROOT/settings.ini" "$ROOT/README.md" "$WORK/"
cd "$WORK"                                                   # before the checkout on sys.path: `import ccc` is this copy
export CCC_KERNELS=$KIND OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONPATH="$WORK" TMPDIR="$WORK"
python setup.py -q build_ext --inplace > build.log 2>&1 || { cat build.log; exit 1; }
TESTS=("$ROOT/tests/test_safety.py")
SELECT=()
if [ "$PART" = quick ]; then SELECT=(-k "harms or fitted_as or is_none or any_form or counts or complete or scale or copies")
else TESTS+=("$ROOT"/tests/test_{neighbors,hdc,labels,evaluation}.py); fi
RUN=(python)
case $KIND in
    bounds) ;;
    address) export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=0
             SELECT=(-k "${SELECT[1]:-not forked}") ;;
    valgrind) export PYTHONMALLOC=malloc OMP_NUM_THREADS=1
              RUN=(valgrind --quiet --error-exitcode=99 --undef-value-errors=no python) ;;
    *) echo "the first word must be bounds, address or valgrind; got $KIND"; exit 2 ;;
esac
python -c 'import ccc, ccc._hdc_kernels as k; assert k.is_compiled() and ccc.__file__.startswith("'"$WORK"'"), (k, ccc)'
# An access beyond a buffer inside a loop without the interpreter can only be reported, not raised: the report is an error here.
"${RUN[@]}" -m pytest -q -p no:cacheprovider -W error::pytest.PytestUnraisableExceptionWarning "${TESTS[@]}" "${SELECT[@]}" "${@:3}"
