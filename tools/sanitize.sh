#!/usr/bin/env bash
# Looks for accesses out of bounds and for races in a few small tests that together run every kernel: forward and backward, packed
# sequences, grouped heads, V != D, 16-bit and fp32 operands, without a solve, and decode. Needs a CUDA card. Three tools:
# compute-sanitizer's memcheck and racecheck, and stalls, random ones of single warps (tests/helpers/stalls.py), for racecheck does
# not see what asynchronous products read.
#
#   tools/sanitize.sh [PYTHON]      COMPUTE_SANITIZER=/path/to/compute-sanitizer   LOGS=build/sanitize
#   SHARDS=12 tools/sanitize.sh     all tests of the kernels, in so many processes at once
#   SHARDS=12 SELECT=options ...    those of them that pytest's -k selects
#   TOOLS="racecheck stalls"        some of the three
#
# PyTorch's caching allocator is off under compute-sanitizer, for it hands out parts of large blocks, whose neighbours an
# out-of-bounds access would hit unseen. Only our own kernels are instrumented.
#
# NOTE [Results under memcheck] Under memcheck (2025.3) the plain key-gradient kernel gives wrong sums, up to NaN, where ptxas puts
# spills between a warpgroup's product and the wait for it, with ptxas 12.8, 12.9 and 13.5 alike; not under racecheck, with
# stalls, or as it is. The likely reason is that memcheck instruments the spills. So memcheck's findings count, and that tests
# fail their assertions under it is only reported: results count from the other runs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-.venv/bin/python}
logs=${LOGS:-build/sanitize}
sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
if ! [ -x "$sanitizer" ]; then
    echo "sanitize: expected compute-sanitizer on PATH or in COMPUTE_SANITIZER, found none at $sanitizer" >&2
    exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "sanitize: needs a CUDA card" >&2
    exit 2
fi
mkdir -p "$logs"

tests=tests/gpu/test_kernels.py
declare -A groups=(
    [dense]="$tests::test_options[decay_gate-torch.bfloat16]"
    [dimension_128]="$tests::test_options_at_head_dimension_128[decay_gate]"
    [fp32]="$tests::test_options[token_ridge-torch.float32]"
    [packed]="$tests::test_options[packed-torch.bfloat16]"
    [dimensions]="$tests::test_other_head_dimensions[80-48]"
    [wide]="$tests::test_head_groups[4-65]"
    [solve]="$tests::test_chunk_solve[{'seq_lengths': (5, 0, 64, 131)}-torch.float16]"
    [no_solve]="$tests::test_without_solve[True-torch.bfloat16]"
    [decode]="$tests::test_decode_continues_a_prefill"
)
if [ -n "${SHARDS:-}" ]; then
    groups=()
    mapfile -t all < <("$python" -m pytest --collect-only -q -p no:cacheprovider -k "${SELECT:-}" $tests | grep '::')
    for i in "${!all[@]}"; do # a test a line
        groups[shard_$((i % SHARDS))]+="${all[$i]}"$'\n'
    done
    if [ ${#all[@]} -eq 0 ]; then # nothing would run, and nothing fail
        echo "sanitize: expected tests in $tests, pytest found none" >&2
        exit 2
    fi
fi

only_assertions_failed() { # LOG
    grep -q '^E  *AssertionError' "$1" && ! grep -q ' skipped\|^ERROR ' "$1" && ! grep '^E  *[A-Za-z.]*Error' "$1" | grep -qv AssertionError
}

# A test that was skipped or renamed is not taken for a clean one.
run_all() { # NAME COMMAND...: every group at once; fails if one does
    local name=$1 group pid code failed=0 ids log
    shift
    declare -A pids=()
    for group in "${!groups[@]}"; do
        mapfile -t ids < <(printf '%s\n' "${groups[$group]}" | grep .)
        "$@" -m pytest -q -p no:cacheprovider -p no:xdist "${plugins[@]}" "${ids[@]}" >"$logs/$name-$group.log" 2>&1 &
        pids[$group]=$!
    done
    for group in "${!pids[@]}"; do
        log=$logs/$name-$group.log
        wait "${pids[$group]}"
        code=$?
        if [ $code -eq 0 ] && grep -q ' passed' "$log" && ! grep -q ' skipped' "$log"; then
            echo "$name $group: clean"
        elif [ "$name" = memcheck ] && [ $code -eq 1 ] && grep -q 'ERROR SUMMARY: 0 errors' "$log" && only_assertions_failed "$log"; then
            echo "$name $group: clean, but results differ (NOTE [Results under memcheck]): $(grep -c '^FAILED' "$log") tests"
        else
            echo "$name $group: FAILED, see $log" >&2
            tail -n 15 "$log" >&2
            failed=1
        fi
    done
    return $failed
}

# First as they are: this compiles the kernels, side by side and only once.
plugins=()
run_all plain "$python" || exit 1

check=("$sanitizer" --target-processes all --kernel-regex kns=chunk_ --kernel-regex kns=recurrent_ --report-api-errors no --error-exitcode 9)
status=0
for tool in ${TOOLS:-memcheck racecheck stalls}; do
    case $tool in
    memcheck) PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_all $tool "${check[@]}" --tool memcheck "$python" || status=1 ;;
    racecheck) PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_all $tool "${check[@]}" --tool racecheck --racecheck-report analysis "$python" || status=1 ;;
    stalls)
        plugins=(-p tests.helpers.stalls)
        TRITON_CACHE_DIR=$(mktemp -d) run_all $tool "$python" || status=1
        plugins=()
        ;;
    *)
        echo "sanitize: expected memcheck, racecheck or stalls, got $tool" >&2
        exit 2
        ;;
    esac
done
exit $status
