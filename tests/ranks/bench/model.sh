#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bench/model: the header of sizes has what the model derives, every measured row of an own kernel on
# two cards is within a tenth of its prediction, and rows of more cards give their constants back.
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
if ! command -v python3 >/dev/null; then
  echo "cohort-skip: bench.model: python3 is not installed"
  exit 77
fi
export PYTHONDONTWRITEBYTECODE=1
# shellcheck source=tests/ranks/bench/scratch.sh
source "$(dirname "$0")/scratch.sh"
cd "$folder"
model="$root/bench/model"
header="$root/include/cohort/cuda/path_sizes.hpp"

"$model" --header >output 2>&1 || fail "the header has other sizes than the model"
sed 's/one_step_sent = 432/one_step_sent = 448/' "$header" >other.hpp
! cmp -s "$header" other.hpp || fail "no size to change"
! "$model" --header other.hpp >output 2>&1 || fail "a changed size was accepted"
"$model" --write other.hpp >output 2>&1 && cmp -s "$header" other.hpp || fail "--write does not restore the header"
sed -i '/bench\/model: end/d' other.hpp
! "$model" --write other.hpp >output 2>&1 || fail "a header without its marks was written"

"$model" --check >output 2>&1 || fail "rows of own kernels are outside"
for call in all_gather reduce_scatter all_reduce merge gather_query; do
  grep -Eq "^own, $call by the faster path: ([0-9]+) of \1 rows" output || fail "no rows of $call by the faster path"
  grep -Eq "^own, $call in cohort_bench: ([0-9]+) of \1 rows" output || fail "no rows of $call in cohort_bench"
done
grep -Eq '^NCCL on registered buffers, all_gather: [0-9]+ of 16 rows' output || fail "NCCL's rows are not shown"

# Rows as a model with other constants has them give those constants, all seven.
python3 - "$root/bench" >rows.json <<'END'
import json, sys
sys.path.insert(0, sys.argv[1])
from own_model import OwnModel
made = OwnModel(dict(words=1.9, lines=2.2, link=300.0, rank=0.25, flight=1.4, merge=0.6, query=0.3))
rows = []
for ranks in (2, 4, 8):
    for total in (2 << 10, 64 << 10, 1 << 20, 16 << 20):
        for path, name in (("words", "flag_word"), ("lines", "flag_line")):
            rows.append({"op": "all_gather", "ranks": ranks, "total_bytes": total, "path": name,
                         "us": made.path_us("all_gather", path, ranks, total)})
    for total in (2 << 10, 1 << 20):  # one step, and two but with two ranks
        call = "all_reduce in two steps" if ranks > 2 and total == 1 << 20 else "all_reduce"
        rows.append({"op": "all_reduce", "ranks": ranks, "total_bytes": total, "path": "flag_word",
                     "us": made.path_us(call, "words", ranks, total)})
    for batch in (1, 16):
        for call in ("merge", "gather_query"):
            rows.append({"op": call, "ranks": ranks, "batch": batch, "path": "flag_line",
                         "us": made.path_us(call, "lines", ranks, batch)})
json.dump({"kernels": [], "rows": rows}, sys.stdout)
END
"$model" --fit rows.json >output 2>&1 || fail "--fit ended with $?"
for constant in 'words 1.9 ' 'lines 2.2 ' 'link 300 ' 'rank 0.25 ' 'flight 1.4 ' 'merge 0.6 ' 'query 0.3 '; do
  grep -q "^fit: .*$constant" output || fail "--fit does not find $constant"
done
cp "$header" fitted.hpp
"$model" --fit rows.json --write fitted.hpp >output 2>&1 || fail "--fit --write"
! cmp -s "$header" fitted.hpp || fail "--fit changed no size"
"$model" --header >output 2>&1 || fail "--fit of another header changed the model's constants"
echo '{"kernels": [], "rows": []}' >none.json
! "$model" --fit none.json >output 2>&1 || fail "no rows were enough for a fit"
sed 's/"kernels"/"setting": "1 card(s)", "kernels"/' rows.json >shared.json
! "$model" --fit shared.json >output 2>&1 || fail "ranks that share a card were taken for cards"
echo '{}' >damaged.json
! "$model" --fit damaged.json >output 2>&1 || fail "a file without rows was accepted"
echo "bench.model: the header, the measured rows and the model agree"
