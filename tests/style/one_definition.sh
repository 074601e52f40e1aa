#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: one_definition.sh ROOT [FEWEST]
# No name of the library is defined twice in different headers: two classes or functions of one name
# break the one definition rule wherever both headers meet in one program, also where no source
# includes both. Read from the text, so headers of every part are checked, built here or not. What
# is indented is a member or a local, because the project's format (style.format) does not indent
# namespaces. Nor does a type of cohort::detail have the name of one of cohort: which of them a header
# finds would depend on what was included before it.
set -euo pipefail
cd "$1"
fewest=${2:-100}  # names that the headers have at least, or the check has gone blind

mapfile -t headers < <(find include -name '*.hpp' | LC_ALL=C sort)
awk -v fewest="$fewest" '
  function strip(text) { gsub(/"([^"\\]|\\.)*"/, "\"\"", text); sub(/\/\/.*/, "", text); return text }

  # An overload may stand in another header, so functions come with the types of their parameters.
  function note(name,    key) {
    key = scope "::" name
    count++
    if (key in where && where[key] != FILENAME) {
      printf "one definition: %s is defined in %s and in %s\n", key, where[key], FILENAME
      failures++
    } else {
      where[key] = FILENAME
    }
  }

  FNR == 1 { depth = 0; scope = ""; pending = "" }

  { line = strip($0) }

  line ~ /^(inline )?namespace [a-z_:]* *{/ {
    name = line
    sub(/^(inline )?namespace /, "", name)
    sub(/ *{.*/, "", name)
    stack[++depth] = scope
    scope = scope == "" ? name : scope "::" name
    next
  }
  line ~ /^}  *$/ || line ~ /^}$/ {
    # Closes a function or a namespace; clang-format says which by a comment.
    if ($0 ~ /^}  \/\/ namespace/ && depth > 0) scope = stack[depth--]
    pending = ""
    next
  }

  # Only what begins in the first column, and not within a declaration that goes on.
  line ~ /^[ \t#}]/ && pending == "" { next }
  line ~ /^[ \t]*$/ && pending == "" { next }
  { pending = pending " " line }
  pending ~ /[;{]/ {
    text = pending
    pending = ""
    sub(/[{;].*/, "&", text)
    kind = text ~ /{/ ? "definition" : "statement"
    sub(/[{;].*/, "", text)
    gsub(/^ +/, "", text)
    while (sub(/^template *<[^<>]*(<[^<>]*>[^<>]*)*> */, "", text)) {}
    gsub(/\[\[[^]]*\]\] */, "", text)
    gsub(/alignas\([^)]*\) */, "", text)
    if (text ~ /^(using namespace|static_assert|extern|friend|return|public|private|namespace)/) next
    if (text ~ /^using [A-Za-z_]+ *=/) { sub(/^using /, "", text); sub(/ *=.*/, "", text); types[scope "::" text] = FILENAME; note(text); next }
    if (text ~ /^(class|struct|union|enum|enum class) /) {
      if (kind == "statement") next  # a declaration only
      sub(/^(class|struct|union|enum class|enum) /, "", text)
      sub(/ +final.*| *:[^:].*/, "", text)
      gsub(/ +$/, "", text)
      if (text ~ /[<:]/) next  # a specialization or a member
      types[scope "::" text] = FILENAME
      note(text); next
    }
    if (text ~ /^(inline |static |constexpr |const |thread_local )+[^(]*=/ || text ~ /^(inline |static |constexpr |const |thread_local )+[^(]*$/) {
      sub(/ *=.*/, "", text); sub(/ +$/, "", text); sub(/.*[ *&]/, "", text); note(text); next
    }
    if (text ~ /\(/ && kind == "definition") {
      parameters = text
      sub(/\(.*/, "", text)
      sub(/^[^(]*\(/, "", parameters)
      gsub(/ +/, " ", parameters)
      sub(/\)[^)]*$/, "", parameters)
      gsub(/ *=[^,]*/, "", parameters)                        # defaults
      gsub(/[ &*][a-z_0-9]+ *,/, "&,", parameters)            # names, before a comma
      while (sub(/[a-z_0-9]+ *,,/, ",", parameters)) {}
      sub(/ +[a-z_0-9]+ *$/, "", parameters)                  # and the last
      gsub(/ /, "", parameters)
      sub(/ +$/, "", text)
      sub(/.*[ *&]/, "", text)
      if (text ~ /::/ || text == "") next  # a member
      note(text "(" parameters ")")
    }
  }
  END {
    for (key in types) {
      plain = key
      if (sub(/^cohort::detail::/, "cohort::", plain) && plain in types) {
        printf "one definition: %s in %s hides %s of %s\n", key, types[key], plain, types[plain]
        failures++
      }
    }
    printf "one definition: %d names of the headers, %d defined twice or hidden\n", count, failures
    exit (failures > 0 || count < fewest)
  }' "${headers[@]}"
