#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: mpirun -n N as_hosts.sh MODE PROGRAM ARGUMENT...
# Starts a rank as one that NCCL takes to be on a host of its own, or of its pair:
#   one    all ranks on this host
#   rank   every rank on another host: several ranks per card, over sockets
#   pair   ranks 2k and 2k+1 on one host, with one card each: two hosts of two cards on two cards
set -euo pipefail
mode=$1
shift
rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-0}}}
case $mode in
  one) ;;
  rank) export NCCL_HOSTID=host$rank ;;
  pair) export NCCL_HOSTID=host$((rank / 2)) ;;
  *) echo "as_hosts.sh: unknown mode $mode" >&2; exit 2 ;;
esac
if [[ $mode != one ]]; then
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
fi
exec "$@"
