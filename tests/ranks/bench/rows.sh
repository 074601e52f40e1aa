#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: rows.sh COHORT_BENCH RANKS MPIEXEC
# Measures a few tiny rows of every benchmark, all checked, and holds the result file to its schema:
# one line of facts, then rows with every key in its place and no wrong element.
set -euo pipefail
program=$1 ranks=$2 mpiexec=$3
# shellcheck source=tests/ranks/bench/scratch.sh
source "$(dirname "$0")/scratch.sh"

# 12 heads are divided by 2 and 3 ranks.
timeout 240 "$mpiexec" -n "$ranks" "$program" --check --goals --iters 3 --warmup 1 --max-seconds 2 \
  --min-bytes 1K --max-bytes 4K --factor 4 --batches 1,3 --heads 12 --head-dim 32 --rope 8 --unabsorbed 16 \
  --layers 2 --hidden 48 --context 64 --dtype f32,bf16 --json "$folder/rows.json" \
  >"$folder/output" 2>&1 || fail "cohort_bench on $ranks ranks ended with status $?"

text='"[^"]*"' number='-?[0-9]+(\.[0-9]+)?'
row="^\{\"bench\": $text, \"path\": $text, \"plan\": $text, \"mode\": \"(eager|graph)\", \"dtype\": $text"
row+=", \"ranks\": $ranks, \"bytes\": [0-9]+, \"batch\": [0-9]+, \"us_p50\": $number, \"us_p95\": $number"
row+=", \"us_min\": $number, \"algbw\": $number, \"busbw\": $number, \"wrong\": 0, \"calls\": [1-9][0-9]*"
row+=", \"samples\": [1-9][0-9]*(, \"kv_bytes_per_rank\": [0-9]+)?\}\$"
head -n 1 "$folder/rows.json" | grep -Eq '^\{"meta": \{"command": ' || fail "no facts in the first line"
for key in command commit date backend inputs ranks hosts cpu cores mpi environment; do
  head -n 1 "$folder/rows.json" | grep -q "\"$key\": " || fail "no $key among the facts"
done
if tail -n +2 "$folder/rows.json" | grep -Evn "$row"; then
  fail "these lines are no rows with checked results"
fi

# has BENCH PATH PLAN: such a row exists.
has() {
  grep -q "\"bench\": \"$1\", \"path\": \"$2\", \"plan\": \"$3\"" "$folder/rows.json" ||
    fail "no row of $1 $2 $3"
}
for bench in all_gather reduce_scatter all_reduce all_reduce_in_place all_gather_dim; do
  for path in raw shared_loop plain symmetric; do has "$bench" "$path" -; done
done
for bench in all_reduce_norm all_reduce_norm8; do
  for path in raw plain symmetric; do has "$bench" "$path" two_calls; done
  for path in plain symmetric; do has "$bench" "$path" -; done
done
for path in raw plain symmetric own; do has gather_query "$path" -; done
for bench in dcp_merge decode_step decode_step_unabsorbed; do
  has "$bench" raw staged
  has "$bench" raw staged_fp32
  has "$bench" symmetric packed
  has "$bench" own one_kernel
done
has decode_step raw tp_only
for bench in merge_by_token merge_sink; do
  for plan in staged packed; do has "$bench" symmetric "$plan"; done
  has "$bench" own one_kernel
done
for plan in one_kernel one_kernel+combine; do has merge_splits own "$plan"; done
for plan in one_kernel one_kernel+gather; do has merge_replicated own "$plan"; done
for path in raw plain symmetric own; do has gather_quantised "$path" -; done
has place_step plain -
has recorded_call plain record
for path in barrier peer_read peer_write; do has ceiling "$path" -; done
for plan in group group+call; do
  for path in plain own; do has formation "$path" "$plan"; done
done
for bench in arena scope registration; do has "$bench" symmetric -; done
grep -q 'scope entry and exit, ns' "$folder/output" || fail "no goals in the output"
grep -q 'TP without DCP: KV cache' "$folder/output" || fail "no summary of decode_step"

if command -v python3 >/dev/null; then
  python3 - "$folder/rows.json" <<'PY' || fail "a line is not JSON, or two rows are one"
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
assert "meta" in lines[0]
keys = [tuple(r[k] for k in ("bench", "path", "plan", "mode", "dtype", "ranks", "bytes", "batch"))
        for r in lines[1:]]
assert len(keys) == len(set(keys)), "two rows have one key"
assert all(r["us_min"] <= r["us_p50"] <= r["us_p95"] for r in lines[1:])
PY
fi

grep -q '"inputs": "written"' "$folder/rows.json" || fail "inputs are not written by default"
timeout 60 "$mpiexec" -n "$ranks" "$program" --check --inputs kept --bench all_reduce --max-bytes 2K --iters 2 \
  --json "$folder/kept.json" >"$folder/output" 2>&1 || fail "with kept inputs cohort_bench ended with status $?"
grep -q '"inputs": "kept"' "$folder/kept.json" || fail "kept inputs are not told"

# Wrong arguments end every rank with a message that names them.
expect() {
  local wanted=$1 status=0
  shift
  timeout 60 "$mpiexec" -n "$ranks" "$program" "$@" >"$folder/output" 2>&1 || status=$?
  [[ $status == 2 ]] && grep -qF -- "$wanted" "$folder/output" || fail "$* gave status $status"
}
expect '--bench: expected' --bench nothing
expect '--max-bytes: expected at least' --min-bytes 4K --max-bytes 2K
expect 'cannot write' --bench scope --json "$folder/missing/rows.json"
echo "cohort_bench: $(($(wc -l <"$folder/rows.json") - 1)) checked rows on $ranks ranks"
