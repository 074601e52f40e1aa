#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The scripts around result files: compare finds slow, missing and wrong rows, report fills the
# section between the README's markers and nothing else, and damaged files are refused.
set -euo pipefail
bench=$(cd "$(dirname "$0")/../../../bench" && pwd)
if ! command -v python3 >/dev/null; then
  echo "cohort-skip: bench.report: python3 is not installed"
  exit 77
fi
export PYTHONDONTWRITEBYTECODE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

fail() {
  echo "FAILED: $*"
  cat output 2>/dev/null || true
  exit 1
}

# row BENCH PATH PLAN MODE BYTES BATCH US WRONG
row() {
  printf '{"bench": "%s", "path": "%s", "plan": "%s", "mode": "%s", "dtype": "f32", "ranks": 2, "bytes": %s, "batch": %s, "us_p50": %s, "us_p95": %s, "us_min": %s, "algbw": 1, "busbw": 1, "wrong": %s}\n' \
    "$1" "$2" "$3" "$4" "$5" "$6" "$7" "$7" "$7" "$8"
}
meta='{"meta": {"command": "cohort_bench", "commit": "abc", "backend": "host", "ranks": 2, "cpu": "a CPU", "cores": 2, "mpi": "an MPI"}}'
{
  echo "$meta"
  row all_gather raw - eager 2048 0 1.0 0
  row all_gather symmetric - eager 2048 0 0.4 0
  row dcp_merge raw staged eager 4096 1 8.0 0
  row dcp_merge own one_kernel eager 4096 1 2.0 0
  row decode_step raw staged graph 9999 1 1000 0
  row decode_step own one_kernel graph 9999 1 250 0
  row scope symmetric - eager 0 0 0.002 0
} >base.json

# compared STATUS WORD [OPTION...]: what comparing base.json with new.json gives.
compared() {
  local wanted=$1 word=$2 status=0
  shift 2
  "$bench/compare" base.json new.json "$@" >output 2>&1 || status=$?
  [[ $status == "$wanted" ]] && grep -q -- "$word" output || fail "compare $* gave $status, not $wanted with $word"
}
cp base.json new.json
compared 0 "7 rows compared.*0 with problems"
sed 's/"us_p50": 0.4,/"us_p50": 0.5,/' base.json >new.json
compared 1 "1.250 .*all_gather symmetric .*SLOWER"
compared 0 "0 with problems" --bound 1.3
compared 0 "0 with problems" --bench dcp_merge
grep -v '"scope"' base.json >new.json
compared 1 "scope .*MISSING"
sed '3s/"wrong": 0/"wrong": 5/' base.json >new.json
compared 1 "5 WRONG"
echo 'no JSON' >new.json
compared 2 "not JSON"
{ head -n 4 base.json; printf '{"bench": "all'; } >new.json  # as a killed run leaves it
compared 1 "4 with problems"
head -n 2 base.json | sed 's/"us_min": 1.0, //' >new.json
compared 2 "no us_min"

printf '# Title\nbefore\n<!-- results:begin -->\nstale 12345\n<!-- results:end -->\nafter\n' >README.md
"$bench/report" base.json --readme README.md --plots plots >output 2>&1 || fail "report ended with $?"
for text in '^# Title$' '^before$' '^after$' 'a CPU (2 cores), 2 ranks, host' '| 2 KiB | 1.00 | 0.40 | \*\*0.40\*\* |' \
  '| 1 | 8.00 | 2.00 | \*\*0.25\*\* |' '| Cohort, own kernels, one_kernel (graph) | 250.0 | \*\*0.25\*\* | - |' \
  '7 of 7 rows checked, 0 wrong' 'scope, entry and exit | 2.0 ns'; do
  grep -q -- "$text" README.md || { cat README.md; fail "the README has no $text"; }
done
! grep -q stale README.md || fail "the old results are still there"
cp README.md once.md
"$bench/report" base.json --readme README.md --plots plots >output 2>&1
cmp -s README.md once.md || fail "a second report changed the README"
{ # PyTorch's rows join those of their machine, and many payloads are shown by turns
  echo "${meta/'"mpi": "an MPI"'/'"torch": "9.9"'}"
  row all_gather torch - eager 2048 0 3.0 0
} >torch.json
for ((bytes = 4096; bytes <= 1 << 20; bytes *= 2)); do row all_gather raw - eager "$bytes" 0 1.0 0; done >>base.json
"$bench/report" torch.json base.json --readme README.md --plots plots >output 2>&1 || fail "report with PyTorch"
for text in '| 2 KiB | 3.00 | 1.00 | 0.40 | \*\*0.40\*\* |' '| 8 KiB | - | 1.00 |' 'PyTorch 9.9; 17 of 17 rows'; do
  grep -q -- "$text" README.md || { cat README.md; fail "the README has no $text"; }
done
[[ $(grep -c '^### ' README.md) == 1 ]] || fail "PyTorch's rows have a section of their own"
! grep -q '| 4 KiB |' README.md || fail "all of many payloads are shown"
if python3 -c 'import matplotlib' 2>/dev/null; then
  for picture in latency merge decode; do
    grep -q '<svg' "plots/base-$picture.svg" || fail "no picture of $picture"
    grep -q "plots/base-$picture.svg" README.md || fail "the README does not show $picture"
  done
else
  grep -q 'python3-matplotlib is not installed' output || fail "no word of the missing pictures"
  echo "cohort-skip: bench.report pictures: python3-matplotlib is not installed"
fi
echo '# no markers' >README.md
if "$bench/report" base.json --readme README.md --plots plots >output 2>&1; then
  fail "a README without markers was accepted"
fi
[[ $(cat README.md) == '# no markers' ]] || fail "a README without markers was changed"

python3 "$bench/torch_baseline.py" --help >output 2>&1 || fail "torch_baseline.py --help"
echo "bench.report: compare, report and the facts of result files are as they should be"
