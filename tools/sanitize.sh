#!/usr/bin/env bash
# compute-sanitizer's memcheck and racecheck over a few small tests that together run every kernel: forward and backward, packed
# sequences, grouped heads, V != D, 16-bit and fp32 operands, without a solve, and decode. Needs a CUDA card.
#
#   tools/sanitize.sh [PYTHON]      COMPUTE_SANITIZER=/path/to/compute-sanitizer   LOGS=build/sanitize
#   SHARDS=12 tools/sanitize.sh     all tests of the kernels, in so many processes at once
#   TOOLS=racecheck                 one of the two alone
#
# PyTorch's caching allocator is off, for it hands out parts of large blocks, whose neighbours an out-of-bounds access would
# hit unseen. Only our own kernels are instrumented. racecheck sees shared memory only.
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
    mapfile -t all < <("$python" -m pytest --collect-only -q -p no:cacheprovider $tests | grep '::')
    for i in "${!all[@]}"; do # a test a line
        groups[shard_$((i % SHARDS))]+="${all[$i]}"$'\n'
    done
    if [ ${#all[@]} -eq 0 ]; then # nothing would run, and nothing fail
        echo "sanitize: expected tests in $tests, pytest found none" >&2
        exit 2
    fi
fi

# A test that was skipped or renamed is not taken for a clean one.
run_all() { # NAME COMMAND...: every group at once; fails if one does
    local name=$1 group pid failed=0 ids
    shift
    declare -A pids=()
    for group in "${!groups[@]}"; do
        mapfile -t ids < <(printf '%s\n' "${groups[$group]}" | grep .)
        "$@" "$python" -m pytest -q -p no:cacheprovider -p no:xdist "${ids[@]}" >"$logs/$name-$group.log" 2>&1 &
        pids[$group]=$!
    done
    for group in "${!pids[@]}"; do
        pid=${pids[$group]}
        if wait "$pid" && grep -q ' passed' "$logs/$name-$group.log" && ! grep -q ' skipped' "$logs/$name-$group.log"; then
            echo "$name $group: clean"
        else
            echo "$name $group: FAILED, see $logs/$name-$group.log" >&2
            tail -n 15 "$logs/$name-$group.log" >&2
            failed=1
        fi
    done
    return $failed
}

# First as they are: this compiles the kernels, side by side and only once.
run_all plain || exit 1

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
check=("$sanitizer" --target-processes all --kernel-regex kns=chunk_ --kernel-regex kns=recurrent_ --report-api-errors no --error-exitcode 1)
status=0
for tool in ${TOOLS:-memcheck racecheck}; do
    options=()
    if [ "$tool" = racecheck ]; then
        options=(--racecheck-report analysis)
    fi
    run_all "$tool" "${check[@]}" --tool "$tool" "${options[@]}" || status=1
done
exit $status
