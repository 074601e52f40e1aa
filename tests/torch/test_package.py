# SPDX-License-Identifier: Apache-2.0
"""mpirun -n N python3 tests/torch/test_package.py [--control CONTROL] [--leave HOW] [--device DEVICE]

Checks the Python package on N ranks: against torch.distributed over random shapes, under
torch.compile, and what is refused. The last line of rank 0 is "cohort-test: passed=P failed=F
skipped=S", added up over the ranks. Without mpirun, RANK, WORLD_SIZE and MASTER_PORT tell the place.

--leave: how the ranks end, to see that none hangs: "in_order"; "silently", without shutdown; "raising",
where rank 0 fails by an exception and the others wait for it; "in_a_call", while a thread of rank 0
waits for another; "with_a_status", where rank 0 fails by that while the others work on.
"""

import datetime
import gc
import math
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

import cohort
import edges
import masks_and_norms
from harness import CUDA, DEVICE, DTYPES, RANK, SIZE, args, check, check_operator, counts, refuses, skip


def shared_random(seed):
    """The same numbers on every rank."""
    return torch.Generator().manual_seed(seed)


def of_rank(shape, dtype, seed, rank):
    """Small integers: sums are exact in every type and order."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-8, 9, tuple(shape), generator=generator).to(dtype).to(DEVICE)


def pick(generator, low, high):
    return int(torch.randint(low, high + 1, (), generator=generator))


# --- what engines write over torch.distributed ------------------------------------------------------

def all_gather_reference(x, dim):
    mine = x.contiguous().view(torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(SIZE)]
    dist.all_gather(parts, mine)
    return torch.cat([part.view(x.dtype) for part in parts], dim)


def reduce_scatter_reference(x, dim):
    total = x.float().contiguous().clone()
    dist.all_reduce(total)
    return total.chunk(SIZE, dim)[RANK].to(x.dtype)


def merge_reference(out, lse, base2, sink=None):
    """Gather the log-sum-exps, correct the own partial, sum over the ranks; in double, of all heads.
    `out` [S, B, H, D], `lse` [S, B, H], `sink` [H]."""
    factor = math.log(2.0) if base2 else 1.0
    lses = all_gather_reference(lse[None], 0).flatten(0, 1).double() * factor
    if sink is not None:
        lses = torch.cat([lses, (sink.double() * factor).expand(1, *lses.shape[1:])])
    total = torch.logsumexp(lses, 0)
    mine = lse.double() * factor
    weight = torch.where(torch.isfinite(mine), torch.exp(mine - total), torch.zeros_like(mine))[..., None]
    merged = torch.where(weight > 0, out.double() * weight, torch.zeros_like(weight)).sum(0)
    dist.all_reduce(merged)
    return merged, total / factor


def near(x, expected, dtype=torch.float32):
    unit = max(torch.finfo(dtype).eps, 1e-5)
    return ((x.double() - expected).abs() <= unit * (1 + expected.abs())).all()


def check_collectives(state):
    for seed in range(12):
        generator = shared_random(seed)
        shape = [pick(generator, 1, 4) * SIZE for _ in range(pick(generator, 1, 4))]
        dim = pick(generator, -len(shape), len(shape) - 1)
        dtype = DTYPES[seed % 3]
        x = of_rank(shape, dtype, seed, RANK)
        if len(shape) > 1 and seed % 2:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        label = f"{dtype} {shape} dim {dim}"
        group = (state.world, state.tp, state.dcp)[seed % 3]
        check(f"all_gather {label}", torch.equal(group.all_gather(x, dim), all_gather_reference(x, dim)))
        expected = reduce_scatter_reference(x, dim)
        check(f"reduce_scatter {label}", torch.equal(group.reduce_scatter_along_dim(x, dim), expected))
        out = torch.empty_like(expected)
        group.reduce_scatter_tensor(out, x, dim)
        check(f"reduce_scatter_tensor {label}", torch.equal(out, expected))
        total = x.float().contiguous().clone()
        dist.all_reduce(total)
        total = total.to(dtype)
        check(f"all_reduce {label}", torch.equal(group.all_reduce(x), total))
        into = torch.empty_like(x)
        group.all_reduce_into(into, x)
        check(f"all_reduce_into {label}", torch.equal(into, total))
        place = x.clone()
        check(f"all_reduce_ {label}", group.all_reduce_(place) is place and torch.equal(place, total))
        root = pick(generator, 0, SIZE - 1)
        check(f"broadcast {label}",
              torch.equal(group.broadcast(x.clone(), root), of_rank(shape, dtype, seed, root)))
        parts = torch.stack([of_rank(shape, dtype, seed, r).chunk(SIZE, 0)[RANK] for r in range(SIZE)])
        check(f"all_to_all {label}", torch.equal(group.all_to_all(x), parts.reshape(x.shape)))


def partials(seed, batch, heads, value, dtype):
    out = torch.randn(batch, heads, value,
                      generator=torch.Generator().manual_seed(50 * seed + RANK)).to(dtype).to(DEVICE)
    lse = 4 * torch.randn(batch, heads, generator=torch.Generator().manual_seed(70 * seed + RANK))
    if (seed + RANK) % 3 == 0 and RANK > 0:  # no tokens here; rank 0 always has some
        lse[::2] = -math.inf
        out[::2] = math.nan
    return out, lse.to(DEVICE)


def check_decode(state):
    for seed in range(12):
        generator = shared_random(100 + seed)
        batch, own = pick(generator, 1, 5), pick(generator, 1, 4)
        latent, rope, value = (8 * pick(generator, 1, 5) for _ in range(3))
        dtype, base2 = DTYPES[seed % 3], bool(seed % 2)
        label = f"{dtype} B={batch} h={own} Dn={latent} Dr={rope} D={value} base2={base2}"
        nope, pe = of_rank((batch, own, latent), dtype, seed, RANK), of_rank((batch, own, rope), dtype, seed + 40, RANK)
        q = all_gather_reference(torch.cat([nope, pe], -1), 1)
        check(f"gather_query {label}", torch.equal(state.dcp.gather_query(nope, pe), q))
        into = torch.empty_like(q)
        state.dcp.gather_query_into(into, nope, pe)
        check(f"gather_query_into {label}", torch.equal(into, q))

        out, lse = partials(seed, batch, own * SIZE, value, dtype)
        whole, whole_lse = merge_reference(out[None], lse[None], base2)
        expected, expected_lse = whole.chunk(SIZE, 1)[RANK], whole_lse.chunk(SIZE, 1)[RANK]
        arguments = {"cp_attn_out": out, "cp_attn_lse": lse, "cp_group": state.dcp, "ctx": None,
                     "return_lse": True, "is_lse_base_on_e": not base2}
        merged, merged_lse = cohort.cp_lse_ag_out_rs(**arguments)
        check(f"cp_lse_ag_out_rs {label}", merged.dtype == dtype and near(merged, expected, dtype))
        check(f"its lse {label}", near(merged_lse, expected_lse))
        if not base2:
            check(f"positional {label}", torch.equal(cohort.cp_lse_ag_out_rs(out, lse, state.dcp), merged))
        everything, all_lse = cohort.cp_lse_ag_out_ar(**arguments)
        check(f"cp_lse_ag_out_ar {label}", near(everything, whole, dtype) and near(all_lse, whole_lse))
        check(f"the same bits {label}", torch.equal(everything.chunk(SIZE, 1)[RANK], merged))
        again = torch.empty_like(merged)
        state.dcp.merge_attention_into(again, out, lse, base2=base2)
        check(f"merge_attention_into {label}", torch.equal(again, merged) or SIZE == 1)

        heads = own * SIZE + 1  # which the ranks do not divide
        out, lse = partials(400 + seed, batch, heads, value, dtype)
        expected, expected_lse = merge_reference(out[None], lse[None], base2)
        merged, merged_lse = cohort.cp_lse_ag_out_ar(out, lse, state.dcp, None, True, not base2)
        check(f"cp_lse_ag_out_ar {label} H={heads}", near(merged, expected, dtype) and near(merged_lse, expected_lse))

        heads, splits = own * SIZE, pick(generator, 1, 3)
        out, lse = partials(200 + seed, splits * batch, heads, value, dtype)
        out, lse = out.view(splits, batch, heads, value), lse.view(splits, batch, heads)
        sink = torch.randn(heads, generator=shared_random(300 + seed)).to(DEVICE)
        expected, expected_lse = merge_reference(out, lse, base2, sink)
        for replicated in (False, True):
            merged, merged_lse = state.dcp.merge_attention(out, lse, base2=base2, with_lse=True, replicated=replicated,
                                                           sink=sink)
            mine = (slice(None), slice(None) if replicated else slice(RANK * own, (RANK + 1) * own))
            check(f"splits and sinks {label} S={splits} replicated={replicated}",
                  near(merged, expected[mine], dtype) and near(merged_lse, expected_lse[mine]))
    # Parts of different types are rows of bytes.
    nope = of_rank((2, 2, 16), torch.float32, 7, RANK).to(torch.float8_e4m3fn)
    scale = of_rank((2, 2, 4), torch.float32, 8, RANK)
    rows = state.dcp.gather_query(nope, scale)
    whole = all_gather_reference(torch.cat([nope.view(torch.uint8), scale.view(torch.uint8)], -1), 1)
    check("gather_query of rows of bytes", rows.dtype == torch.uint8 and torch.equal(rows, whole))


def check_refusals(state):
    x = torch.zeros(4 * SIZE, 3, device=DEVICE)
    ops = torch.ops.cohort
    refuses("dim", ValueError, lambda: ops.reduce_scatter(x, 2, "sum", state.tp.name), "dim", "got 2")
    for number in (2**32, -2**40):  # not dimension 0, nor rank 0
        refuses(f"dim {number}", ValueError, lambda: ops.all_gather_into(x, x, number, state.tp.name), "dim")
        refuses(f"rank {number}", ValueError, lambda: ops.broadcast_(x, number, state.tp.name), "broadcast")
    if SIZE > 1 and 3 % SIZE:
        refuses("extent", ValueError, lambda: state.tp.reduce_scatter_along_dim(x, 1), "reduce_scatter x")
    refuses("dtype", TypeError, lambda: ops.all_gather(x.to(torch.complex64), 0, state.tp.name), "element type")
    refuses("op", ValueError, lambda: ops.all_reduce(x, "mean", state.tp.name), "sum, prod, min or max")
    refuses("group", ValueError, lambda: ops.all_reduce(x, "sum", "nowhere"), "group nowhere")
    refuses("kind of group", ValueError, lambda: ops.merge_attention(x, x, False, False, None, None, state.tp.name), "dcp group")
    refuses("three dimensions", ValueError, lambda: ops.merge_attention(x, x, False, False, None, None, state.dcp.name), "merge_attention out")
    refuses("in place over itself", ValueError, lambda: ops.all_reduce_(x[:1].expand(3, 3), "sum", state.tp.name), "all_reduce")
    refuses("no tensor", TypeError, lambda: state.pp.send_tensor_dict({"a": 1}), "send_tensor_dict a")
    refuses("no scope", ValueError, lambda: cohort.empty(4, dtype=torch.float32), "no use_symmetric_memory")
    refuses("options", ValueError, lambda: cohort.ParallelState(tp=SIZE + 1, control=args.control, device=DEVICE),
            f"the world has {SIZE}")
    needs_grad = torch.ones(SIZE, requires_grad=True, device=DEVICE)
    refuses("backward", RuntimeError, lambda: ops.all_reduce(needs_grad * 1, "sum", state.tp.name).sum().backward(),
            "cohort::all_reduce")


def check_compiled(state):
    """fullgraph: nothing of it may break the graph."""
    tp, dcp = state.tp, state.dcp

    def step(nope, pe, out, lse, residual):
        q = dcp.gather_query(nope, pe)
        merged = dcp.merge_attention(out + 0, lse)
        reduced = tp.all_reduce(residual * 2)
        spread = tp.all_gather(residual, 0)
        back = tp.reduce_scatter_along_dim(spread, 0)
        written = torch.empty_like(residual)
        tp.all_reduce_into(written, residual)
        normed, summed = tp.all_reduce_rms_norm(residual, residual + 1, residual[0])
        return q.sum(), merged * 2, reduced + written, back, normed, summed * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            inputs = (of_rank((batch, 2, 8), torch.float32, 1, RANK), of_rank((batch, 2, 8), torch.float32, 2, RANK),
                      *partials(3, batch, 2 * SIZE, 8, torch.float32), of_rank((4 * SIZE, 6), torch.float32, 4, RANK))
            eager, fast = step(*inputs), compiled(*inputs)
            check(f"compiled, batch {batch}", all(torch.equal(a, b) for a, b in zip(eager, fast)))
        # Graphs that torch makes by itself, from its third call on.
        replayed = torch.compile(step, fullgraph=True, mode="reduce-overhead")
        for shift in range(6 if CUDA else 0):
            torch.compiler.cudagraph_mark_step_begin()
            moved = [tensor + shift for tensor in inputs]
            eager, fast = step(*moved), replayed(*moved)
            check(f"replayed by torch, call {shift}", all(torch.equal(a, b) for a, b in zip(eager, fast)))
    x = of_rank((2 * SIZE, 2), torch.float32, 5, RANK)
    for op, arguments in (("all_gather", (x, 1, tp.name)), ("reduce_scatter", (x, 0, "sum", tp.name)),
                          ("all_reduce", (x, "sum", tp.name)), ("all_reduce_", (x.clone(), "sum", tp.name)),
                          ("all_reduce_into", (torch.empty_like(x), x, "sum", tp.name))):
        check_operator(op, arguments)


def check_symmetric(state):
    offsets = []
    with cohort.use_symmetric_memory(state.dcp):
        x = cohort.empty(3, 5, dtype=torch.float32)
        q = torch.ops.cohort.all_gather(x.fill_(RANK), 0, state.dcp.name)
        offsets += [state.dcp.arena_offset(x), state.dcp.arena_offset(q)]
        with cohort.use_symmetric_memory(state.dcp, disabled=True):
            check("a null scope", state.dcp.arena_offset(cohort.empty(4, dtype=torch.float32)) == -1)
        again = state.dcp.arena_offset(cohort.empty(4, dtype=torch.float32))
    has_windows = state.dcp.has_symmetric_memory
    check("windows on all ranks or none, and on the host", same_everywhere(has_windows) and (CUDA or has_windows == (SIZE > 1)))
    check("the outer one again", (again >= 0) == has_windows)
    check("results lie in the arena", all((offset >= 0) == has_windows for offset in offsets))
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, offsets)
    check("equal offsets", all(offset == everyone[0] for offset in everyone))
    check("values", torch.equal(q, torch.arange(SIZE, device=DEVICE).repeat_interleave(3)[:, None].expand(-1, 5).float()))
    y = torch.ops.cohort.all_gather(x, 0, state.dcp.name)
    check("torch's memory outside", state.dcp.arena_offset(y) == -1)
    before = state.dcp.arena()["live_blocks"]
    view = state.dcp.empty(4, 4, dtype=torch.float32)[1:]
    check("a block lives", state.dcp.arena()["live_blocks"] == before + 1)
    cohort.record_stream(view, state)
    del view
    gc.collect()
    check("and goes with its last view", state.dcp.arena()["live_blocks"] == before)


def same_everywhere(value):
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, value)
    return all(one == everyone[0] for one in everyone)


def check_torch_results(state):
    """Torch's own results in symmetric memory, and calls with them where they lie: in torch's where the
    group has no windows, as with ranks that share a card."""
    dcp, offset, windows = state.dcp, state.dcp.arena_offset, state.dcp.has_symmetric_memory
    check("pools where there are windows", (dcp.mem_pool() is not None) == windows)
    dcp.reserve(192 << 20)
    part = torch.full((4, 300, 512), float(RANK), dtype=torch.bfloat16, device=DEVICE)
    with cohort.use_symmetric_memory(dcp):
        q = torch.cat([part, part + 1], -1)
        with cohort.use_symmetric_memory(dcp, disabled=True):
            check("nothing under a null scope", offset(part.clone()) == -1)
        with cohort.use_symmetric_memory(state.tp):  # which has no windows
            check("nor where a group has none", offset(part.clone()) == -1)
        with cohort.use_symmetric_memory(dcp):
            check("nested", (offset(part.clone()) >= 0) == windows)
        product = part[0] @ part[0].T
    check("torch.cat lies in the arena", (offset(q) >= 0) == windows)
    check("and a matrix product", (offset(product) >= 0) == windows)
    check("at one offset on all ranks", same_everywhere([offset(q), offset(product)]))
    check("torch's memory outside", offset(part + 1) == -1)
    check("gathered", torch.equal(dcp.all_gather(q, 0), all_gather_reference(q, 0)))

    # The same program with another history on rank 0: equal tensors at unlike offsets.
    elements = 8 << 20  # 16 MiB, more than the library's own kernels take
    with cohort.use_symmetric_memory(dcp):
        del part, q, product
        for _ in range(2):  # what torch caches, to be split
            torch.empty(12 * elements // 4, dtype=torch.float16, device=DEVICE)
        shift = torch.empty(1 << 20, device=DEVICE) if RANK == 0 else None
        x = torch.full((elements,), RANK + 1.0, dtype=torch.bfloat16, device=DEVICE)
        y = cohort.empty(elements, dtype=torch.bfloat16)
    total = SIZE * (SIZE + 1) / 2
    path = dcp.path("all_reduce", x, y)
    if windows:
        check("unlike offsets", offset(x) >= 0 and not same_everywhere(offset(x)))
        check(f"a way that needs no equal offsets: {path}", "packed" in path or path.startswith("own"))
    else:
        skip("unlike offsets: the group has no windows")
        check(f"a way without windows: {path}", "symmetric" not in path and same_everywhere(path))
    dcp.all_reduce_into(y, x)
    check("all_reduce from there", (y == total).all())
    dcp.reduce_scatter_tensor(y[:elements // SIZE].fill_(0), x)
    check("reduce_scatter from there", (y[:elements // SIZE] == total).all())
    share = x[:elements // SIZE]
    dcp.all_gather_into_tensor(y, share)
    check("all_gather from there", torch.equal(y, all_gather_reference(share, 0)))
    expected = y.clone()
    dcp.all_gather_into_tensor(x, share.clone())
    check("all_gather into there", torch.equal(x, expected))
    x.fill_(RANK + 1.0)
    dcp.all_reduce_(x)
    check("all_reduce in place there", (x == total).all())
    del shift, x, y, share


def check_torch_results_in_graphs(state):
    dcp, offset, windows = state.dcp, state.dcp.arena_offset, state.dcp.has_symmetric_memory
    x = torch.zeros(4, 8, device=DEVICE)

    def step():
        with cohort.use_symmetric_memory(dcp):
            q = torch.cat([x, x + 1], -1)
        inside = offset(q)
        with cohort.use_symmetric_memory(dcp, disabled=True):
            outside = offset(x * 2)
        return q, dcp.all_gather(q, 0), inside, outside, offset(x * 3)

    step()
    step()
    state.synchronize(20)
    dcp.reserve(64 << 20)
    before = dcp.arena()["used"]
    for mode in ("global", "thread_local"):
        for around in (True, False):
            graph = torch.cuda.CUDAGraph()
            capture = torch.cuda.graph(graph, capture_error_mode=mode)
            first, second = (state.graph_capture(), capture) if around else (capture, state.graph_capture())
            with first, second:
                q, gathered, *places = step()
            label = f"{mode}, {'around' if around else 'inside'}"
            check(f"captured torch.cat lies in the arena, {label}", (places[0] >= 0) == windows and places[1:] == [-1, -1])
            check(f"at one offset, {label}", same_everywhere(places))
            eager = step()[0]  # must not share its memory with the graph
            check(f"eager results lie elsewhere, {label}", eager.data_ptr() != q.data_ptr())
            for replay in range(5):
                x.fill_(replay + 10.0 * RANK)
                eager.fill_(-1.0)
                state.replay(graph)
                expected = torch.cat([x, x + 1], -1)
                check(f"replay {replay}, {label}", torch.equal(q, expected) and (eager == -1.0).all()
                      and torch.equal(gathered, all_gather_reference(expected, 0)))
            del q, gathered, eager
            graph.reset()
            torch.cuda.synchronize()
            time.sleep(0.05)
            state.reclaim_graphs()
            check(f"the graph's memory comes back, {label}", dcp.arena()["used"] == before)
    with cohort.use_symmetric_memory(dcp):
        if windows:
            refuses("a capture within a scope", ValueError, lambda: state.graph_capture().__enter__(), "inside of it")


def check_threads(state):
    """Python runs on while a rank waits: the last rank comes when a thread of each other one has run
    while that one waits for it."""
    store, last = dist.distributed_c10d._get_default_store(), SIZE - 1

    def run_on():
        for _ in range(40):
            time.sleep(0.005)
        store.set(f"ran/{RANK}", "1")

    if RANK == last:
        try:
            store.wait([f"ran/{rank}" for rank in range(last)], datetime.timedelta(seconds=15))
            check("others run on while they wait", True)
        except dist.DistStoreError as error:
            check(f"others run on while they wait: {error}", False)
        state.world.barrier()
        state.synchronize(20)
        return
    thread = threading.Thread(target=run_on)
    thread.start()
    state.world.barrier()
    state.synchronize(20)
    thread.join()


def check_subsets():
    """Ranks that have met elsewhere before meet all others none the less."""
    pair = dist.new_group([0, 1])
    if RANK < 2:
        with cohort.ParallelState(tp=2, control=pair, device=DEVICE, timeout=20) as state:
            check("a subset", int(state.tp.all_reduce(torch.full((1,), RANK, device=DEVICE))) == 1)
    state = cohort.ParallelState(tp=SIZE, control=dist.group.WORLD, device=DEVICE, timeout=20)
    total = state.tp.all_reduce(torch.full((1,), RANK, device=DEVICE))
    check("and all", int(total) == SIZE * (SIZE - 1) // 2)
    with cohort.use_symmetric_memory(state.tp):
        state.shutdown()
        state._life.leave()
        refuses("a scope of a state that is gone", ValueError, lambda: cohort.empty(4, dtype=torch.float32), "is gone")


def check_stages():
    """Stages hand each other dicts."""
    state = cohort.ParallelState(pp=SIZE, control=args.control, device=DEVICE)
    tensors = {"hidden": of_rank((3, 8), torch.bfloat16, 9, 0), "residual": of_rank((5,), torch.int64, 10, 0),
               "mask": of_rank((7,), torch.int64, 12, 0) > 0, "types": of_rank((3,), torch.int16, 13, 0)}
    if not state.pp.is_first_rank:
        tensors = state.pp.recv_tensor_dict()
        check("a dict of nothing", state.pp.recv_tensor_dict() == {})
    if not state.pp.is_last_rank:
        state.pp.send_tensor_dict(tensors)
        state.pp.send_tensor_dict({})
    check("names", list(tensors) == ["hidden", "residual", "mask", "types"])
    check("masks", torch.equal(tensors["mask"], of_rank((7,), torch.int64, 12, 0) > 0)
          and torch.equal(tensors["types"], of_rank((3,), torch.int16, 13, 0)))
    check("tensors", torch.equal(tensors["hidden"], of_rank((3, 8), torch.bfloat16, 9, 0))
          and torch.equal(tensors["residual"], of_rank((5,), torch.int64, 10, 0)))
    kept = state.world.all_gather(of_rank((2,), torch.float32, 11, RANK), 0)
    state.shutdown()
    state.shutdown()
    refuses("after shutdown", ValueError, lambda: torch.ops.cohort.all_gather(kept, 0, state.world.name), "shutdown")
    del state
    gc.collect()
    check("tensors outlive their state",
          torch.equal(kept, torch.cat([of_rank((2,), torch.float32, 11, r) for r in range(SIZE)])))


def main():
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo",
                            init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}",
                            rank=RANK, world_size=SIZE, timeout=datetime.timedelta(seconds=60))
    state = cohort.ParallelState(tp=SIZE, dcp=SIZE, control=args.control, device=DEVICE, symmetric=True,
                                 timeout=20)
    check("layout", (state.tp.world_size, state.dcp.rank_in_group, state.pp.world_size) == (SIZE, RANK, 1))
    check("world ranks", state.world.ranks == list(range(SIZE)))
    if args.leave == "in_order":
        check_collectives(state)
        check_decode(state)
        check_refusals(state)
        edges.check_autograd(state)
        edges.check_arguments(state)
        masks_and_norms.check_masks(state)
        masks_and_norms.check_norm(state)
        masks_and_norms.check_types(state)
        check_compiled(state)
        if SIZE > 1:
            edges.check_compiled_calls(state)
        elif not CUDA:
            edges.check_inductor(state)
        check_symmetric(state)
        if CUDA and SIZE > 1:
            check_torch_results(state)
            check_torch_results_in_graphs(state)
        elif not CUDA:
            with cohort.use_symmetric_memory(state.dcp):
                check("torch's results stay where they are on the host", state.dcp.arena_offset(torch.zeros(4) + 1) == -1)
            check("of whose memory torch has no pools", state.dcp.mem_pool() is None)
        check_threads(state)
        check_stages()
        if SIZE > 1:
            check_subsets()
            edges.check_used_store()
            edges.check_leaving_a_call()
        if SIZE == 2:
            edges.check_signals()
        edges.check_lives()
    if args.leave == "in_a_call":
        edges.leave_in_a_call()
    if args.leave == "with_a_status":
        edges.leave_with_a_status()
    if args.leave == "raising":
        if RANK == 0:
            raise KeyError("this rank fails")
        refuses("a rank that is gone", dist.DistBackendError, lambda: (state.world.reserve(1 << 20),
                                                                      state.world.barrier(), state.synchronize(10)),
                "rank 0")
    if args.leave in ("in_a_call", "with_a_status"):  # rank 0 is gone
        print("cohort-test:", *(f"{key}={count}" for key, count in counts.items()), flush=True)
        return 1 if counts["failed"] else 0
    everyone = [None] * SIZE
    if args.leave != "raising":
        dist.all_gather_object(everyone, counts)
        if RANK == 0:
            print("cohort-test:", *(f"{key}={sum(one[key] for one in everyone)}" for key in counts), flush=True)
    if args.leave == "in_order":
        state.shutdown()
    if args.leave == "in_order" or (args.leave == "silently" and args.control == "mpi"):  # else the state needs it
        # A thread of torch's group may still hold a tensor of the last call, and drop it when the interpreter is gone.
        dist.destroy_process_group()
    elif args.leave == "silently":
        time.sleep(0.2)  # by then it has
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
