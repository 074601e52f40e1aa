# SPDX-License-Identifier: Apache-2.0
"""The compiled operators, torch.ops.cohort, and what torch.compile has to know of them."""

from __future__ import annotations

import os

import torch

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

# Ranks of each group, by the name that operators know it by. Shapes of results follow from it.
sizes: dict[str, int] = {}


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


def _along(x: torch.Tensor, dim: int, extent) -> list:
    shape = list(x.shape)
    shape[dim] = extent(shape[dim])
    return shape


@torch.library.register_fake("cohort::all_gather")
def _(x, dim, group):
    return x.new_empty(_along(x, dim, lambda extent: extent * sizes[group]))


@torch.library.register_fake("cohort::reduce_scatter")
def _(x, dim, op, group):
    return x.new_empty(_along(x, dim, lambda extent: extent // sizes[group]))


@torch.library.register_fake("cohort::all_reduce")
def _(x, op, group):
    return x.new_empty(x.shape)


@torch.library.register_fake("cohort::all_to_all")
def _(x, group):
    return x.new_empty(x.shape)


@torch.library.register_fake("cohort::gather_query")
def _(q_nope, q_pe, group):
    batch, heads, latent = q_nope.shape
    rope = q_pe.shape[2]
    if q_nope.dtype == q_pe.dtype:
        return q_nope.new_empty((batch, heads * sizes[group], latent + rope))
    width = latent * q_nope.element_size() + rope * q_pe.element_size()
    return q_nope.new_empty((batch, heads * sizes[group], width), dtype=torch.uint8)


def _merged(out, replicated, group) -> list:
    *_, batch, heads, value = out.shape
    return [batch, heads if replicated else heads // sizes[group], value]


@torch.library.register_fake("cohort::merge_attention")
def _(out, lse, base2, replicated, sink, local_tokens, group):
    return out.new_empty(_merged(out, replicated, group))


@torch.library.register_fake("cohort::merge_attention_lse")
def _(out, lse, base2, replicated, sink, local_tokens, group):
    shape = _merged(out, replicated, group)
    return out.new_empty(shape), lse.new_empty(shape[:2])


def _writes(*arguments) -> None:
    """What only writes its arguments has no result."""


for _name in ("all_gather_into", "reduce_scatter_into", "all_reduce_into", "all_reduce_",
              "broadcast_", "send", "recv_", "send_tensors", "gather_query_into",
              "merge_attention_into"):
    torch.library.register_fake(f"cohort::{_name}", _writes)
