# SPDX-License-Identifier: Apache-2.0
"""The compiled operators, torch.ops.cohort, and what torch.compile has to know of them."""

from __future__ import annotations

import os

import torch
from torch._library.effects import EffectType

_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libcohort_torch.so")
_ELSEWHERE = "; build the package against the torch that is installed"
try:
    torch.ops.load_library(_PATH)
except OSError as error:
    raise ImportError(f"cohort: {error}{_ELSEWHERE}") from error
ops = torch.ops.cohort
if ops.built_for().split(".")[:2] != torch.__version__.split(".")[:2]:
    raise ImportError(f"cohort was built for torch {ops.built_for()}, this is torch "
                      f"{torch.__version__}{_ELSEWHERE}")

def _check_nccl() -> None:
    """One process has one NCCL: torch's, which was loaded first."""
    ours = ops.nccl_version()
    if ours == 0 or not torch.cuda.is_available():
        return
    major, minor, patch = torch.cuda.nccl.version()[:3]
    theirs = major * 10000 + minor * 100 + patch
    if ours != theirs:
        raise ImportError(
            f"cohort: NCCL {ours} answers in this process, torch was built with {theirs}; "
            "let both find one libnccl.so.2")


_check_nccl()


def _ranks(group: str) -> int:
    """The name tells, because compilers keep shapes by the arguments."""
    return int(group.rpartition(":")[2])


def _alike(*tensors: torch.Tensor | None) -> None:
    """The fakes are the only ones that see tensors without memory."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"cohort: expected tensors on one device, got {', '.join(map(str, devices))}")


def _along(x: torch.Tensor, dim: int, extent) -> list:
    shape = list(x.shape)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim: expected a dimension of {len(shape)}, got {dim}")
    shape[dim] = extent(shape[dim])
    return shape


def eager_only(what: str) -> None:
    """A compiler would do it once, when it traces, and leave it out of what it makes."""
    if torch.compiler.is_compiling():
        raise ValueError(f"{what}: for eager code, around what is compiled and not inside of it")


@torch.library.register_fake("cohort::all_gather")
def _(x, dim, group):
    return x.new_empty(_along(x, dim, lambda extent: extent * _ranks(group)))


@torch.library.register_fake("cohort::reduce_scatter")
def _(x, dim, op, group):
    return x.new_empty(_along(x, dim, lambda extent: extent // _ranks(group)))


@torch.library.register_fake("cohort::all_reduce")
def _(x, op, group):
    return x.new_empty(x.shape)


@torch.library.register_fake("cohort::all_to_all")
def _(x, group):
    return x.new_empty(x.shape)


@torch.library.register_fake("cohort::gather_query")
def _(q_nope, q_pe, group):
    _alike(q_nope, q_pe)
    batch, heads, latent = q_nope.shape
    rope = q_pe.shape[2]
    if q_nope.dtype == q_pe.dtype:
        return q_nope.new_empty((batch, heads * _ranks(group), latent + rope))
    width = latent * q_nope.element_size() + rope * q_pe.element_size()
    return q_nope.new_empty((batch, heads * _ranks(group), width), dtype=torch.uint8)


def _merged(out, replicated, group) -> list:
    *_, batch, heads, value = out.shape
    return [batch, heads if replicated else heads // _ranks(group), value]


@torch.library.register_fake("cohort::merge_attention")
def _(out, lse, base2, replicated, sink, local_tokens, group):
    _alike(out, lse, sink, local_tokens)
    return out.new_empty(_merged(out, replicated, group))


@torch.library.register_fake("cohort::merge_attention_lse")
def _(out, lse, base2, replicated, sink, local_tokens, group):
    _alike(out, lse, sink, local_tokens)
    shape = _merged(out, replicated, group)
    return out.new_empty(shape), lse.new_empty(shape[:2])


@torch.library.register_fake("cohort::all_reduce_rms_norm")
def _(x, residual, weight, eps, scale, group):
    _alike(x, residual, weight, scale)
    return x.new_empty(x.shape, dtype=x.dtype if scale is None else torch.float8_e4m3fn)


def _no_result(*arguments) -> None:
    """Sends, or writes its arguments."""
    several = (one if isinstance(one, (list, tuple)) else [one] for one in arguments)
    _alike(*(tensor for ones in several for tensor in ones if isinstance(tensor, torch.Tensor)))


_WRITE = ("all_gather_into", "reduce_scatter_into", "all_reduce_into", "all_reduce_", "broadcast_",
          "recv_", "gather_query_into", "merge_attention_into", "all_reduce_rms_norm_into")
_SEND = ("send", "send_tensors", "barrier")
_RETURN = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "gather_query",
           "merge_attention", "merge_attention_lse")
for _name in _WRITE + _SEND:
    torch.library.register_fake(f"cohort::{_name}", _no_result)

# Other ranks take part, whatever this one makes of the result: a compiler may neither drop a call nor
# make two equal ones one, nor change their order. What writes a tensor has its place by that tensor.
for _name in _RETURN + _SEND:
    torch.library._register_effectful_op(f"cohort::{_name}", EffectType.ORDERED)
for _name in (*_WRITE, "all_reduce_rms_norm"):
    torch.fx.node.has_side_effect(getattr(ops, _name).default)
