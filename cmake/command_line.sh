# SPDX-License-Identifier: Apache-2.0
# What the scripts do alike with their command lines; they source it. A script's help is its first
# comment, behind the licence.

help_of_script() { sed -n '3,/^[^#]/s/^#\( \|$\)//p' "$0"; }

# help_if_asked WORD...: ends the script with its help where a word asks for it.
help_if_asked() {
  local word
  for word in "$@"; do
    case $word in
      --help | -h)
        help_of_script
        exit 0
        ;;
    esac
  done
}

# refuse_unknown SOURCE WORD...: refuses an option that the program of this source does not have,
# before the program is built.
refuse_unknown() {
  local source=$1 word
  shift
  for word in "$@"; do
    [[ $word != --* ]] || grep -qF -- "\"${word%%=*}\"" "$source" || refuse "$word"
  done
}

# refuse WORD: ends the script, which does not know the word, with what it knows.
refuse() {
  echo "${0##*/}: $1: no such option; it is used so:" >&2
  help_of_script >&2
  exit 2
}
