# SPDX-License-Identifier: Apache-2.0
"""Calls with types that have no arithmetic, and the sum with its residual and norm. A part of
test_package.py."""

import numpy
import torch

import cohort
from harness import CUDA, DEVICE, DTYPES, RANK, SIZE, check, check_operator, refuses

ops = torch.ops.cohort
MASKS = (torch.bool, torch.int16, torch.uint16)


def mask_of(shape, dtype, seed, rank):
    numbers = torch.randint(-30000, 30000, shape, generator=torch.Generator().manual_seed(100 * seed + rank))
    numbers = numbers > 0 if dtype == torch.bool else numbers.to(torch.int16)
    return numbers.view(dtype).to(DEVICE)


def same(x, expected):
    """Torch compares few of these types itself."""
    return x.dtype == expected.dtype and x.shape == expected.shape and torch.equal(
        x.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def joined(dtype, dim, parts):
    return torch.cat([part.view(torch.int16) if dtype != torch.bool else part for part in parts], dim).view(dtype)


def check_masks(state):
    """Engines broadcast and gather masks and token types: moved, and never reduced."""
    tp = state.tp
    for dtype in MASKS:
        shape = (2 * SIZE, 3, 5)
        everyone = [mask_of(shape, dtype, 1, rank) for rank in range(SIZE)]
        mine = everyone[RANK]
        for dim in (0, 1, -1):
            check(f"all_gather {dtype} {dim}", same(tp.all_gather(mine, dim), joined(dtype, dim, everyone)))
        turned = mine.transpose(0, 2)
        check(f"all_gather {dtype} with strides",
              same(tp.all_gather(turned, 0), joined(dtype, 0, [one.transpose(0, 2) for one in everyone])))
        check(f"broadcast {dtype}", same(tp.broadcast(mine.clone(), SIZE - 1), everyone[SIZE - 1]))
        parts = [one[2 * RANK:2 * RANK + 2] for one in everyone]
        check(f"all_to_all {dtype}", same(tp.all_to_all(mine), joined(dtype, 0, parts)))
        if SIZE > 1:
            received = torch.empty_like(mine)
            if RANK == 0:
                tp.send(mine, 1)
            elif RANK == 1:
                check(f"send and recv {dtype}", same(tp.recv(received, 0), everyone[0]))
            name = {torch.bool: "b8", torch.int16: "i16", torch.uint16: "u16"}[dtype]
            refuses(f"all_reduce {dtype}", ValueError, lambda: tp.all_reduce(mine), "all_reduce x", name)
            refuses(f"reduce_scatter {dtype}", ValueError, lambda: tp.reduce_scatter_along_dim(mine, 0), "reduce_scatter x", name)
        with cohort.use_symmetric_memory(state.dcp):
            check(f"empty {dtype}", cohort.empty(3, dtype=dtype).dtype == dtype)


def norm_reference(x_of, residual, weight, eps):
    total = sum(x_of(rank).double() for rank in range(SIZE))
    summed = residual.double() + total
    return summed, summed / torch.sqrt((summed * summed).mean(-1, keepdim=True) + eps) * weight.double()


def check_norm(state):
    """Against torch alone. Small integers: sums are exact in every type and order."""
    tp = state.tp
    for seed, (rows, hidden) in enumerate(((1, 8), (3, 64), (5, 256), (2, 1000))):
        for dtype in DTYPES:
            def number(kind, shape, low, high):
                generator = torch.Generator().manual_seed(1000 * seed + kind)
                return torch.randint(low, high, shape, generator=generator).to(dtype).to(DEVICE)

            def x_of(rank):
                return number(rank, (rows, hidden), -8, 9)

            label, eps = f"{dtype} [{rows}, {hidden}]", 1e-5
            residual, weight = number(100, (rows, hidden), -8, 9), number(101, (hidden,), 1, 5)
            summed, expected = norm_reference(x_of, residual, weight, eps)
            place = residual.clone()
            out, residual_out = tp.all_reduce_rms_norm(x_of(RANK), place, weight, eps)
            unit = 2 * torch.finfo(dtype).eps
            check(f"norm {label}", out.dtype == dtype
                  and ((out.double() - expected).abs() <= unit * expected.abs() + 1e-6).all())
            check(f"its residual {label}", residual_out is place and torch.equal(place.double(), summed))
            into, place = torch.empty_like(out), residual.clone()
            tp.all_reduce_rms_norm_into(into, x_of(RANK), place, weight, eps)
            check(f"into {label}", torch.equal(into, out) and torch.equal(place, residual_out))
            place, scale = residual.clone(), torch.full((1,), 0.5, device=DEVICE)
            small, _ = tp.all_reduce_rms_norm(x_of(RANK), place, weight, eps, scale=scale)
            wanted = (expected / 0.5).clamp(-448, 448)
            check(f"fp8 {label}", small.dtype == torch.float8_e4m3fn and torch.equal(place, residual_out)
                  and ((small.double() - wanted).abs() <= wanted.abs() / 15 + 2**-9).all())
    x, residual, weight = (torch.ones(*shape, device=DEVICE) for shape in ((2, 8), (2, 8), (8,)))
    refuses("another residual", ValueError, lambda: tp.all_reduce_rms_norm(x, residual.half(), weight), "residual", "f32")
    refuses("another weight", ValueError, lambda: tp.all_reduce_rms_norm(x, residual, weight[:4]), "weight", "8")
    refuses("three dimensions", ValueError, lambda: tp.all_reduce_rms_norm(x[None], residual, weight), "rms_norm x")
    refuses("a negative eps", ValueError, lambda: tp.all_reduce_rms_norm(x, residual, weight, -1.0), "epsilon")
    refuses("a scale for no fp8", ValueError,
            lambda: tp.all_reduce_rms_norm_into(torch.empty_like(x), x, residual, weight, scale=weight[:1]), "scale")
    refuses("out over the residual", ValueError, lambda: tp.all_reduce_rms_norm_into(residual, x, residual, weight), "out")
    refuses("devices", ValueError, lambda: tp.all_reduce_rms_norm(x, residual.to("meta"), weight), "one device")
    needs = torch.ones(2, 8, requires_grad=True, device=DEVICE)
    refuses("backward through the norm", RuntimeError,
            lambda: tp.all_reduce_rms_norm(needs * 1, residual.clone(), weight)[0].sum().backward(), "cohort::all_reduce_rms_norm")
    check("refused calls have written nothing", (residual == 1).all())
    check_compiled_norm(state, x, weight)


def check_compiled_norm(state, x, weight):
    tp = state.tp

    def layer(x, residual, weight):
        hidden, residual = tp.all_reduce_rms_norm(x * 2, residual, weight)
        tp.all_reduce_rms_norm(x, residual, weight)  # whose rows nobody uses
        into = torch.empty_like(x)
        tp.all_reduce_rms_norm_into(into, hidden, residual, weight)
        return (hidden if RANK == 0 else x) + 1, into

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        mine, theirs = torch.ones(2, 8, device=DEVICE), torch.ones(2, 8, device=DEVICE)
        check("norm, compiled", all(torch.equal(a, b) for a, b in zip(layer(x, mine, weight), compiled(x, theirs, weight))))
        check("and its residual", torch.equal(mine, theirs) and (mine > SIZE).all())
    for op, arguments in (("all_reduce_rms_norm", (x, mine, weight, 1e-6, None, tp.name)),
                          ("all_reduce_rms_norm_into", (torch.empty_like(x), x, mine, weight, 1e-6, None, tp.name))):
        check_operator(op, arguments)
    if not CUDA:
        return
    graph, place = torch.cuda.CUDAGraph(), torch.ones(2, 8, device=DEVICE)
    tp.all_reduce_rms_norm(x, place.clone(), weight)
    state.synchronize(20)
    with state.graph_capture(), torch.cuda.graph(graph):
        captured, _ = tp.all_reduce_rms_norm(x, place, weight)
    eager = torch.ones(2, 8, device=DEVICE)
    for replay in range(4):
        state.replay(graph)
        expected, _ = tp.all_reduce_rms_norm(x, eager, weight)
        check(f"norm, replay {replay}", torch.equal(captured, expected) and torch.equal(place, eager))


def check_types(state):
    """Wrong types are refused by the argument's name, and so is vmap."""
    tp, x = state.tp, torch.ones(2 * SIZE, 2, device=DEVICE)
    for name, call in {
        "x": lambda: ops.all_gather(numpy.ones(2), 0, tp.name), "dim": lambda: ops.all_gather(x, 0.5, tp.name),
        "op": lambda: ops.all_reduce(x, None, tp.name),
        "src": lambda: tp.broadcast(x, "first"), "dst": lambda: tp.send(x, None), "out": lambda: tp.all_reduce_into([1.0], x),
        "weight": lambda: tp.all_reduce_rms_norm(x, x, 1.0), "eps": lambda: tp.all_reduce_rms_norm(x, x, x, "small"),
        "size": lambda: state.dcp.reserve("much"), "lse": lambda: state.dcp.merge_attention(x, [0.0]),
    }.items():
        refuses(f"a wrong {name}", RuntimeError, call, f"argument '{name}'")
    alone = {"control": "single", "device": "cpu"}
    for name, value in (("tp", "4"), ("dcp", 2.0), ("pp", None), ("timeout", "long"), ("symmetric", 3), ("symmetric", [1]),
                        ("merge_plan", None), ("debug_checks", "no"), ("growth_bytes", 0.5)):
        refuses(f"a wrong {name}", TypeError, lambda: cohort.ParallelState(**{**alone, name: value}), f"{name}: expected")
    for name, call in {
        "group": lambda: cohort.use_symmetric_memory("tp").__enter__(), "size": lambda: tp.empty("3", dtype=torch.float32),
        "dtype": lambda: tp.empty(3, dtype="f32"), "heads": lambda: state.dcp.reserve_for(batch=1, heads=None),
        "tensors": lambda: state.pp.send_tensor_dict([x]), "names": lambda: state.pp.send_tensor_dict({1: x}),
        "state": lambda: cohort.record_stream(x, tp),
    }.items():
        refuses(f"a wrong {name}", TypeError, call, name, "expected")
    check("numbers of other libraries", tp.empty(numpy.int64(3), dtype=torch.float32).shape == (3,))
    many = torch.ones(3, 2 * SIZE, 2, device=DEVICE)
    for name, call in {"all_reduce": tp.all_reduce, "all_gather": lambda y: tp.all_gather(y, 0),
                       "all_reduce_rms_norm": lambda y: tp.all_reduce_rms_norm(y, y.clone(), y[0])[0]}.items():
        if SIZE > 1:
            refuses(f"vmap over {name}", NotImplementedError, lambda: torch.vmap(call)(many), f"cohort::{name}", "vmap")
