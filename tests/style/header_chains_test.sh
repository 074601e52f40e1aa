#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: header_chains_test.sh COMPILER
# That chains of made-up headers hold each once, and show of one that it does not compile alone: it
# takes a name from a header that those who include it include before it.
set -euo pipefail
chains_of=$(dirname "$(realpath "$0")")/header_chains.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/cohort"
header() {  # NAME LINE...
  printf '%s\n' '#pragma once' "${@:2}" >"$work/cohort/$1.hpp"
}
header base 'struct Base {};'
header user '#include "cohort/base.hpp"' 'struct User { Base base; };'
header thief 'struct Thief { Base base; };'
header top '#include "cohort/base.hpp"' '#include "cohort/thief.hpp"' '#include <cohort/user.hpp>' 'struct Top { Thief thief; User user; };'
header over '#include "cohort/top.hpp"' 'struct Over { Top top; };'
header apart 'struct Apart {};'

failed=0
fail() { echo "FAILED: $1"; failed=1; }
"$chains_of" "$work" cohort/{apart,base,over,thief,top,user}.hpp >"$work/chains"
cat "$work/chains"
[[ $(tr ' ' '\n' <"$work/chains" | LC_ALL=C sort | tr '\n' ' ') == \
  "cohort/apart.hpp cohort/base.hpp cohort/over.hpp cohort/thief.hpp cohort/top.hpp cohort/user.hpp " ]] ||
  fail "not each header once"
(($(wc -l <"$work/chains") == 3)) || fail "not three chains"
while read -r -a chain; do
  printf '#include <%s>\n' "${chain[@]}" >"$work/chain.cpp"
  status=0
  "$1" -fsyntax-only -I "$work" "$work/chain.cpp" 2>"$work/errors" || status=$?
  if [[ " ${chain[*]} " == *" cohort/thief.hpp "* ]]; then
    grep -q 'thief.hpp.*error' "$work/errors" || fail "the thief went unnoticed in ${chain[*]}"
  elif [[ ${chain[*]} != *top* ]]; then  # which includes the thief after what it takes
    ((status == 0)) || { fail "${chain[*]}"; cat "$work/errors"; }
  fi
done <"$work/chains"
exit $failed
