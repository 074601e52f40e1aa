#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The scripts around result files: compare finds slow, missing and wrong rows, report writes the page
# of all tables and, between the README's markers and nowhere else, its figures, and damaged files are
# refused. The committed pages are what report makes of the committed files.
set -euo pipefail
bench=$(cd "$(dirname "$0")/../../../bench" && pwd)
if ! command -v python3 >/dev/null; then
  echo "cohort-skip: bench.report: python3 is not installed"
  exit 77
fi
export PYTHONDONTWRITEBYTECODE=1
# shellcheck source=tests/ranks/bench/scratch.sh
source "$(dirname "$0")/scratch.sh"
cd "$folder"

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
sed '1s/"ranks": 2,/"inputs": "written", "ranks": 2,/' base.json >new.json
compared 2 "inputs are kept in base.json, written in new.json"
echo 'no JSON' >new.json
compared 2 "not JSON"
{ head -n 4 base.json; printf '{"bench": "all'; } >new.json  # as a killed run leaves it
compared 1 "4 with problems"
head -n 2 base.json | sed 's/"us_min": 1.0, //' >new.json
compared 2 "no us_min"

# interleave runs two programs in turn, each first in every second round, and compares the medians.
mkdir bin
printf '#!/bin/sh\nshift 2\nexec "$@"\n' >bin/mpirun
printf '#!/bin/sh\nfor last; do :; done\nprintf "%%s" "${0##*/}" >>order\ncp base.json "$last"\n' >a
printf '#!/bin/sh\nfor last; do :; done\nprintf "%%s" "${0##*/}" >>order\nsed "s/: 0.4, \(.us_p95\)/: $(wc -c <order), \\\\1/" base.json >"$last"\n' >b
chmod +x bin/mpirun a b
status=0
PATH="$folder/bin:$PATH" "$bench/interleave" ./a ./b --rounds 3 --json kept -- --bench x >output 2>&1 || status=$?
[[ $status == 1 && $(cat order) == abbaab ]] || fail "interleave gave $status after $(cat order)"
grep -q "7.500 .*all_gather symmetric .*SLOWER" output || fail "interleave compares no medians"  # of 2, 3, 6
[[ $(wc -l <kept-new.json) == 8 ]] || fail "interleave kept no rows"
printf '#!/bin/sh\nexit 3\n' >b
status=0
PATH="$folder/bin:$PATH" "$bench/interleave" ./a ./b -- --bench x >output 2>&1 || status=$?
[[ $status == 2 ]] && grep -q "status 3" output || fail "interleave gave $status for a program that fails"

# has FILE TEXT...
has() {
  local file=$1 text
  shift
  for text in "$@"; do
    grep -q -- "$text" "$file" || { cat "$file"; fail "$file has no $text"; }
  done
}
report() { "$bench/report" "$@" --readme README.md --page page.md --plots plots >output 2>&1; }

printf '# Title\nbefore\n<!-- results:begin -->\nstale 12345\n<!-- results:end -->\nafter\n' >README.md
report base.json || fail "report ended with $?"
has README.md '^# Title$' '^before$' '^after$' 'a CPU (2 cores), 2 ranks, host' 'headline.svg' '7 of 7 rows checked, 0 wrong' \
  '| communication of one token decoded with DCP, batch 1 | 1000.0 us (MPI, staged) | 250.0 us (Cohort, own kernels, one_kernel) | \*\*0.25\*\* |' \
  '| one merge, batch 1 | 8.0 us (MPI, staged) | 2.0 us (Cohort, own kernels, one_kernel) | \*\*0.25\*\* |' '61 layers of 128 heads of 512'
! grep -q stale README.md || fail "the old results are still there"
has page.md '| 2 KiB | 1.00 | 0.40 | \*\*0.40\*\* |' '| 1 | 8.00 | 2.00 | \*\*0.25\*\* |' \
  '| Cohort, own kernels, one_kernel (graph) | 250.0 | \*\*0.25\*\* | - |' '7 of 7 rows checked, 0 wrong' 'scope, entry and exit | 2.0 ns'
has plots/headline.svg '<svg' '>MPI, staged<' '>1000<' '>250<' '</svg>'
cp README.md once.md
cp page.md once_page.md
report base.json
cmp -s README.md once.md && cmp -s page.md once_page.md || fail "a second report changed the pages"
"$bench/report" base.json --print >printed && diff printed <(cat page.md; echo) | grep -v '^[<>] *$' | grep '^[<>]' |
  grep -v '!\[' && fail "--print prints another page"
# What the command line does not say is cohort_bench's default.
for text in 'heads = 128;' 'head_dim = 512;' 'layers = 61;' 'context = 128 << 10;'; do has "$bench/cohort_bench/options.hpp" "$text"; done
sed '1s/"cohort_bench"/"cohort_bench --layers 7"/' base.json >seven.json
report seven.json && has README.md '7 layers of 128 heads of 512'
{ # PyTorch's rows join those of their machine, and many payloads are shown by turns
  echo "${meta/'"mpi": "an MPI"'/'"torch": "9.9"'}"
  row all_gather torch - eager 2048 0 3.0 0
} >torch.json
for ((bytes = 4096; bytes <= 1 << 20; bytes *= 2)); do row all_gather raw - eager "$bytes" 0 1.0 0; done >>base.json
report torch.json base.json || fail "report with PyTorch"
has page.md '| 2 KiB | 3.00 | 1.00 | 0.40 | \*\*0.40\*\* |' '| 8 KiB | - | 1.00 |' 'PyTorch 9.9; 17 of 17 rows'
[[ $(grep -c '^### ' page.md) == 1 ]] || fail "PyTorch's rows have a section of their own"
! grep -q '| 4 KiB |' page.md || fail "all of many payloads are shown"
echo '{"gpu": "a card", "setting": "graph", "kernels": [], "rows": [{"op": "merge", "ranks": 2, "batch": 1, "path": "lines", "us": 3.5},
  {"op": "merge", "ranks": 2, "batch": 1, "path": "words", "us": 2.5}, {"op": "pack", "us": 9}]}' >kernels.json
report base.json kernels.json || fail "report with kernels"
has page.md 'own kernels by themselves: a card, graph' '| merge, batch 1, 2 ranks | 2.50 | words |' '| pack | 9.00 | - |'
sed 's/"op": "pack", //' kernels.json >damaged.json
! report base.json damaged.json || fail "a row of a kernel without a name was accepted"
{ # what the host spends is apart from what calls take, and merges have a column for each form
  cat base.json
  row ceiling peer_read - issue 65536 0 2.5 0
  row ceiling peer_write - issue 65536 0 9.5 0
  row all_gather own - issue 2048 0 2.75 0
  row dcp_merge own one_kernel issue 4096 1 3.25 0
  row merge_splits own one_kernel eager 16384 1 4.0 0
  row merge_splits own one_kernel+combine eager 16384 1 6.0 0
} >forms.json
report forms.json || fail "report with forms of merges"
has page.md '| one kernel by itself | 2.50 us |' '| all_gather, 2 KiB, f32: Cohort, own kernels | 2.75 us |' \
  '| dcp_merge, batch 1, f32: Cohort, own kernels, one_kernel | 3.25 us |' '| 2 KiB | 1.00 | 0.40 |' \
  '| merge_splits, batch, f32 | Cohort, own kernels, one_kernel | Cohort, own kernels, one_kernel+combine |' '| 1 | 4.00 | 6.00 |'
{ # a whole decode has a section and a picture of its own
  echo "${meta/'"cores": 2'/'"cores": 2, "model": "two layers"'}"
  row decode_accuracy own automatic graph 0 3 0 0 | sed 's/}$/, "samples": 48, "way": "dcp-cohort", "right": 47, "least_margin": 0.01, "margin_bound": 0.25, "logit_difference": 0.03, "fp64_difference": 0.04, "loss": 1.5, "loss_alone": 1.25, "exceptions": [{"prompt": 2, "position": 9, "chosen": 5, "expected": 7, "margin": 0.01}]}/'
  for way in tp-raw:raw:400 dcp-raw:raw:500 dcp-cohort:own:300; do
    IFS=: read -r way path us <<<"$way"
    row decode_engine "$path" - graph 4096 1 "$us" null | sed "s/}\$/, \"way\": \"$way\", \"context\": 2048, \"tokens_a_second\": 9.5, \"tokens_that_fit\": 77, \"kv_bytes_per_rank\": 1024, \"attention_us\": 100, \"products_us\": 50, \"communication_us\": 40.25, \"rest_us\": 10}/"
  done
} >decode.json
report base.json decode.json || fail "report with a decode"
has page.md '### A whole decode: a CPU (2 cores), 2 ranks, host' '^two layers\.' 'plots/decode-engine.svg' \
  '| DCP, Cohort, automatic | 47 of 48 | 47 | 0.010 | 0.0300 | 0.0400 | +2.5e-01 | 0 |' \
  '| DCP, Cohort, automatic | 2 | 9 | 5 | 7 | 0.0100 |' 'may be off by 0.1250, choices differ up to margins of 0.2500' \
  '| 2K, 1 | 400.0 | 500.0 | 300.0 | \*\*0.75\*\* | - | \*\*0.60\*\* |' \
  '| DCP, MPI, staged | 100.0 | 50.0 | 40.2 | 10.0 | 10 | 1 KiB | 77 |'
has plots/decode-engine.svg '<svg' '>tensor parallelism, MPI<' '>200<' '>communication<' '</svg>'
[[ $(grep -c '^### ' page.md) == 2 ]] || fail "the decode has not a section of its own"
! grep -q 'whole decode' README.md || fail "a decode on a host is in the README"
{ # of cards, the README has three figures: at 8K and batch 1, at the most that fits without DCP, beside DCP on NCCL
  echo "${meta/'"backend": "host"'/'"backend": "cuda", "gpus": ["a card (1)", "a card (2)"], "model": "four layers"'}"
  for point in 1024:1:390:290 8192:1:400:300 8192:64:1000:900 131072:112:9000:6300; do
    IFS=: read -r context batch tp dcp <<<"$point"
    for way in "tp-raw:$tp" dcp-raw:600 "dcp-cohort:$dcp"; do
      row decode_engine own - graph 4096 "$batch" "${way#*:}" null | sed "s/}\$/, \"way\": \"${way%:*}\", \"context\": $context, \"tokens_a_second\": 9.5, \"tokens_that_fit\": 77, \"kv_bytes_per_rank\": 1024, \"attention_roofline_us\": 40, \"attention_us\": 100, \"products_us\": 50, \"communication_us\": 40.25, \"rest_us\": 10}/"
    done
  done
  row decode_engine own - graph 4096 224 12000 null | sed 's/}$/, "way": "dcp-cohort", "context": 131072, "tokens_a_second": 9.5, "tokens_that_fit": 77, "kv_bytes_per_rank": 2048, "attention_roofline_us": null, "attention_us": 100, "products_us": 50, "communication_us": 40.25, "rest_us": 10}/'
} >cards.json
report base.json cards.json || fail "report with a decode on cards"
has README.md '| one token, context 8K, batch 1 | 400.0 us (tensor parallelism, NCCL), 1 KiB | 300.0 us, 1 KiB | \*\*0.75\*\* |' \
  '| one token, context 128K, batch 112 | 9000.0 us (tensor parallelism, NCCL), 1 KiB | 6300.0 us, 1 KiB | \*\*0.70\*\* |' \
  '| one token, context 8K, batch 1 | 600.0 us (DCP, NCCL, staged), 1 KiB | 300.0 us, 1 KiB | \*\*0.50\*\* |' \
  '^2 x a card, 2 ranks, cuda; four layers\.' 'plots/cards-tpot.svg' '| one merge, batch 1 |'
has page.md '| over tensor parallelism, NCCL, context 8K, batch 1 | 1.00 | \*\*0.750\*\* | met | 0.706 |' \
  '| over tensor parallelism, NCCL, context 128K, batch 112 | 0.80 | \*\*0.700\*\* | met | 0.698 |'
has page.md '| 8K, 1: DCP, Cohort, automatic | 100.0 | 40.0 | 2.5 |' '^| context 128K, batch 224 |' '| 128K, 224 | - | - | 12000.0 |' \
  'plots/cards-tpot.svg' 'plots/cards-engine.svg'
has plots/cards-tpot.svg '<svg' '>batch 1: us a token<' '>8K<' '<polyline' '>DCP, Cohort, automatic<' '</svg>'
if python3 -c 'import matplotlib' 2>/dev/null; then
  for picture in latency merge decode; do
    has "plots/base-$picture.svg" '<svg'
    has page.md "plots/base-$picture.svg"
  done
else
  grep -q 'python3-matplotlib is not installed' output || fail "no word of the missing pictures"
  echo "cohort-skip: bench.report pictures: python3-matplotlib is not installed"
fi
echo '# no markers' >README.md
rm page.md
! report base.json || fail "a README without markers was accepted"
[[ $(cat README.md) == '# no markers' && ! -e page.md ]] || fail "a README without markers was changed"

# The committed pages, made again from the committed files.
cp "$bench/../README.md" committed.md
cp -r "$bench/results" committed
sed -i 's|(bench/results|(committed|g; s|\[bench/results|[committed|g' committed.md
cp committed.md again.md
shopt -s nullglob
files=("$bench"/results/*.json "$bench"/results/{own_kernels,decode_engine}/*.json)
PYTHONPATH= "$bench/report" "${files[@]}" --readme again.md --page committed/README.md --plots committed/plots >output 2>&1 ||
  fail "report of the committed files"
diff committed.md again.md >output || fail "README.md is not what bench/report writes"
diff "$bench/results/README.md" committed/README.md >output || fail "bench/results/README.md is not what bench/report writes"
cmp -s "$bench/results/plots/headline.svg" committed/plots/headline.svg || fail "headline.svg is not what bench/report writes"

python3 "$bench/torch_baseline.py" --help >output 2>&1 || fail "torch_baseline.py --help"
echo "bench.report: compare, report and the facts of result files are as they should be"
