#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a call of the Python package costs the CPU beside the same call from C++.

    python3 bench/torch_calls.py [--json FILE]

Both on the host, in a group of one rank, with 16 elements, so that next to nothing but the call itself
is measured: the least mean of many rounds, in microseconds. "python" is the group's method, "operator"
torch.ops.cohort without it, "torch.distributed" its gloo all_reduce in place. Needs the package, see
src/python/README.md; compiles torch_calls/from_cpp.cpp with CXX (g++). The status is 1 where a call from Python
costs more than 6 us above C++.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time

from command_line import Parser
from result_files import commit

try:
    import torch
    import torch.distributed as dist

    import cohort
except ImportError as missing:  # so that --help works without them
    torch = missing

HERE = os.path.dirname(os.path.abspath(__file__))
ROUNDS, CALLS = 300, 100
MOST_US = 6.0


def least(call):
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / CALLS * 1e6


def from_cpp():
    """Microseconds by name."""
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "torch_calls")
        subprocess.run([os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-DNDEBUG",
                        "-I" + os.path.join(HERE, "..", "include"), os.path.join(HERE, "torch_calls", "from_cpp.cpp"),
                        "-o", program, "-lfmt", "-ldl", "-lpthread", "-lrt"], check=True)
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines)}


def from_python(state):
    """Name: (microseconds of the method, of the operator alone)."""
    ops, tp, dcp = torch.ops.cohort, state.tp, state.dcp
    x, y = torch.zeros(2, 8), torch.zeros(2, 8)
    out, merged, q, lse = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), torch.zeros(1, 2, 16), torch.zeros(1, 2)
    calls = {
        "all_reduce_into": (lambda: tp.all_reduce_into(y, x),
                            lambda: ops.all_reduce_into(y, x, "sum", tp.name)),
        "all_gather_into": (lambda: tp.all_gather_into_tensor(y, x, 0),
                            lambda: ops.all_gather_into(y, x, 0, tp.name)),
        "reduce_scatter_into": (lambda: tp.reduce_scatter_tensor(y, x, 0),
                                lambda: ops.reduce_scatter_into(y, x, 0, "sum", tp.name)),
        "gather_query_into": (lambda: dcp.gather_query_into(q, out, merged),
                              lambda: ops.gather_query_into(q, out, merged, dcp.name)),
        "merge_attention_into": (
            lambda: dcp.merge_attention_into(merged, out, lse),
            lambda: ops.merge_attention_into(merged, out, lse, False, False, None, None, None, dcp.name)),
    }
    return {name: tuple(least(call) for call in pair) for name, pair in calls.items()}


def of_torch():
    """Microseconds of torch.distributed's all_reduce in a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    x = torch.zeros(2, 8)
    took = least(lambda: dist.all_reduce(x))
    dist.destroy_process_group()
    return took


def processor():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    parser = Parser(__doc__)
    parser.add_argument("--json", help="writes JSON lines there, the facts of the run first")
    args = parser.parse_args()
    if isinstance(torch, ImportError):
        parser.exit(1, f"torch_calls.py: {torch}\n")
    torch.set_num_threads(1)
    cpp = from_cpp()
    with cohort.ParallelState(control="single", device="cpu") as state, torch.inference_mode():
        python = from_python(state)
    rows = [{"call": name, "cpp_us": round(cpp[name], 3), "python_us": round(method, 3),
             "operator_us": round(operator, 3)} for name, (method, operator) in python.items()]
    rows.append({"call": "torch.distributed all_reduce", "python_us": round(of_torch(), 3)})
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.json:
        facts = {"command": "torch_calls.py", "commit": commit(), "date": time.strftime("%FT%TZ", time.gmtime()),
                 "backend": "host", "ranks": 1, "cpu": processor(), "cores": os.cpu_count(),
                 "torch": torch.__version__, "python": platform.python_version()}
        with open(args.json, "w", encoding="utf-8") as file:
            for line in [{"meta": facts}, *rows]:
                file.write(json.dumps(line) + "\n")
    return int(any(row["python_us"] - row["cpp_us"] > MOST_US for row in rows if "cpp_us" in row))


if __name__ == "__main__":
    sys.exit(main())
