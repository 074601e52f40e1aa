# SPDX-License-Identifier: Apache-2.0
"""Groups of ranks with their collectives, under the names that engines use."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, overload

import torch
from torch.nn.functional import pad

from ._arguments import of_type, whole
from ._library import eager_only, ops
from ._life import Handle, Life
from ._pools import Pools, allocating


def _extents(size: Sequence) -> list[int]:
    sizes = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    return [whole("size", extent) for extent in sizes]


class Group(Handle):
    """The ranks of one group. Made by `ParallelState`, which lives as long as one of its groups.

    Every call but `send` and `recv` is collective: all ranks of the group make the same calls in
    the same order. Calls go to torch's current stream; on CPU tensors they are done when they
    return. Results are torch's own memory, or the group's symmetric memory inside
    `use_symmetric_memory`. In a group of one, calls that return a tensor return their input.

    Wrong arguments raise `ValueError` or `TypeError` before anything is enqueued; a rank that is
    missing, gone or elsewhere a `torch.distributed.DistBackendError` that names it.
    """

    def __init__(self, name: str, device: torch.device, life: Life):
        self.name = name
        """What operators know the group by."""
        members = ops.members(name)
        self.rank_in_group: int = members[0]
        """This rank, 0 to `world_size` - 1."""
        self.ranks: list[int] = members[1:]
        """World ranks, by rank in the group."""
        self.world_size: int = len(self.ranks)
        """Ranks of the group."""
        self.device = device
        """Where its tensors lie."""
        self.has_symmetric_memory: bool = ops.has_symmetric_memory(name)
        """Whether `use_symmetric_memory` of it gives symmetric memory."""
        self._life = life
        self._pools = Pools(name, device)

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0 of the group."""
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        """Whether this is the last rank of the group."""
        return self.rank_in_group == self.world_size - 1

    @property
    def closed(self) -> bool:
        """Whether the state was shut down or left."""
        return self._life.closed

    def _alone(self, x: torch.Tensor) -> torch.Tensor:
        """The result in a group of one."""
        if self._life.closed:
            raise ValueError(f"group {self.name}: used after shutdown")
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's `x`, one behind the other along `dim`, in rank order."""
        if self.world_size == 1:
            return self._alone(x)
        return ops.all_gather(x, dim, self.name)

    def all_gather_into_tensor(self, out: torch.Tensor, x: torch.Tensor, dim: int = 0) -> None:
        """`all_gather` into `out`."""
        ops.all_gather_into(out, x, dim, self.name)

    def reduce_scatter_along_dim(self, x: torch.Tensor, dim: int = -1,
                                 op: str = "sum") -> torch.Tensor:
        """This rank's part, along `dim`, of the ranks' sum."""
        if self.world_size == 1:
            return self._alone(x)
        return ops.reduce_scatter(x, dim, op, self.name)

    def reduce_scatter_tensor(self, out: torch.Tensor, x: torch.Tensor, dim: int = 0,
                              op: str = "sum") -> None:
        """`reduce_scatter_along_dim` into `out`."""
        ops.reduce_scatter_into(out, x, dim, op, self.name)

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """The ranks' sum, the same bits on every rank, in a tensor of its own."""
        if self.world_size == 1:
            return self._alone(x)
        return ops.all_reduce(x, op, self.name)

    def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """`all_reduce` in place; returns `x`."""
        ops.all_reduce_(x, op, self.name)
        return x

    def all_reduce_into(self, out: torch.Tensor, x: torch.Tensor, op: str = "sum") -> None:
        """`all_reduce` into `out`."""
        ops.all_reduce_into(out, x, op, self.name)

    def all_reduce_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor,
                            eps: float = 1e-6, *, scale: torch.Tensor | None = None
                            ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows a row-parallel product: the ranks' sum of `x` [B, hidden] is added to
        `residual`, in place, and normed: residual / sqrt(mean of its squares + eps) * weight. The
        normed rows, in the type of `x`, and `residual` come back. On cards in one launch where
        `path("all_reduce_rms_norm", ...)` is "own".

        `residual` [B, hidden] and `weight` [hidden] have the type of `x`: float32, float16 or
        bfloat16; all are without gaps.
        scale: [1] in float32: the normed rows are then divided by it, in float8_e4m3fn."""
        return ops.all_reduce_rms_norm(x, residual, weight, eps, scale, self.name), residual

    def all_reduce_rms_norm_into(self, out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor,
                                 weight: torch.Tensor, eps: float = 1e-6, *,
                                 scale: torch.Tensor | None = None) -> None:
        """`all_reduce_rms_norm` into `out`."""
        ops.all_reduce_rms_norm_into(out, x, residual, weight, eps, scale, self.name)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrites `x` with that of rank `src` of the group; returns it."""
        ops.broadcast_(x, src, self.name)
        return x

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Part r of dimension 0 goes to rank r; part r of the result came from rank r."""
        if self.world_size == 1:
            return self._alone(x)
        return ops.all_to_all(x, self.name)

    def send(self, x: torch.Tensor, dst: int) -> None:
        """To rank `dst` of the group, which makes one `recv` of the same shape and dtype."""
        ops.send(x, dst, self.name)

    def recv(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """Fills `x` with what rank `src` sends; returns it."""
        ops.recv_(x, src, self.name)
        return x

    def barrier(self) -> None:
        """What the current stream gets after this runs once every rank's has come here."""
        ops.barrier(self.name)

    def empty(self, *size: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in the group's arena, its size as `torch.empty` takes it.
        Collective: all ranks allocate and drop the same tensors in the same order.
        `cohort.record_stream`, not torch's, tells it of other streams."""
        eager_only("empty")
        of_type("dtype", dtype, torch.dtype, "a torch.dtype")
        return ops.empty(_extents(size), dtype, self.name)

    def mem_pool(self) -> torch.cuda.MemPool | None:
        """This thread's pool of torch's allocator over the group's arena, for
        `torch.cuda.use_mem_pool`; `use_symmetric_memory` does it by itself, in captures too, with
        another. None where the group has no windows, and on the host."""
        return self._pools.of(Pools.OWN)

    def reserve(self, size: int) -> None:
        """Collective. Makes room for a block of `size` bytes in the group's arena."""
        ops.reserve(self.name, size)

    def freeze(self) -> None:
        """The arena never grows again. By every rank at the same point."""
        ops.freeze(self.name)

    def arena(self) -> dict[str, int]:
        """Bytes used, reserved and used at the peak; live blocks, segments and whether frozen."""
        words = ("used", "reserved", "peak", "live_blocks", "segments", "frozen")
        return dict(zip(words, ops.arena(self.name)))

    def arena_offset(self, x: torch.Tensor) -> int:
        """Where `x` lies in the arena, the same on all ranks; -1 for other memory."""
        return ops.arena_offset(x, self.name)

    def path(self, collective: str, x: torch.Tensor, out: torch.Tensor, dim: int = 0) -> str:
        """The path that a call of "all_gather", "reduce_scatter", ... would take."""
        return ops.path(collective, x, out, dim, self.name)


class PipelineGroup(Group):
    """Besides the collectives, the hand-over between neighbouring stages."""

    def send_tensor_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """To the next stage, which makes one `recv_tensor_dict`."""
        eager_only("send_tensor_dict")
        of_type("send_tensor_dict tensors", tensors, Mapping, "a dict of tensors")
        for name, tensor in tensors.items():
            of_type("send_tensor_dict tensors", name, str, "names")
            of_type(f"send_tensor_dict {name}", tensor, torch.Tensor, "a tensor")
        ops.send_tensors(list(tensors), list(tensors.values()), self.name)

    def recv_tensor_dict(self) -> dict[str, torch.Tensor]:
        """From the previous stage, in its order."""
        eager_only("recv_tensor_dict")
        names, tensors = ops.recv_tensors(self.name)
        return dict(zip(names, tensors))


class DecodeContextGroup(Group):
    """Besides the collectives, the two calls of a decode whose KV cache the ranks share. H are the
    heads of all ranks, n the ranks."""

    def gather_query(self, q_nope: torch.Tensor, q_pe: torch.Tensor) -> torch.Tensor:
        """[B, H, Dn + Dr] of all heads from this rank's [B, H/n, Dn] and [B, H/n, Dr]. Parts of
        different types give rows of bytes."""
        return ops.gather_query(q_nope, q_pe, self.name)

    def gather_query_into(self, q: torch.Tensor, q_nope: torch.Tensor,
                          q_pe: torch.Tensor) -> None:
        """`gather_query` into `q`."""
        ops.gather_query_into(q, q_nope, q_pe, self.name)

    @overload
    def merge_attention(self, out: torch.Tensor, lse: torch.Tensor, *, base2: bool = ...,
                        with_lse: Literal[False] = ..., replicated: bool = ...,
                        sink: torch.Tensor | None = ...,
                        local_tokens: torch.Tensor | None = ...) -> torch.Tensor: ...
    @overload
    def merge_attention(self, out: torch.Tensor, lse: torch.Tensor, *, base2: bool = ...,
                        with_lse: Literal[True], replicated: bool = ...,
                        sink: torch.Tensor | None = ..., local_tokens: torch.Tensor | None = ...
                        ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @overload
    def merge_attention(self, out: torch.Tensor, lse: torch.Tensor, *, base2: bool = ...,
                        with_lse: bool, replicated: bool = ...,
                        sink: torch.Tensor | None = ..., local_tokens: torch.Tensor | None = ...
                        ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...

    def merge_attention(self, out, lse, *, base2=False, with_lse=False, replicated=False,
                        sink=None, local_tokens=None):
        """The exact merge of the ranks' partial attentions `out` [B, H, D] with their log-sum-exps
        `lse` [B, H] in float32: this rank's heads [B, H/n, D], and with them, where asked for,
        their log-sum-exps [B, H/n]. A rank without tokens has lse = -inf, and its `out` is never
        read. Several splits of a rank are [S, B, H, D] and [S, B, H].

        base2: log-sum-exps, and sinks, in base two.
        replicated: all heads come back on every rank, [B, H, D] and [B, H], the same bits.
        sink: [H] in float32, a score without a value that takes part in the softmax once.
        local_tokens: [B] in int32, the tokens that this rank attended to; a row of 0 is empty."""
        if with_lse:
            return ops.merge_attention_lse(out, lse, base2, replicated, sink, local_tokens,
                                           self.name)
        return ops.merge_attention(out, lse, base2, replicated, sink, local_tokens, self.name)

    def merge_attention_into(self, merged: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *,
                             base2: bool = False, merged_lse: torch.Tensor | None = None,
                             replicated: bool = False, sink: torch.Tensor | None = None,
                             local_tokens: torch.Tensor | None = None) -> None:
        """`merge_attention` into `merged`, and `merged_lse` where given."""
        ops.merge_attention_into(merged, out, lse, base2, replicated, sink, local_tokens,
                                 merged_lse, self.name)

    def reserve_for(self, *, batch: int, heads: int, latent: int = 0, rope: int = 0,
                    value: int = 0, dtype: torch.dtype = torch.bfloat16,
                    query_dtype: torch.dtype | None = None,
                    rope_dtype: torch.dtype | None = None) -> None:
        """Collective. Makes room for decode steps of up to this shape, so that nothing grows or
        fails while serving."""
        shape = {"batch": batch, "heads": heads, "latent": latent, "rope": rope, "value": value}
        ops.reserve_for(self.name, [whole(name, extent) for name, extent in shape.items()], dtype,
                        query_dtype, rope_dtype)

    def last_merge(self) -> tuple[str, str]:
        """The plan that the last merge took, and why."""
        plan, reason = ops.last_merge(self.name)
        return plan, reason


@contextlib.contextmanager
def use_symmetric_memory(group: Group, disabled: bool = False) -> Iterator[None]:
    """Inside, results that this thread's calls of the same state's groups give, `cohort.empty`, and
    on cards all that torch itself allocates lie in the group's symmetric memory: in ordinary memory
    where `disabled`, or where the group has none. Contexts nest, and the innermost counts. In a
    capture it is opened inside of it, and of `graph_capture`. Collective over the group: all ranks
    allocate and drop the same tensors in the same order."""
    eager_only("use_symmetric_memory")
    of_type("use_symmetric_memory group", group, Group, "a group")
    ops.enter_symmetric(group.name, disabled)
    try:
        if group.device.type == "cpu":
            yield
        else:
            capture = ops.capture(group.name)
            pool = None if disabled else group._pools.id_of(capture)
            with allocating(group.device.index, pool):
                yield
    finally:
        ops.leave_symmetric()


def empty(*size: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor from the innermost `use_symmetric_memory` of this thread."""
    eager_only("empty")
    of_type("dtype", dtype, torch.dtype, "a torch.dtype")
    return ops.empty_in_scope(_extents(size), dtype)


def cp_lse_ag_out_rs(cp_attn_out: torch.Tensor, cp_attn_lse: torch.Tensor,
                     cp_group: DecodeContextGroup, ctx: object = None, return_lse: bool = False,
                     is_lse_base_on_e: bool = True
                     ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What engines call the step that gathers log-sum-exps, corrects and reduce-scatters, with their
    arguments; here one exact merge. `cp_attn_out` [B, H, D], `cp_attn_lse` [B, H]; this rank's heads
    come back, [B, H/n, D], and with `return_lse` their log-sum-exps, [B, H/n]. `ctx`, where engines
    keep a compiled kernel, is not used."""
    if cp_group.world_size == 1:
        return (cp_attn_out, cp_attn_lse) if return_lse else cp_attn_out
    return cp_group.merge_attention(cp_attn_out, cp_attn_lse.float(), base2=not is_lse_base_on_e,
                                    with_lse=return_lse)


def cp_lse_ag_out_ar(cp_attn_out: torch.Tensor, cp_attn_lse: torch.Tensor,
                     cp_group: DecodeContextGroup, ctx: object = None, return_lse: bool = False,
                     is_lse_base_on_e: bool = True
                     ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same with the heads of all ranks as the result of each: [B, H, D] and [B, H], the same
    bits on every rank, of any number of heads. For models whose heads the ranks do not share."""
    if cp_group.world_size == 1:
        return (cp_attn_out, cp_attn_lse) if return_lse else cp_attn_out
    heads, lse = cp_attn_out.shape[1], cp_attn_lse.float()
    lacking = -heads % cp_group.world_size
    if lacking:  # the ranks share the merging by heads: further ones, which are empty
        cp_attn_out, lse = pad(cp_attn_out, (0, 0, 0, lacking)), pad(lse, (0, lacking), value=-math.inf)
    merged, merged_lse = cp_group.merge_attention(cp_attn_out, lse, base2=not is_lse_base_on_e,
                                                  with_lse=True, replicated=True)
    if lacking:
        merged, merged_lse = merged[:, :heads], merged_lse[:, :heads]
    return (merged, merged_lse) if return_lse else merged


__all__: Sequence[str] = ("DecodeContextGroup", "Group", "PipelineGroup", "cp_lse_ag_out_ar",
                          "cp_lse_ag_out_rs", "empty", "use_symmetric_memory")
