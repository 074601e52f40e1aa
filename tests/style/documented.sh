#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: documented.sh DOXYFILE
# Every name of the reference has a comment. Versions of Doxygen disagree about what else they warn
# of; that is shown and judges nothing.
set -euo pipefail
doxyfile=$1
if ! command -v doxygen >/dev/null; then
  echo "cohort-skip: style.documented: doxygen is not installed"
  exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# warnings [SETTING...]: what Doxygen says with the Doxyfile and further settings.
warnings() {
  { cat "$doxyfile"; printf '%s\n' "OUTPUT_DIRECTORY = $work" "$@"; } | doxygen - 2>&1 || echo "doxygen failed"
}

# The check sees what it is there to see.
printf '/// \\file\n/// Words.\n/// A class.\nclass Told { public: void untold(); /** Words. */ void told(); int bare; };\n' >"$work/sample.hpp"
warnings "INPUT = $work/sample.hpp" "USE_MDFILE_AS_MAINPAGE =" >"$work/found"
for name in untold bare; do
  grep -q "$name.*is not documented" "$work/found" || { echo "FAILED: $name went unnoticed"; cat "$work/found"; exit 1; }
done
! grep -q "Member told" "$work/found" || { echo "FAILED: what has a comment was found"; exit 1; }

warnings >"$work/warnings"
cat "$work/warnings"
if grep -q "is not documented\|doxygen failed" "$work/warnings"; then
  echo "FAILED: the names above have no comment"
  exit 1
fi
for page in index classcohort_1_1DecodeContextParallelGroup structcohort_1_1CudaOptions; do
  grep -q "<title>" "$work/html/$page.html" || { echo "FAILED: no page $page"; exit 1; }
done
echo "documented: $(find "$work/html" -name '*.html' | wc -l) pages"
