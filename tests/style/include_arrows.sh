#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: include_arrows.sh ROOT [RULES]
# Checks the direction of every #include under ROOT/include and ROOT/src against include_layers.txt:
# each file belongs to a layer, includes only what its layer may, and no files include each other in
# a circle.
set -euo pipefail
root=$1
rules=${2:-$(dirname "$0")/include_layers.txt}
cd "$root"

find include src -type f \( -name '*.hpp' -o -name '*.cuh' -o -name '*.h' -o -name '*.cu' -o -name '*.cpp' \) |
  LC_ALL=C sort | awk -v rules="$rules" '
  function fail(text) { print "include arrows: " text; failures++ }

  # Whether text matches a pattern in which * stands for any characters.
  function matches(text, pattern) {
    gsub(/[.+]/, "[&]", pattern)
    gsub(/\*/, ".*", pattern)
    return text ~ ("^" pattern "$")
  }

  function layer_of(file,    i) {
    for (i = 1; i <= patterns; i++) if (matches(file, pattern[i])) return owner[i]
    return ""
  }

  function extern_of(header,    i) {
    for (i = 1; i <= foreigns; i++) if (matches(header, foreign[i])) return foreign_owner[i]
    return ""
  }

  # Depth first; a file met again while it is still open closes a circle.
  function visit(file,    i, targets, n) {
    if (state[file] == "closed") return
    if (state[file] == "open") { fail("circle through " file); return }
    state[file] = "open"
    n = split(edges[file], targets, " ")
    for (i = 1; i <= n; i++) visit(targets[i])
    state[file] = "closed"
  }

  BEGIN {
    while ((getline line < rules) > 0) {
      n = split(line, word, " ")
      if (n == 0 || word[1] ~ /^#/) continue
      known[word[2]] = 1
      for (i = 3; i <= n; i++) {
        if (word[1] == "layer") { pattern[++patterns] = word[i]; owner[patterns] = word[2] }
        else if (word[1] == "may") { allowed[word[2], word[i]] = 1; used[word[i]] = 1 }
        else if (word[1] == "extern") { foreign[++foreigns] = word[i]; foreign_owner[foreigns] = word[2] }
        else fail("unknown rule: " line)
      }
    }
    for (name in used) if (!(name in known)) fail("rules name an unknown layer: " name)
    if (patterns == 0) fail("no rules in " rules)
  }

  { files[++count] = $0; exists[$0] = 1 }

  END {
    for (f = 1; f <= count; f++) {
      file = files[f]
      from = layer_of(file)
      if (from == "") { fail(file " belongs to no layer"); continue }
      number = 0
      while ((getline line < file) > 0) {
        number++
        if (line !~ /^[ \t]*#[ \t]*include[ \t]*[<"]/) continue
        header = line
        sub(/^[ \t]*#[ \t]*include[ \t]*[<"]/, "", header)
        sub(/[>"].*$/, "", header)
        where = file ":" number ": " from
        checked++
        target = "include/" header
        if (!(target in exists)) {  # relative to the including file
          target = file
          sub(/[^\/]*$/, "", target)
          target = target header
        }
        if (target in exists) {
          to = layer_of(target)
          edges[file] = edges[file] " " target
        } else if (header ~ /^cohort\//) {
          fail(where " includes " header ", which does not exist"); continue
        } else {
          to = extern_of(header)
          if (to == "") continue
        }
        if (from != to && !((from, to) in allowed)) fail(where " may not include " header " (" to ")")
      }
      close(file)
    }
    for (f = 1; f <= count; f++) visit(files[f])
    if (count == 0) fail("no files found")
    printf "include arrows: %d files, %d includes, %d against the arrows\n", count, checked, failures
    exit (failures > 0)
  }'
