# SPDX-License-Identifier: Apache-2.0
"""All groups of one rank."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ._arguments import of_type, whole
from ._groups import DecodeContextGroup, Group, PipelineGroup
from ._library import ops
from ._life import Handle, Life
from ._pools import is_allocating


def _meeting(control: str | dist.ProcessGroup | None) -> tuple[str, int, int]:
    """How the ranks meet, this rank, and their number, where the meeting has to be told."""
    if control is None:
        if dist.is_available() and dist.is_initialized():
            control = dist.group.WORLD
        elif any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
            control = "mpi"
        else:
            control = "single"
    if not isinstance(control, str):
        if not dist.is_available() or not isinstance(control, dist.ProcessGroup):
            raise ValueError("control: expected a process group that this rank is in, or a string, "
                             f"got {control!r}")
        return control.group_name, dist.get_rank(control), dist.get_world_size(control)
    if control in ("mpi", "single"):
        return control, 0, 1
    if not control.startswith("store://"):
        raise ValueError("control: expected a process group, mpi, single or store://HOST:PORT, "
                         f"got {control}")
    for rank, size in (("RANK", "WORLD_SIZE"),
                       ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if rank in os.environ and size in os.environ:
            return control, int(os.environ[rank]), int(os.environ[size])
    raise ValueError(f"control {control}: expected the rank and the number of ranks in RANK and "
                     "WORLD_SIZE, or in the variables of an MPI launcher")


def _milliseconds(timeout: float) -> int:
    of_type("timeout", timeout, (int, float), "seconds")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout: expected seconds, more than 0, got {timeout}")
    return max(1, round(min(timeout, 1e9) * 1000))


class ParallelState(Handle):
    """The world, tensor-parallel, pipeline-parallel and decode-context-parallel group of this rank.

    Collective over all ranks, of which there are `tp` * `pp`:

        state = cohort.ParallelState(tp=4, dcp=2)
        q = state.dcp.gather_query(q_nope, q_pe)
        merged = state.dcp.merge_attention(out, lse)

    control: How the ranks meet: a process group of torch.distributed, whose store is used; "mpi";
        "store://HOST:PORT" of a TCPStore; "single" for one rank alone. By default torch.distributed
        where it is initialised, MPI where its launcher started the process, otherwise one rank.
    tp, pp, dcp: Ranks of a group of each kind; `dcp` divides `tp`.
    device: "cpu" or "cuda:N"; by default the current CUDA device, where the package has CUDA and
        torch finds a card.
    symmetric: Which groups get symmetric memory: True for the choice that fits most engines,
        "all", or names among "world", "tp", "pp" and "dcp".
    merge_plan: "automatic", "staged", "packed" or "one_kernel".
    peer_mapping: Whether ranks may address each other's memory, which the library's own kernels need.
    debug_checks: Whether each call agrees on its arguments with the other ranks before it begins.
    growth_bytes: What an arena grows by at least.
    timeout: Seconds that a wait for other ranks may take, unless COHORT_TIMEOUT_MS is set.

    Leave with `shutdown()`, which is collective. A process that ends without it leaves alone, waits
    for no other rank, and has those that wait for it end with an error. So does a state that goes
    without it: with the last of this object and its groups, which keep each other's state.
    """

    def __init__(self, tp: int = 1, pp: int = 1, dcp: int = 1, *,
                 control: str | dist.ProcessGroup | None = None,
                 device: str | torch.device | None = None,
                 symmetric: bool | str | Sequence[str] = False, merge_plan: str = "automatic",
                 peer_mapping: bool = True, debug_checks: bool = False, timeout: float = 60.0,
                 growth_bytes: int = 32 << 20):
        layout = [whole(name, size) for name, size in (("tp", tp), ("pp", pp), ("dcp", dcp))]
        of_type("merge_plan", merge_plan, str, "a name")
        for option, flag in (("peer_mapping", peer_mapping), ("debug_checks", debug_checks)):
            of_type(option, flag, bool, "True or False")
        if device is None:
            has_card = "cuda" in ops.parts() and torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if has_card else "cpu"
        self.device = torch.device(device)
        ordinal = -1
        if self.device.type == "cuda":
            ordinal = torch.cuda.current_device() if self.device.index is None else self.device.index
            self.device = torch.device("cuda", ordinal)
        elif self.device.type != "cpu":
            raise ValueError(f"device: expected cpu or cuda, got {self.device}")
        if isinstance(symmetric, bool):
            symmetric = ["automatic"] if symmetric else []
        elif isinstance(symmetric, str):
            symmetric = [symmetric]
        of_type("symmetric", symmetric, Sequence, "True, False or names of groups")
        for kind in symmetric:
            of_type("symmetric", kind, str, "names of groups")
        name, rank, size = _meeting(control)
        self._id = ops.parallel_state(name, [rank, size], layout, ordinal, list(symmetric),
                                      merge_plan, peer_mapping, debug_checks,
                                      _milliseconds(timeout),
                                      whole("growth_bytes", growth_bytes))
        self._life = Life(self._id, name == "mpi")
        names = ops.groups(self._id)
        self.world = Group(names[0], self.device, self._life)
        self.tp = Group(names[1], self.device, self._life)
        self.pp = PipelineGroup(names[2], self.device, self._life)
        self.dcp = DecodeContextGroup(names[3], self.device, self._life)

    @property
    def groups(self) -> tuple[Group, ...]:
        """World, TP, PP, DCP."""
        return self.world, self.tp, self.pp, self.dcp

    def describe(self) -> list[str]:
        """What each group got and why, and on cards the NCCL that answers."""
        return ops.describe(self._id)

    def synchronize(self, timeout: float = 60.0) -> None:
        """Waits until the current stream is idle, watching the peers of all groups as well."""
        ops.synchronize(self._id, _milliseconds(timeout))

    def shutdown(self) -> None:
        """Collective over the world: waits for all ranks, then leaves all groups. Tensors stay
        readable; every later call of a group raises `ValueError`; a second shutdown does nothing."""
        self._life.closed = True
        ops.shutdown(self._id)
        self._life.was_shut_down()
        for group in self.groups:
            group._pools.close()

    def __enter__(self) -> ParallelState:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.shutdown()
        else:
            self._life.leave()

    # Graphs

    @contextlib.contextmanager
    def graph_capture(self, pooled: bool = False) -> Iterator[None]:
        """Around, or inside, `torch.cuda.graph`: what the library allocates in captures then
        belongs to their graphs. Results are torch's, from the graph's own pool. `pooled`: graphs
        that are never in flight together, such as those of several batch sizes, share the
        library's memory."""
        if is_allocating():
            raise ValueError("graph_capture: open use_symmetric_memory inside of it, not around it")
        ops.begin_graphs(self._id, pooled)
        try:
            yield
        finally:
            ops.end_graphs(self._id)
            for group in self.groups:
                group._pools.end_captures()

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """`graph.replay()`, behind the eager calls of all groups so far, and before later ones."""
        ops.order(self._id)
        graph.replay()
        ops.launched(self._id)

    def order(self) -> None:
        """What the current stream gets next comes after the calls of all groups so far. `replay`
        does it by itself."""
        ops.order(self._id)

    def reclaim_graphs(self) -> None:
        """Collective. The memory of graphs that every rank has destroyed goes back to the arenas."""
        for group in self.groups:
            group._pools.give_back()
        ops.reclaim_graphs(self._id)


def record_stream(x: torch.Tensor, state: ParallelState) -> None:
    """`x` is also used on torch's current stream; for tensors in symmetric memory, of which torch's
    own `record_stream` knows nothing."""
    of_type("record_stream state", state, ParallelState, "a ParallelState")
    ops.record_stream(x, state._id)
