# SPDX-License-Identifier: Apache-2.0
"""What torch itself expects of operators, beside their results: gradients, versions, kinds of tensors,
what a compiler may drop; and how long states live. A part of test_package.py."""

import copy
import gc
import math
import os
import pickle
import re
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

import cohort
from harness import CUDA, DEVICE, RANK, SIZE, args, check, refuses

ops = torch.ops.cohort


def check_autograd(state):
    """What is written is as little differentiable as what is returned, and autograd hears of it."""
    tp = state.tp
    weight = torch.ones(2 * SIZE, 2, requires_grad=True, device=DEVICE)
    more = torch.ones(2 * SIZE * SIZE, 2, device=DEVICE)
    writes = {
        "all_reduce_": lambda x: tp.all_reduce_(x),
        "broadcast_": lambda x: tp.broadcast(x),
        "all_reduce_into": lambda x: tp.all_reduce_into(out := torch.empty_like(x), x) or out,
        "all_gather_into": lambda x: tp.all_gather_into_tensor(out := torch.empty_like(more), x) or out,
        "reduce_scatter_into": lambda x: tp.reduce_scatter_tensor(out := torch.empty_like(x[:2]), x) or out,
    }
    for name, call in writes.items():
        refuses(f"backward through {name}", RuntimeError, lambda: call(weight * 1).sum().backward(), f"cohort::{name}")
        refuses(f"a part's through {name}", RuntimeError,
                lambda: torch.autograd.grad(call(weight * 1).sum() + weight.sum(), weight), f"cohort::{name}")
        with torch.no_grad():
            check(f"{name} without gradients", not call(weight * 1).requires_grad)
    refuses("a leaf", RuntimeError, lambda: tp.all_reduce_(weight), "leaf")
    saved = (weight * 2).exp()
    with torch.no_grad():
        tp.all_reduce_(saved)
    refuses("what a backward has kept", RuntimeError, lambda: saved.sum().backward(), "modified by an inplace operation")
    plain = more[:2].clone()
    tp.all_reduce_(plain)
    tp.all_reduce_into(plain, plain.clone())
    tp.broadcast(plain)
    check("writes are counted", plain._version == 3)
    with torch.inference_mode():
        of_inference = torch.ones(2, device=DEVICE)
        check("in inference mode", (tp.all_reduce_(of_inference) == SIZE).all())
    refuses("its tensors elsewhere", RuntimeError, lambda: tp.all_reduce_(of_inference), "inference tensor")


def check_arguments(state):
    tp, x = state.tp, torch.ones(2, 2)
    if not CUDA:
        refuses("sparse", TypeError, lambda: ops.all_gather(x.to_sparse(), 0, tp.name), "strided")
        refuses("nested", TypeError, lambda: ops.all_reduce(torch.nested.nested_tensor([x, x[:1]]), "sum", tp.name), "strided")
        refuses("quantised", TypeError, lambda: ops.all_gather(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 0, tp.name),
                "element type")
        refuses("no tensor", ValueError, lambda: ops.all_gather(None, 0, tp.name), "got none")
    refuses("without memory", ValueError, lambda: tp.all_reduce_into(x, torch.ones(2, 2, device="meta")), "one device")
    alone = {"control": "single", "device": "cpu"}
    for name, options in (("tp", {"tp": 2**32 + 1}), ("growth_bytes", {"growth_bytes": -1}), ("timeout", {"timeout": math.inf}),
                          ("timeout", {"timeout": math.nan}), ("timeout", {"timeout": 0}), ("control", {"control": "gloo"}),
                          ("control", {"control": 7})):
        refuses(f"{name} of {options}", ValueError, lambda: cohort.ParallelState(**{**alone, **options}), name)
    first = dist.new_group([0])
    if RANK > 0:
        refuses("a group of others", ValueError, lambda: cohort.ParallelState(control=first), "that this rank is in")
    check("a tuple as size", state.dcp.empty((2, 3), dtype=torch.float32).shape == (2, 3))


def check_lives():
    """Groups keep their state, a copy is the same, and what is left is closed."""
    group = cohort.ParallelState(control="single", device="cpu").tp
    gc.collect()
    check("a group keeps its state", ops.all_reduce(torch.ones(1), "sum", group.name) == 1)
    check("copies are the same", copy.deepcopy({"group": group})["group"] is group and copy.copy(group) is group)
    refuses("other processes", TypeError, lambda: pickle.dumps(group), "this process")
    name = group.name
    del group
    gc.collect()
    refuses("and goes with the last", ValueError, lambda: ops.arena(name), "no ParallelState")
    try:
        with cohort.ParallelState(control="single", device="cpu") as left:
            raise KeyError
    except KeyError:
        refuses("left by an exception", ValueError, lambda: left.tp.all_reduce(torch.ones(1)), "used after shutdown")


def check_leaving_a_call():
    """Who leaves ends what another thread waits in, and waits for nobody."""
    state = cohort.ParallelState(tp=SIZE, control=dist.group.WORLD, device="cpu", timeout=30)
    began = time.monotonic()
    if RANK == 0:
        thread = threading.Thread(target=refuses, args=(
            "a call that is left", dist.DistBackendError, lambda: state.tp.all_reduce(torch.ones(1)), "another thread"))
        thread.start()
        time.sleep(0.3)
        state._life.leave()
        check("without waiting", time.monotonic() - began < 15)
        thread.join()
    else:
        time.sleep(0.6)
        refuses("a call that rank 0 has left", dist.DistBackendError, lambda: state.tp.all_reduce(torch.ones(1)), "rank 0")
        state._life.leave()
    check("nor the others", time.monotonic() - began < 15)


def check_used_store():
    """What an attempt of processes that are dead has left in a store is nobody's."""
    store, ports = None, [None] * SIZE
    if RANK == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("cohort/0/1/0/0", "a message that was never read")
        store.set("cohort/0/0/1/0", "and its like")
        store.set("cohort/0/hello/1", "a word of the dead")
    dist.all_gather_object(ports, store and store.port)
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ.update(RANK=str(RANK), WORLD_SIZE=str(SIZE))
    with cohort.ParallelState(tp=SIZE, control=f"store://127.0.0.1:{ports[0]}", device="cpu", timeout=20) as state:
        check("a used store", state.tp.all_reduce(torch.ones(1)) == SIZE)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    dist.all_gather_object(ports, None)  # rank 0 keeps it until then


def check_compiled_calls(state):
    """A rank that makes nothing of a call's result takes part in it all the same; and equal calls stay
    as many."""
    tp = state.tp

    def step(x):
        whole, written, sent = tp.all_gather(x, 0), torch.empty(SIZE * 4, 2, device=DEVICE), x * 3
        tp.all_gather_into_tensor(written, x, 0)
        tp.broadcast(sent)
        tp.barrier()
        twice = tp.all_reduce(x) + 2 * tp.all_reduce(x if RANK == 0 else x + 1)
        if RANK == 0:
            return whole.sum() + written.sum() + sent.sum(), twice
        return x.new_zeros(()), twice

    x = torch.full((4, 2), RANK + 1.0, device=DEVICE)
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        check("calls whose results are not used", all(torch.equal(a, b) for a, b in zip(step(x), compiled(x))))

        def inside(x):
            with cohort.use_symmetric_memory(state.dcp):
                return state.dcp.all_gather(x, 0)

        refuses("a scope in what is compiled", Exception,
                lambda: torch.compile(inside, fullgraph=True, backend="aot_eager")(x), "use_symmetric_memory")
    # What compilers keep on disk they know again by the arguments.
    check("the number of ranks is in the name", state.tp.name.endswith(f":{SIZE}"))
    check("which shapes follow from", ops.all_gather(torch.ones(2, device="meta"), 0, "cohort1/tp:3").shape == (6,))


def check_inductor(state):
    """What inductor makes of calls, of which some are not used and some are equal: all, in their order."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code
    name, calls = state.dcp.name, []

    def step(x, lse, rows, weight, residual):
        unused, written = torch.empty_like(x), torch.empty_like(x)
        ops.all_gather(x, 0, name)
        total = ops.all_reduce(x, "sum", name)
        ops.all_reduce_into(unused, x, "sum", name)
        ops.barrier(name)
        again = ops.all_reduce(x, "sum", name)
        ops.all_reduce_into(written, x, "sum", name)
        normed = ops.all_reduce_rms_norm(rows, residual, weight, 1e-6, None, name)
        ops.all_reduce_rms_norm_into(torch.empty_like(rows), normed, residual, weight, 1e-6, None, name)
        return total, again, written, normed, *ops.merge_attention_lse(x, lse, False, False, None, None, name)

    x, lse = torch.ones(4, 2, 8, device=DEVICE), torch.zeros(4, 2, device=DEVICE)
    rows, weight = torch.ones(2, 8, device=DEVICE), torch.full((8,), 2.0, device=DEVICE)
    ours, theirs = rows.clone(), rows.clone()
    # No kernels of its own, and so no C++ compiler.
    with torch.no_grad(), config.patch({"force_disable_caches": True, "cpp_cache_precompile_headers": False, "cpp.simdlen": 0}):
        results, code = run_and_get_code(torch.compile(step, fullgraph=True), x, lse, rows, weight, ours)
    check("compiled by inductor", all(torch.equal(a, b) for a, b in zip(results, step(x, lse, rows, weight, theirs))))
    check("what it writes", torch.equal(ours, theirs) and (ours > 2).all())
    for line in code[0].splitlines():
        calls += re.findall(r"torch\.ops\.cohort\.(\w+)\.default\(", line)
    check(f"its calls: {calls}", calls == ["all_gather", "all_reduce", "all_reduce_into", "barrier", "all_reduce",
                                           "all_reduce_into", "all_reduce_rms_norm", "all_reduce_rms_norm_into", "merge_attention_lse"])


def leave_in_a_call():
    """Rank 0 ends while a thread of it waits for another rank."""
    state = cohort.ParallelState(tp=SIZE, control=args.control, device="cpu", timeout=60)
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, os.getpid())
    if RANK == 0:
        threading.Thread(target=lambda: state.tp.all_reduce(torch.ones(1)), daemon=True).start()
        time.sleep(0.5)
        sys.exit(0)

    def is_there():
        try:
            with open(f"/proc/{everyone[0]}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + 25
    while is_there() and time.monotonic() < end:
        time.sleep(0.1)
    check("rank 0 has ended", not is_there())
    refuses("a call that it was in", dist.DistBackendError, lambda: state.tp.all_reduce(torch.ones(1)), "rank 0")


def leave_with_a_status():
    """Rank 0 fails by its exit status, which ends the job of MPI without waiting for the others."""
    cohort.ParallelState(tp=SIZE, control=args.control, device="cpu", timeout=60)
    if RANK == 0:
        sys.exit(3)
    time.sleep(25)
    check("the job has ended", False)


def check_signals():
    """A signal's handler runs while a call waits. One that throws, as that of Ctrl-C does, ends the call
    and its groups, and the other ranks hear of it."""
    state = cohort.ParallelState(tp=SIZE, control=args.control, device=DEVICE, timeout=30)
    x, handled = torch.ones(4, device=DEVICE), []

    def call():
        state.tp.all_reduce_(x)
        state.synchronize(30)

    def handle(*_):
        refuses("a call by a handler", ValueError, call, "signal's handler")
        handled.append(time.monotonic())

    def send_in(seconds, number):
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()

    before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, handle),
              signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    call()
    if RANK == 0:
        if not CUDA:  # on cards the handler may run between two calls
            send_in(0.2, signal.SIGUSR1)
        call()
        check("a handler that returns", CUDA or handled and time.monotonic() - handled[0] > 0.2)
        check("and disturbs nothing", (x == SIZE * SIZE).all())
        send_in(0.3, signal.SIGINT)
        began = time.monotonic()
        refuses("Ctrl-C", KeyboardInterrupt, call)
        check("at once", time.monotonic() - began < 2.3)
        refuses("what it has left", dist.DistBackendError, call)
    else:
        time.sleep(1.0)
        call()
        time.sleep(1.0)
        refuses("whom rank 0 has left", dist.DistBackendError, call, "rank 0", "signal")
    state._life.leave()
    others = dist.new_group(range(SIZE))
    left = cohort.ParallelState(tp=SIZE, control=dist.group.WORLD, device="cpu", timeout=30)
    if RANK == 0:
        signal.signal(signal.SIGUSR1, lambda *_: left._life.leave())
        send_in(0.2, signal.SIGUSR1)
        refuses("a handler that leaves", dist.DistBackendError, lambda: left.tp.all_reduce(torch.ones(1)), "signal's handler")
    else:
        time.sleep(0.6)
        refuses("whom a handler has left", dist.DistBackendError, lambda: left.tp.all_reduce(torch.ones(1)), "rank 0")
    left._life.leave()
    if RANK == 0:
        send_in(0.3, signal.SIGINT)
        refuses("Ctrl-C while the others do not come", KeyboardInterrupt,
                lambda: cohort.ParallelState(tp=SIZE, control=others, device="cpu", timeout=30))
    for number, handler in before.items():
        signal.signal(number, handler)
