#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The rows of cohort_bench through torch.distributed, into the same schema.

    torchrun --nproc-per-node N bench/torch_baseline.py --check --json FILE
    mpirun -n N python3 bench/torch_baseline.py --check --json FILE

Measures all_gather, reduce_scatter, all_reduce, gather_query and dcp_merge (staged), eagerly and in
a CUDA graph, as an engine written in PyTorch runs them. Path is "torch". With --paths
torch,python,symm_mem the ways take turns in one run: "python" is Cohort's Python package, by its
calls that write a tensor of the caller's; "symm_mem" torch's symmetric memory, whose one-shot
all-reduce reads a buffer of its own. Needs PyTorch; without it the status is 77. With --backend gloo
it runs on the CPU, eagerly, to show that it works.

Multicast stays as the environment has it: NCCL_NVLS_ENABLE and TORCH_SYMM_MEM_DISABLE_MULTICAST are
read by NCCL and PyTorch themselves, are never changed here, and stand among the facts of the run.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import signal
import sys
import time

from command_line import Parser
from result_files import commit

try:
    import torch
    import torch.distributed as dist
except ImportError:
    torch = None

PATHS = ("torch", "python", "symm_mem")
BENCHES = ("all_gather", "reduce_scatter", "all_reduce", "gather_query", "dcp_merge")
SAMPLE_US = 1000
HEAD_START_CYCLES = 600_000  # some 300 us
MOST_CALLS = 100


def parse_size(text):
    shift = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    return int(text[:-1] if shift else text) << shift


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--bench", default=",".join(BENCHES))
    parser.add_argument("--paths", default="torch")
    parser.add_argument("--backend", default="nccl", choices=("nccl", "gloo"))
    parser.add_argument("--modes", default="eager,graph", help="eager, graph and issue, the host's time alone")
    parser.add_argument("--min-bytes", type=parse_size, default=2 << 10)
    parser.add_argument("--max-bytes", type=parse_size, default=4 << 20)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--batches", default="1,4,16,64,128")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--head-dim", type=int, default=512)
    parser.add_argument("--rope", type=int, default=64)
    parser.add_argument("--dtype", default="bf16", choices=("f32", "f16", "bf16"))
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    arguments.bench = arguments.bench.split(",")
    arguments.modes = arguments.modes.split(",")
    arguments.batches = [int(b) for b in arguments.batches.split(",")]
    arguments.paths = arguments.paths.split(",")
    if set(arguments.paths) - set(PATHS):
        parser.error(f"--paths: expected {', '.join(PATHS)}")
    unknown = set(arguments.bench) - set(BENCHES)
    if unknown or arguments.factor < 2:
        parser.error(f"--bench: expected {', '.join(BENCHES)}" if unknown else "--factor: at least 2")
    return arguments


def rank_environment():
    """Rank, size and local rank from torchrun or from Open MPI."""
    env = os.environ
    if "RANK" not in env and "OMPI_COMM_WORLD_RANK" in env:
        env["RANK"] = env["OMPI_COMM_WORLD_RANK"]
        env["WORLD_SIZE"] = env["OMPI_COMM_WORLD_SIZE"]
        env["LOCAL_RANK"] = env["OMPI_COMM_WORLD_LOCAL_RANK"]
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "29571")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29571")):
        env.setdefault(name, value)
    return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])


class Bench:
    def __init__(self, arguments):
        self.options = arguments
        self.rank, self.size, local = rank_environment()
        self.cuda = arguments.backend == "nccl"
        if self.cuda:
            torch.cuda.set_device(local % torch.cuda.device_count())
            self.device = torch.device("cuda", torch.cuda.current_device())
            self.stream = torch.cuda.Stream()
            torch.cuda.set_stream(self.stream)
        else:
            self.device = torch.device("cpu")
        dist.init_process_group(arguments.backend, timeout=datetime.timedelta(seconds=60))
        self.dtype = {"f32": torch.float32, "f16": torch.float16,
                      "bf16": torch.bfloat16}[arguments.dtype]
        self.state = None
        if "python" in arguments.paths:
            import cohort
            self.state = cohort.ParallelState(tp=self.size, dcp=self.size, device=self.device)
            self.state.dcp.reserve_for(batch=max(arguments.batches), heads=arguments.heads, latent=arguments.head_dim,
                                       rope=arguments.rope, value=arguments.head_dim, dtype=self.dtype)
        self.wrong = 0
        self.stop = False
        self.file = None
        self.word = torch.zeros(1, device=self.device)

    # --- measuring ---------------------------------------------------------------------------

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def align(self):
        dist.all_reduce(self.word)
        self.synchronize()

    def elapsed_us(self, work, mode="eager"):
        """In graph mode the cards are held back until the hosts have enqueued everything; eagerly the
        hosts' time counts as well, and in mode issue it alone."""
        if not self.cuda or mode == "issue":
            self.align()
            start = time.perf_counter()
            work()
            took = (time.perf_counter() - start) * 1e6
            self.synchronize()
            return took
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if mode == "graph":
            torch.cuda._sleep(HEAD_START_CYCLES)
        dist.all_reduce(self.word)  # the ranks begin together on the cards, whenever their hosts come
        begin.record()
        work()
        end.record()
        self.synchronize()
        return begin.elapsed_time(end) * 1e3

    def agree(self, value):
        """The largest value of all ranks."""
        tensor = torch.tensor([float(value)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def graph_of(self, path, work):
        graph = torch.cuda.CUDAGraph()
        inside = self.state.graph_capture() if path == "python" else contextlib.nullcontext()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"), inside:
            work()
        return graph

    def run(self, bench, payload, batch, factor, ways):
        """One row for each way and mode. `ways` by path: what enqueues one call, what counts the wrong
        elements behind it, and what spoils them before."""
        calls, works = {}, {}
        for path in self.options.paths:
            if path not in ways:
                continue
            call = ways[path][0]
            fastest = math.inf
            for _ in range(max(self.options.warmup, 1)):
                fastest = min(fastest, self.elapsed_us(lambda: [call() for _ in range(10)]) / 10)
            calls[path] = max(1, min(MOST_CALLS, math.ceil(SAMPLE_US / max(self.agree(fastest), 1e-3))))

            def eager(call=call, times=calls[path]):
                for _ in range(times):
                    call()

            for mode in ("eager", "issue"):
                if mode in self.options.modes:
                    works[path, mode] = eager
            if "graph" in self.options.modes and self.cuda:
                works[path, "graph"] = self.graph_of(path, eager).replay
        counts = dict.fromkeys(works, 0)
        samples = {way: [] for way in works}

        def check():
            for way, work in works.items():
                _, wrong, poison = ways[way[0]]
                poison()
                self.align()
                work()
                self.synchronize()
                counts[way] += wrong()

        if self.options.check:
            check()
        for _ in range(self.options.iters):
            if self.agree(self.stop) > 0:
                self.stop = True
                return
            for way, work in works.items():
                samples[way].append(self.elapsed_us(work, way[1]) / calls[way[0]])
        if self.options.check:
            check()
        for path, mode in works:
            plan = "-"
            if bench == "dcp_merge":
                plan = self.state.dcp.last_merge()[0] if path == "python" else "staged"
            self.row(bench, path, plan, mode, payload, batch, factor, samples[path, mode],
                     counts[path, mode], calls[path])

    def row(self, bench, path, plan, mode, payload, batch, factor, samples, wrong, calls):
        times = torch.tensor(samples, dtype=torch.float64).to(
            torch.float32 if self.cuda else torch.float64).to(self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)  # an iteration takes as long as its slowest rank
        total = torch.tensor([wrong], dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        wrong = int(total.item())
        self.wrong += wrong
        times = times.cpu().to(torch.float64)
        p50, p95 = (torch.quantile(times, q).item() for q in (0.5, 0.95))
        algbw = payload / p50 * 1e-3 if p50 > 0 else 0.0
        self.write({"bench": bench, "path": path, "plan": plan, "mode": mode,
                    "dtype": self.options.dtype, "ranks": self.size, "bytes": payload,
                    "batch": batch, "us_p50": round(p50, 4), "us_p95": round(p95, 4),
                    "us_min": round(times.min().item(), 4), "algbw": round(algbw, 3),
                    "busbw": round(algbw * factor, 3),
                    "wrong": wrong if self.options.check else None, "calls": calls,
                    "samples": len(samples)})

    def write(self, record):
        if self.rank == 0:
            line = json.dumps(record)
            print(line, flush=True)
            if self.file:
                self.file.write(line + "\n")
                self.file.flush()

    # --- inputs with exact answers -------------------------------------------------------------
    # The same whole numbers as cohort_bench/exact.hpp.

    def values(self, count, rank):
        width = max(2, min(16, 255 // self.size))
        i = torch.arange(count, device=self.device)
        return ((i * 5 + i // 64 + rank * 11) % width).to(self.dtype)

    @staticmethod
    def differences(got, wanted):
        return int((got != wanted).sum().item())  # a NaN differs from everything

    # --- benchmarks ------------------------------------------------------------------------------

    def sizes(self):
        size = self.options.min_bytes
        while size <= self.options.max_bytes:
            yield size
            size *= self.options.factor

    def share(self, payload):
        width = torch.empty(0, dtype=self.dtype).element_size()
        share = payload // (self.size * width)
        word = 16 // width
        return max(1, share if share < word else share // word * word), width

    def all_gather(self):
        for payload in self.sizes():
            share, width = self.share(payload)
            x = self.values(share, self.rank)
            out = torch.empty(share * self.size, dtype=self.dtype, device=self.device)
            wanted = torch.cat([self.values(share, r) for r in range(self.size)])
            judged = (lambda: self.differences(out, wanted), lambda: out.fill_(math.nan))
            self.run("all_gather", share * self.size * width, 0, 1 - 1 / self.size,
                     {"torch": (lambda: dist.all_gather_into_tensor(out, x), *judged),
                      "python": (lambda: self.state.tp.all_gather_into_tensor(out, x), *judged)})

    def reduce_scatter(self):
        for payload in self.sizes():
            share, width = self.share(payload)
            x = self.values(share * self.size, self.rank)
            out = torch.empty(share, dtype=self.dtype, device=self.device)
            total = sum(self.values(share * self.size, r).float() for r in range(self.size))
            wanted = total[self.rank * share:(self.rank + 1) * share].to(self.dtype)
            judged = (lambda: self.differences(out, wanted), lambda: out.fill_(math.nan))
            self.run("reduce_scatter", share * self.size * width, 0, 1 - 1 / self.size,
                     {"torch": (lambda: dist.reduce_scatter_tensor(out, x), *judged),
                      "python": (lambda: self.state.tp.reduce_scatter_tensor(out, x), *judged)})

    def all_reduce(self):
        for payload in self.sizes():
            share, width = self.share(payload)
            count = share * self.size
            x = self.values(count, self.rank)
            out = x.clone()
            wanted = sum(self.values(count, r).float() for r in range(self.size)).to(self.dtype)

            # In place, as PyTorch has it; sums of many calls overflow, so the check makes one call.
            def wrong():
                out.copy_(x)
                dist.all_reduce(out)
                self.synchronize()
                count_wrong = self.differences(out, wanted)
                out.zero_()
                return count_wrong

            into = torch.empty_like(x)
            judged = (lambda: self.differences(into, wanted), lambda: into.fill_(math.nan))
            ways = {"torch": (lambda: dist.all_reduce(out), wrong, lambda: out.zero_()),
                    "python": (lambda: self.state.tp.all_reduce_into(into, x), *judged)}
            if "symm_mem" in self.options.paths:
                ways["symm_mem"] = (self.one_shot(into, x), *judged)
            self.run("all_reduce", count * width, 0, 2 * (1 - 1 / self.size), ways)

    def one_shot(self, into, x):
        """Without multicast, from a buffer in torch's symmetric memory."""
        import torch.distributed._symmetric_memory as symm_mem
        buffer = symm_mem.empty(x.numel(), dtype=x.dtype, device=self.device)
        group = dist.group.WORLD.group_name
        symm_mem.rendezvous(buffer, group)
        buffer.copy_(x)
        return lambda: torch.ops.symm_mem.one_shot_all_reduce_out(buffer, "sum", group, into)

    def gather_query(self):
        o, n = self.options, self.size
        for batch in o.batches:
            heads, width = o.heads // n, o.head_dim + o.rope
            nope = self.values(batch * heads * o.head_dim, self.rank).view(batch, heads, o.head_dim)
            pe = self.values(batch * heads * o.rope, self.rank).view(batch, heads, o.rope)
            out = torch.empty(n, batch, heads, width, dtype=self.dtype, device=self.device)
            wanted = torch.stack([torch.cat((
                self.values(nope.numel(), r).view_as(nope),
                self.values(pe.numel(), r).view_as(pe)), dim=-1) for r in range(n)])
            q = torch.empty(batch, heads * n, width, dtype=self.dtype, device=self.device)
            whole = wanted.transpose(0, 1).reshape(q.shape)
            self.run("gather_query", out.numel() * out.element_size(), batch, 1 - 1 / n,
                     {"torch": (lambda: dist.all_gather_into_tensor(out.flatten(0, 1), torch.cat((nope, pe), dim=-1)),
                                lambda: self.differences(out, wanted), lambda: out.fill_(math.nan)),
                      "python": (lambda: self.state.dcp.gather_query_into(q, nope, pe),
                                 lambda: self.differences(q, whole), lambda: q.fill_(math.nan))})

    def dcp_merge(self):
        o, n = self.options, self.size
        unit = 1 << (n - 1).bit_length()
        heavy = unit - n
        for batch in o.batches:
            rows = torch.arange(batch * o.heads, device=self.device).view(batch, o.heads)

            def lse_of(rank):
                return ((rank + rows) % n < heavy).float()

            def partial_of(rank):
                i = torch.arange(batch * o.heads * o.head_dim, device=self.device)
                span = max(2, min(8, 255 // unit))
                return (unit * ((i * 3 + i // 128 + rank * 7) % span)).to(self.dtype).view(
                    batch, o.heads, o.head_dim)

            out, lse = partial_of(self.rank), lse_of(self.rank)
            lses = torch.empty(n, batch, o.heads, device=self.device)
            merged = torch.empty(o.heads // n, batch, o.head_dim, dtype=self.dtype,
                                 device=self.device)
            total = sum(partial_of(r).float() * ((1 + lse_of(r)) / unit)[..., None]
                        for r in range(n))
            own = slice(self.rank * (o.heads // n), (self.rank + 1) * (o.heads // n))
            wanted = total[:, own].transpose(0, 1).to(self.dtype)

            def call():
                dist.all_gather_into_tensor(lses.flatten(0, 1), lse)
                scale = torch.softmax(lses * math.log(2.0), dim=0)[self.rank]
                corrected = (out * scale[..., None]).to(self.dtype).transpose(0, 1).contiguous()
                dist.reduce_scatter_tensor(merged, corrected)

            # A softmax in base e rounds the powers of two, so the last bit may differ.
            def off(got, right):
                error = (got.float() - right.float()).abs()
                return int((~(error <= 0.02 * right.float().abs() + 1e-3)).sum().item())

            by_row = torch.empty(batch, o.heads // n, o.head_dim, dtype=self.dtype, device=self.device)
            payload = out.numel() * out.element_size() + lse.numel() * 4
            self.run("dcp_merge", payload, batch, 1 - 1 / n,
                     {"torch": (call, lambda: off(merged, wanted), lambda: merged.fill_(math.nan)),
                      "python": (lambda: self.state.dcp.merge_attention_into(by_row, out, lse, base2=True),
                                 lambda: off(by_row, wanted.transpose(0, 1)),
                                 lambda: by_row.fill_(math.nan))})

    # --- facts -----------------------------------------------------------------------------------

    def meta(self):
        mine = "cpu"
        if self.cuda:
            p = torch.cuda.get_device_properties(self.device)
            place = (p.pci_domain_id, p.pci_bus_id, p.pci_device_id)
            mine = f"{p.name} ({place[0]:04x}:{place[1]:02x}:{place[2]:02x}.0)"
        gpus = [None] * self.size
        dist.all_gather_object(gpus, mine)
        kept = ("NCCL_", "CUDA_", "TORCH_")
        facts = {"command": " ".join(["torch_baseline.py"] + sys.argv[1:]), "commit": commit(),
                 "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                 "backend": "cuda" if self.cuda else "host", "ranks": self.size,
                 "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                 "mpi": "", "torch": torch.__version__,
                 "environment": sorted(f"{k}={v}" for k, v in os.environ.items()
                                       if k.startswith(kept) and "/" not in v)}
        if self.cuda:
            facts |= {"gpus": gpus, "driver": driver(), "cuda": torch.version.cuda,
                      "nccl": ".".join(str(part) for part in torch.cuda.nccl.version())}
        return facts


def driver():
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
        return next(w for w in words if "." in w and w.replace(".", "").isdigit())
    except (OSError, StopIteration):
        return "unknown"


def main():
    arguments = parse_arguments()
    if torch is None:
        print("cohort-skip: torch_baseline: PyTorch is not installed")
        return 77
    bench = Bench(arguments)

    def interrupt(*_):
        bench.stop = True

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    facts = {"meta": bench.meta()}
    if bench.rank == 0 and arguments.json:
        bench.file = open(arguments.json, "w", encoding="utf-8")
    bench.write(facts)
    for name in arguments.bench:
        if name in ("gather_query", "dcp_merge") and arguments.heads % bench.size:
            if bench.rank == 0:
                print(f"# no {name} rows: {bench.size} ranks do not divide {arguments.heads} heads")
            continue
        if not bench.stop:
            getattr(bench, name)()
    if bench.state is not None:
        bench.state.shutdown()
    dist.barrier()
    dist.destroy_process_group()
    if bench.file:
        bench.file.close()
    return 1 if bench.wrong else 130 if bench.stop else 0


if __name__ == "__main__":
    sys.exit(main())
