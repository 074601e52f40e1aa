#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: decode_engine.sh DECODE_ENGINE RANKS MPIEXEC
# Decodes with the copying model by every way: right tokens, logits as in fp64 and as by one rank, equal
# bits where one order is promised, in graphs and eagerly, with stages as well; and a way that leaves out
# a sum is found.
set -euo pipefail
program=$1 ranks=$2 mpiexec=$3
# shellcheck source=tests/ranks/bench/scratch.sh
source "$(dirname "$0")/scratch.sh"
# ended STATUS OPTION...: a run ends so.
ended() {
  local wanted=$1 status=0
  shift
  timeout 100 "$mpiexec" -n "$ranks" "$program" "$@" >"$folder/output" 2>&1 || status=$?
  [[ $status == "$wanted" ]] || fail "$* ended with status $status, not $wanted"
}
# has TEXT...: the last output does.
has() {
  local text
  for text in "$@"; do grep -q -- "$text" "$folder/output" || fail "no $text"; done
}
# bits FILE: way and hash of each line of accuracy.
bits() { sed -n 's/.*"decode_accuracy".*"way": "\([^"]*\)".*"bits": "\([^"]*\)".*/\1 \2/p' "$1"; }

small=(--prompts 5 --tokens 16)
ways=$((ranks == 1 ? 2 : 6))
ended 0 "${small[@]}" --contexts 40 --batches 1,3 --iters 2 --steps 2 --json "$folder/graph.json"
has '^PASS$' '80 of 80 as one rank alone.* 80 right.* of 80 of fp64'
[[ $(grep -c '"bench": "decode_accuracy".*"wrong": 0,.*"right": 80,.*"exceptions": \[\]}$' "$folder/graph.json") == "$ways" ]] ||
  fail "not every way has its line of accuracy"
[[ $(grep -c '"bench": "decode_engine", .*"context": 40, .*"rest_us": [0-9.]*}$' "$folder/graph.json") == $((2 * ways)) ]] ||
  fail "not every way has its times"
head -n 1 "$folder/graph.json" | grep -q '^{"meta": {"command": "decode_engine .*"commit": .*"model": "tp' || fail "no facts"
# Of 2 layers, 40 tokens and 3 sequences of 80 elements in bf16, each rank has its part.
widest=$((ranks == 1 ? 0 : 1))
grep "\"way\": \"$( ((widest)) && echo dcp || echo tp)-cohort\"" "$folder/graph.json" |
  grep -q "\"batch\": 3, .*\"kv_bytes_per_rank\": $((2 * 3 * 40 * 80 * 2 / ranks))," || fail "no share of the cache"

if ((ranks < 4)); then
  ended 0 "${small[@]}" --iters 0 --mode eager --ways "$( ((widest)) && echo tp-cohort,dcp-cohort || echo tp-cohort)" \
    --json "$folder/eager.json"
  [[ -n $(bits "$folder/eager.json") ]] || fail "no bits"
  bits "$folder/eager.json" | while read -r line; do
    bits "$folder/graph.json" | grep -qxF "$line" || fail "${line% *} has other bits in graphs than eagerly"
  done
fi
case $ranks in
  1)
    ended 2 --heads 9 --dcp 3
    has 'must be a multiple of dcp=3'
    ended 2 --weights copy --vocabulary 64
    has 'the copying model: expected'
    ;;
  2)
    # 100 KiB are 320 tokens of 320 bytes, and with DCP twice as many: 5 sequences of 64, and 8, a multiple of 8.
    ended 0 --tokens 0 --iters 1 --steps 1 --contexts 40 --batches 1,100 --fill 64 --room 100K \
      --ways tp-cohort,dcp-cohort --json "$folder/room.json"
    has '^# no room for 100 sequences of 40 tokens$'
    found=$(sed -n 's/.*"batch": \([0-9]*\),.*"way": "\([a-z-]*\)".*"context": \([0-9]*\),.*/\3x\1-\2/p' "$folder/room.json" | xargs)
    [[ $found == "40x1-tp-cohort 40x1-dcp-cohort 64x5-tp-cohort 64x5-dcp-cohort 64x8-dcp-cohort" ]] ||
      fail "other rows than what fits: $found"
    ended 1 "${small[@]}" --iters 0 --ways dcp-raw,dcp-cohort --spoil dcp-cohort
    has '^FAILED$' 'WRONG: a logit is .* from one rank' 'WRONG: ranks have other bits than their peers' 'WRONG: a mean loss' \
      '^dcp-raw .*80 of 80 as one rank alone.* 80 right'
    [[ $(grep -n WRONG "$folder/output" | head -n 1 | cut -d: -f1) -gt $(grep -n '^dcp-cohort' "$folder/output" | cut -d: -f1) ]] ||
      fail "the sound way fails beside the spoilt one"
    ;;
  4)
    ended 0 "${small[@]}" --iters 0 --pp 2 --dcp 2 --vocabulary 30
    has '^PASS$'
    # Weights that mean nothing have small margins; queries are not compressed, tokens not divided evenly.
    ended 0 "${small[@]}" --iters 0 --weights random --query-rank 0 --layers 3 --dcp 2 --vocabulary 301
    has '^PASS$' '^dcp-cohort .*logits within 0.0[0-9]*[1-9]'
    ;;
esac
echo "decode_engine: right on $ranks ranks"
