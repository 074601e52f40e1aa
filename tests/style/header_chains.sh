#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: header_chains.sh INCLUDE-FOLDER HEADER...
# As few chains of headers as there can be, a line each, in which every header includes all those
# before it. A file that includes such a chain shows of each of its headers that it compiles alone: to
# none does it bring what the header does not include itself. Those that take most come first.
set -euo pipefail
cd "$1"
shift
grep -H '^ *# *include *[<"]cohort/' "$@" | awk -v headers="$*" '
  # Marks what the header includes, itself or through others.
  function reach(header, from,    i, n, targets) {
    n = split(includes[from], targets, " ")
    for (i = 1; i <= n; i++) {
      if ((header, targets[i]) in below) continue
      below[header, targets[i]] = 1
      size[header]++
      if (targets[i] in wanted) list[header] = list[header] " " targets[i]
      reach(header, targets[i])
    }
  }

  # Gives the header a successor of its own, and those that are in its way others.
  function place(header,    i, n, targets) {
    n = split(list[header], targets, " ")
    for (i = 1; i <= n; i++) {
      if (seen[targets[i]] == round) continue
      seen[targets[i]] = round
      if (!(targets[i] in above) || place(above[targets[i]])) {
        above[targets[i]] = header
        return 1
      }
    }
    return 0
  }

  { file = $0; sub(/:.*/, "", file); sub(/^[^<"]*[<"]/, ""); sub(/[>"].*/, "") }
  { includes[file] = includes[file] " " $0 }

  END {
    count = split(headers, name, " ")
    for (h = 1; h <= count; h++) wanted[name[h]] = 1
    for (h = 1; h <= count; h++) reach(name[h], name[h])
    for (h = 1; h <= count; h++) { round = h; place(name[h]) }
    for (lower in above) under[above[lower]] = lower
    for (h = 1; h <= count; h++) {
      if (name[h] in above) continue
      chain = name[h]
      for (at = name[h]; at in under; at = under[at]) chain = under[at] " " chain
      print size[name[h]] + 0, chain
    }
  }' | LC_ALL=C sort -k 1,1nr -k 2 | cut -d ' ' -f 2-
