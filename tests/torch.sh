#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the Python package against the installed torch, and tests it on 1 to 4 ranks of the host, and
# by two ranks on two cards, or on one that they share: over MPI and over torch.distributed's store.
# Has mypy look at it, where that is installed. The last line is "N passed, M failed, K skipped";
# without torch the exit status is 77.
#
#   bash tests/torch.sh           with the torch of python3, or of the interpreter COHORT_PYTHON
#   bash tests/torch.sh --setup   makes build/torch/venv and installs the tested torch there, some
#                                 gigabytes, before
#   bash tests/torch.sh --cards   the parts on cards alone
#
# COHORT_TORCH_SITE names a folder that holds the package already; nothing is built then.
# COHORT_TORCH_CLIENT names an engine's own program for the interface of tests/torch/cohort_torch.py;
# it runs as it is, on 2 ranks of the host and of cards. COHORT_TORCH_LIMIT: seconds that one program may take (default 240).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=cmake/command_line.sh
source cmake/command_line.sh
help_if_asked "$@"
# shellcheck source=cmake/mpi_env.sh
source cmake/mpi_env.sh

folder=$PWD/build/torch
python=${COHORT_PYTHON:-python3}
cards_alone=0
for argument in "$@"; do
  case $argument in
    --cards) cards_alone=1 ;;
    --setup)
      mkdir -p "$folder"
      python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -q 'torch==2.11.*' numpy setuptools wheel || exit 1
      python=$folder/venv/bin/python
      ;;
    *) refuse "$argument" ;;
  esac
done
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "cohort-skip: torch: not installed for $python; tests/torch.sh --setup installs it"
  exit 77
fi

limit=${COHORT_TORCH_LIMIT:-240}
passed=0
failed=0
skipped=0
cards=$(compgen -G '/dev/nvidia[0-9]*' | wc -l)

finish() {
  echo "$passed passed, $failed failed, $skipped skipped"
  exit $((failed > 0))
}

# skip REASON
skip() {
  skipped=$((skipped + 1))
  echo "-- skipped: $1"
}

# report NAME STATUS COMMAND...: runs the command, whose exit status has to be STATUS ("0", or "any"
# where only that it ends counts), and adds up what it counts, one where it counts nothing.
report() {
  local name=$1 wanted=$2 output status counts p=1 f=0 s=0
  shift 2
  echo "== $name"
  output=$(timeout --kill-after=15 "$limit" "$@" 2>&1)
  status=$?
  counts=$(grep -oE 'cohort-test: passed=[0-9]+ failed=[0-9]+ skipped=[0-9]+|[0-9]+ passed, [0-9]+ failed, in' <<<"$output" | tail -n 1)
  if [[ $counts =~ ([0-9]+)[^0-9]+([0-9]+) ]]; then
    p=${BASH_REMATCH[1]} f=${BASH_REMATCH[2]}
    [[ $counts =~ skipped=([0-9]+) ]] && s=${BASH_REMATCH[1]}
  fi
  if ((status == 124 || status == 137)) || [[ $wanted != any && $status != "$wanted" && $f == 0 ]]; then
    f=$((f + 1))
    ((p == 1)) && p=0
    echo "ended with status $status"
  fi
  ((f == 0)) || echo "$output" | tail -n 60
  echo "-- $p passed, $f failed, $s skipped"
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

# store_ranks N ARGUMENT...: N ranks without MPI; the exit status is the worst.
store_ranks() {
  local n=$1 status=0 rank pids=()
  shift
  for ((rank = 0; rank < n; rank++)); do
    env -u OMPI_COMM_WORLD_SIZE RANK="$rank" WORLD_SIZE="$n" "$python" tests/torch/test_package.py "$@" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return $status
}

site=${COHORT_TORCH_SITE:-$folder/site}
if [[ -z ${COHORT_TORCH_SITE:-} ]]; then
  # Without a card the part for cards would be minutes of compiling, and nothing of it would run.
  ((cards)) || export CMAKE_ARGS=${CMAKE_ARGS:--DCOHORT_CUDA=OFF}
  echo "== build"
  rm -rf "$folder/wheel"
  if ! { "$python" -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$folder/wheel" src/python &&
    "$python" -m pip install -q --no-deps --upgrade --target "$site" "$folder"/wheel/*.whl; }; then
    failed=1
    echo "build of src/python failed"
    finish
  fi
fi
mkdir -p "$folder"
export PYTHONPATH=$site:$PWD/tests/torch${PYTHONPATH:+:$PYTHONPATH} TORCH_NCCL_ENABLE_MONITORING=0
export python
export -f store_ranks
port=$((20000 + RANDOM % 20000))
next_port() { export MASTER_PORT=$((++port)); }
mpi=0
if command -v mpirun >/dev/null && "$python" -c 'import cohort, sys; sys.exit("mpi" not in cohort.parts())'; then
  mpi=1
else
  skip "ranks over MPI: no mpirun, or the package was built without MPI"
fi
# The client's folder has glue of its own beside it, which would come first: a copy of the program alone.
next_client() {
  cp "$COHORT_TORCH_CLIENT" "$folder/client.py"
  port=$((port + 3))
}

# The README's first example where nothing is installed but the wheel, and this torch beside it.
test_wheel() {
  local fresh=$folder/fresh
  if [[ ! -d $folder/wheel ]]; then
    skip "the README's example from the wheel: none was built"
    return
  fi
  rm -rf "$fresh"
  "$python" -m venv --without-pip "$fresh"
  report "the wheel is installed" 0 env -u PYTHONPATH "$python" -m pip --python "$fresh/bin/python" install -q --no-deps "$folder"/wheel/*.whl
  "$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
    >"$("$fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
  next_port
  report "README's example by torchrun" 0 env -u PYTHONPATH "$fresh/bin/python" -m torch.distributed.run --nproc-per-node 2 \
    --master-port "$MASTER_PORT" tests/torch/readme_example.py
  if ((mpi)); then
    report "README's example by mpirun" 0 env -u PYTHONPATH mpirun -n 2 "$fresh/bin/python" tests/torch/readme_example.py
  fi
}

test_host() {
  told_apart='import runpy, setuptools
setuptools.setup = lambda **_: None
folder = runpy.run_path("src/python/setup.py")["native_folder"]
assert folder(["-DCOHORT_CUDA=OFF"]) != folder([]) == folder([]), "CMake keeps what it was told once"'
  report "builds for other arguments" 0 "$python" -c "$told_apart"

  report "pools of torch's allocator" 0 "$python" tests/torch/test_pools.py
  report "names, texts and types" 0 "$python" tests/torch/test_surface.py
  test_wheel

  for n in 1 2 3 4; do
    if ((mpi)); then
      next_port
      report "$n ranks over MPI" 0 mpirun -n $n "$python" tests/torch/test_package.py --control mpi
    fi
  done
  next_port
  report "2 ranks over torch.distributed's store" 0 bash -c 'store_ranks 2'
  next_port
  report "2 ranks that leave without shutdown" 0 bash -c 'store_ranks 2 --leave silently'
  next_port
  report "2 ranks of which one fails" 1 bash -c 'store_ranks 2 --leave raising'
  next_port
  report "2 ranks of which one leaves in a call" 0 bash -c 'store_ranks 2 --leave in_a_call'
  if ((mpi)); then
    next_port
    report "2 ranks over MPI that leave without shutdown" 0 mpirun -n 2 "$python" tests/torch/test_package.py --control mpi --leave silently
    next_port
    report "2 ranks over MPI of which one fails" any mpirun -n 2 "$python" tests/torch/test_package.py --control mpi --leave raising
    next_port
    report "2 ranks over MPI of which one fails by its status" any mpirun -n 2 "$python" tests/torch/test_package.py --control mpi --leave with_a_status
  fi

  for layout in "2 2" "4 4" "4 2"; do
    ((mpi)) || break
    report "examples/mla_decode.py with tp and dcp $layout" 0 mpirun -n "${layout% *}" "$python" examples/mla_decode.py \
      --tp "${layout% *}" --dcp "${layout#* }" --device cpu
  done

  if [[ -n ${COHORT_TORCH_CLIENT:-} ]]; then
    next_client
    report "client on 2 ranks" 0 mpirun -n 2 "$python" "$folder/client.py" --so none --port $port --cpu --quick
  fi

  if "$python" -c 'import mypy' 2>/dev/null; then
    report "mypy" 0 env MYPYPATH=src/python "$python" -m mypy --follow-imports=silent --cache-dir="$folder/mypy" src/python/cohort tests/torch/typed_use.py
  else
    skip "mypy: not installed for $python"
  fi
}

# Two ranks share the only card: each is on a host of its own to NCCL, and the first one there.
test_cards() {
  local control place=()
  if ((!mpi || !cards)); then
    skip "ranks on cards: no card, or no MPI"
    return
  fi
  ((cards >= 2)) || place=(bash tests/gpu/as_hosts.sh rank env OMPI_COMM_WORLD_LOCAL_RANK=0)
  for control in mpi store; do
    next_port
    report "2 ranks on cards over $control" 0 mpirun -n 2 "${place[@]}" "$python" tests/torch/test_package.py --device cuda \
      $([[ $control == mpi ]] && echo --control mpi)
  done
  next_port
  report "2 ranks on cards that leave without shutdown" 0 mpirun -n 2 "${place[@]}" "$python" tests/torch/test_package.py --device cuda --leave silently
  report "examples/mla_decode.py on cards" 0 mpirun -n 2 "${place[@]}" "$python" examples/mla_decode.py --tp 2 --dcp 2 --device cuda
  if [[ -n ${COHORT_TORCH_CLIENT:-} ]] && ((cards < 2)); then
    skip "client on cards: it wants windows, which ranks that share a card have not"
  elif [[ -n ${COHORT_TORCH_CLIENT:-} ]]; then
    next_client
    report "client on cards" 0 mpirun -n 2 "${place[@]}" "$python" "$folder/client.py" --so none --port $port --quick
  fi
}

((cards_alone)) || test_host
test_cards
finish
