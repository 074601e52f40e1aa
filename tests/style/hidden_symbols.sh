#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the library's archive defines is hidden: modules that each link it keep to their own kernels.
# Usage: hidden_symbols.sh ARCHIVE
set -euo pipefail

symbols=$(readelf --symbols --wide "$1" |
  awk '$7 != "UND" && ($5 == "GLOBAL" || $5 == "WEAK") && $8 ~ /^_Z[A-Z]*N?K?6cohort/ { print $6, $8 }')
[[ -n $symbols ]] || { echo "hidden symbols: $1 defines nothing of the library's"; exit 1; }
if visible=$(grep -v '^HIDDEN ' <<<"$symbols"); then
  echo "hidden symbols: $1 shows"
  cut -d ' ' -f 2 <<<"$visible" | sort -u | c++filt | head -n 20
  exit 1
fi
echo "hidden symbols: $(wc -l <<<"$symbols") of the library's, none visible"
