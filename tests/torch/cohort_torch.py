# SPDX-License-Identifier: Apache-2.0
"""The package under the interface of an engine's own glue, as its test programs call it: one object
with the calls of all groups, and groups by kind."""

import contextlib

import torch

import cohort


def load(path):
    """The package loads its operators itself."""


def create(tp, pp, dcp, symmetric, *, control="mpi", device=None, plan="automatic",
           peer_mapping=True, limit_ms=60000):
    if device is not None:
        device = "cpu" if device < 0 else f"cuda:{device}"
    return Engine(cohort.ParallelState(
        tp, pp, dcp, control=control, device=device, symmetric=symmetric, merge_plan=plan,
        peer_mapping=peer_mapping, timeout=limit_ms / 1000))


def finalize():
    cohort.finalize_mpi()


def nccl_version():
    return cohort.nccl_version()


class Engine:
    def __init__(self, state):
        self.state = state
        self.device = state.device

    def _group(self, kind):
        return getattr(self.state, kind)

    def gather_query(self, q_nope, q_pe):
        return self.state.dcp.gather_query(q_nope, q_pe)

    def merge_attention(self, out, lse, base2=False, with_lse=False):
        return self.state.dcp.merge_attention(out, lse, base2=base2, with_lse=with_lse)

    def merge_attention_into(self, merged, out, lse, base2=False, merged_lse=None):
        self.state.dcp.merge_attention_into(merged, out, lse, base2=base2, merged_lse=merged_lse)

    def reduce_scatter_along_dim(self, x, dim, group="tp"):
        return self._group(group).reduce_scatter_along_dim(x, dim)

    def all_gather(self, x, dim, group="tp"):
        return self._group(group).all_gather(x, dim)

    def all_reduce(self, x, group="tp"):
        return self._group(group).all_reduce(x)

    def all_reduce_(self, x, group="tp"):
        self._group(group).all_reduce_(x)

    def all_reduce_into(self, out, x, group="tp"):
        self._group(group).all_reduce_into(out, x)

    def barrier(self, group="tp"):
        self._group(group).barrier()

    def empty(self, *sizes, dtype=torch.bfloat16, group="dcp"):
        return self._group(group).empty(*sizes, dtype=dtype)

    def mem_pool(self, group="dcp"):
        return self._group(group).mem_pool()

    @contextlib.contextmanager
    def capture(self, pooled=False):
        with self.state.graph_capture(pooled):
            yield

    def order(self):
        self.state.order()

    def replay(self, graph):
        self.state.replay(graph)

    def reclaim(self):
        self.state.reclaim_graphs()

    def synchronize(self, limit_ms=20000):
        self.state.synchronize(limit_ms / 1000)

    def reserve(self, group, size):
        self._group(group).reserve(size)

    def reserve_for(self, batch, heads, latent, rope, value, dtype=torch.bfloat16):
        self.state.dcp.reserve_for(batch=batch, heads=heads, latent=latent, rope=rope, value=value,
                                   dtype=dtype)

    def freeze(self):
        for group in self.state.groups:
            group.freeze()

    def shutdown(self):
        self.state.shutdown()

    def rank(self, group="world"):
        return self._group(group).rank_in_group

    def size(self, group="world"):
        return self._group(group).world_size

    def describe(self):
        return self.state.describe()

    def last_merge(self):
        return self.state.dcp.last_merge()

    def path(self, collective, x, out, dim=0, group="tp"):
        return self._group(group).path(collective, x, out, dim)

    def arena(self, group="dcp"):
        return self._group(group).arena()

    def arena_offset(self, x, group="dcp"):
        return self._group(group).arena_offset(x)
