#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The check of the include arrows must find what it is there to find.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

# expect STATUS TEXT FILE INCLUDE...: a tree with one file that includes these must end that way.
expect() {
  local status=$1 text=$2 file=$3 got=0
  shift 3
  rm -rf "${tree:?}"/*
  mkdir -p "$tree/include/cohort/"{dcp,host,mpi,cuda,nccl} "$tree/src" "$(dirname "$tree/$file")"
  for header in error dtype topology transport group_coordinator dcp/lse_merge host/window mpi/plane; do
    echo '#pragma once' >"$tree/include/cohort/$header.hpp"
  done
  printf '#include %s\n' "$@" >"$tree/$file"
  bash "$here/include_arrows.sh" "$tree" >"$tree/output" || got=$?
  if [[ $got != "$status" ]] || ! grep -qF -- "$text" "$tree/output"; then
    echo "FAILED: $file with $*: status $got, expected $status and \"$text\""
    cat "$tree/output"
    exit 1
  fi
}

expect 0 "0 against the arrows" include/cohort/topology.hpp '"cohort/error.hpp"' '<vector>'
expect 1 "include/cohort/error.hpp:1: values may not include cohort/topology.hpp" \
  include/cohort/error.hpp '"cohort/topology.hpp"'
expect 1 "include/cohort/error.hpp:2: values may not include cohort/topology.hpp" \
  include/cohort/error.hpp '<vector>' '<cohort/topology.hpp>'
expect 1 "may not include cohort/host/window.hpp (host)" \
  include/cohort/group_coordinator.hpp '"cohort/host/window.hpp"'
expect 1 "may not include dcp/lse_merge.hpp (dcp)" include/cohort/topology.hpp '"dcp/lse_merge.hpp"'
expect 1 "may not include mpi.h (mpi_api)" include/cohort/topology.hpp '<mpi.h>'
expect 0 "0 against the arrows" include/cohort/mpi/plane.hpp '<mpi.h>' '"cohort/transport.hpp"'
expect 1 "may not include cuda_runtime.h (cuda_api)" include/cohort/host/window.hpp '<cuda_runtime.h>'
expect 1 "may not include nccl.h (nccl_api)" include/cohort/cuda/mapping.hpp '<nccl.h>'
expect 1 "belongs to no layer" include/cohort/misplaced.hpp '<vector>'
expect 1 "which does not exist" include/cohort/topology.hpp '"cohort/gone.hpp"'
expect 1 "circle through" include/cohort/error.hpp '"cohort/error.hpp"'
echo "include arrows: the check finds every kind of violation"
