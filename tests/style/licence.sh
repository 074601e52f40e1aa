#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: licence.sh ROOT
# Every source says under which licence it stands, by the first line, in a script by that after the
# "#!": what LICENSE holds. Data, pages and dotfiles say nothing.
set -euo pipefail
cd "$1"
line="SPDX-License-Identifier: Apache-2.0"

# without_line FILE...: those of the files that do not say it where they should.
without_line() {
  awk -v line="$line" '
    FNR == 1 { said = 0; where = /^#!/ ? 2 : 1 }
    FNR == where && ($0 == "// " line || $0 == "# " line) { said = 1 }
    FNR == where && !said { print FILENAME }' "$@"
}

sample=$(mktemp)
trap 'rm -f "$sample"' EXIT
for text in '#pragma once' '#!/bin/sh\ntrue' "\\n// $line" "#!/bin/sh\\n\\n# $line"; do
  printf '%b\n' "$text" >"$sample"
  [[ -n $(without_line "$sample") ]] || { echo "FAILED: this went unnoticed: $text"; exit 1; }
done

grep -q 'Apache License' LICENSE && grep -q '^ *Copyright The Cohort authors$' LICENSE ||
  { echo "FAILED: LICENSE names no Apache License or no holder"; exit 1; }
mapfile -t files < <(find CMakeLists.txt .ci/run include src examples tests bench cmake -type f \
  ! -name '.*' ! -path '*/__pycache__/*' ! -name '*.md' ! -name '*.json' ! -name '*.svg' | LC_ALL=C sort)
without=$(without_line "${files[@]}")
if [[ -n $without ]]; then
  echo "FAILED: without the line \"$line\":"
  echo "$without"
  exit 1
fi
((${#files[@]} > 300)) || { echo "FAILED: only ${#files[@]} sources were found"; exit 1; }
echo "licence: ${#files[@]} sources say it"
