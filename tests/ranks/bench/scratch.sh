# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts here: $folder, which goes with the script, and fail WORDS..., which says so
# with the end of $folder/output and ends it.

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

fail() {
  echo "FAILED: $*"
  [[ ! -e $folder/output ]] || tail -n 40 "$folder/output"
  exit 1
}
