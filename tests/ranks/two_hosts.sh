#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: two_hosts.sh [--same-boot-id] PROGRAM [ARGUMENT...]
# Runs PROGRAM with four ranks on two "hosts", two on each: ranks 0 and 1 on cohort-a, 2 and 3 on
# cohort-b. A host is a set of namespaces of this machine: network (joined by a bridge), host name,
# processes with a /proc of its own (so memory behind /proc/<pid>/fd cannot be reached from the other
# host, and process ids mean nothing there), /dev/shm and boot id. With --same-boot-id the hosts are
# like two containers of one machine. Everything is gone when the script ends. Exit status: mpirun's,
# or 77 with a reason where the machine does not allow such hosts.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../../cmake/mpi_env.sh"
PATH=$PATH:/usr/sbin:/sbin

own_boot_id=1
if [[ ${1:-} == --same-boot-id ]]; then
  own_boot_id=0
  shift
fi

skip() {
  echo "cohort-skip: two_hosts: $1"
  exit 77
}

[[ $(id -u) == 0 ]] || skip "network namespaces need root"
for program in ip unshare nsenter mpirun; do
  command -v "$program" >/dev/null || skip "$program is not installed"
done
mpirun --version | grep -q 'Open MPI) 4' || skip "the launch agent is written for Open MPI 4"

id=$$
work=$(mktemp -d)
launcher=cohort-l-$id  # mpirun's own place, so that it reaches both hosts in the same way
declare -A init=()

cleanup() {
  local host
  for host in "${!init[@]}"; do
    kill -KILL "${init[$host]}" 2>/dev/null || true  # the first process takes its whole host along
  done
  for host in a b l; do
    ip netns delete "cohort-$host-$id" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

{
  ip netns add "$launcher" &&
    ip -n "$launcher" link add bridge type bridge &&
    ip -n "$launcher" address add 10.77.0.1/24 dev bridge &&
    ip -n "$launcher" link set bridge up &&
    ip -n "$launcher" link set lo up
} 2>"$work/why" || skip "no network namespaces or bridges here: $(tail -n 1 "$work/why")"

# start_host LETTER ADDRESS
start_host() {
  local host=cohort-$1 netns=cohort-$1-$id
  ip netns add "$netns"
  ip -n "$launcher" link add "to-$1" type veth peer name eth0 netns "$netns"
  ip -n "$launcher" link set "to-$1" master bridge up
  ip -n "$netns" address add "$2/24" dev eth0
  ip -n "$netns" link set eth0 up
  ip -n "$netns" link set lo up
  cat >"$work/init-$1" <<INIT
set -e
hostname $host
mount -t tmpfs tmpfs /dev/shm
if [ $own_boot_id = 1 ]; then
  cat /proc/sys/kernel/random/uuid >$work/boot-id-$1
  mount --bind $work/boot-id-$1 /proc/sys/kernel/random/boot_id
fi
touch $work/ready-$1
exec sleep infinity
INIT
  nsenter "--net=/run/netns/$netns" unshare --uts --ipc --mount --pid --fork --kill-child \
    --mount-proc sh "$work/init-$1" 2>"$work/why" &
  local parent=$!
  local _
  for _ in $(seq 100); do
    [[ -e $work/ready-$1 ]] && break
    kill -0 "$parent" 2>/dev/null || break
    sleep 0.05
  done
  [[ -e $work/ready-$1 ]] || skip "cannot start a host: $(tail -n 1 "$work/why")"
  init[$1]=$(cat "/proc/$parent/task/$parent/children")
  init[$1]=${init[$1]// /}
  echo "$host ${init[$1]}" >>"$work/inits"
}
start_host a 10.77.0.2
start_host b 10.77.0.3

# mpirun calls this instead of ssh: host, then words of a shell command.
cat >"$work/agent" <<AGENT
#!/bin/sh
host=\$1
shift
pid=\$(sed -n "s/^\$host //p" $work/inits)
exec nsenter --target "\$pid" --net --uts --ipc --mount --pid --wd=/ sh -c "cd '$PWD' && \$*"
AGENT
chmod +x "$work/agent"
printf 'cohort-a slots=2\ncohort-b slots=2\n' >"$work/hosts"

export OMPI_MCA_plm_rsh_agent=$work/agent
export OMPI_MCA_orte_do_not_resolve=1
# Not exec: the trap has to clean up.
nsenter "--net=/run/netns/$launcher" unshare --uts sh -c 'hostname cohort-l && exec "$@"' sh \
  mpirun --tag-output --hostfile "$work/hosts" -n 4 "$@"
