# SPDX-License-Identifier: Apache-2.0
"""Torch's own results in symmetric memory: pools of torch's caching allocator whose segments lie in
the arenas of groups."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Optional

import torch

from ._library import ops

_PoolId = tuple[int, int]


_kept: list[torch.cuda.MemPool] = []  # for good


class _Here(threading.local):
    """Where this thread's allocations go."""

    depth = 0
    active: Optional[_PoolId] = None  # what torch was told last
    outside: Optional[_PoolId] = None  # what counts outside of every scope: a capture's own pool
    known: tuple[int, Optional[_PoolId]] = (0, None)  # a capture and its pool


_here = _Here()


def _pool_of_capture(device: int) -> Optional[_PoolId]:
    """The pool of the torch.cuda.graph that the current stream is captured by. Torch does not tell
    it, but where something lies that was allocated just now."""
    probe = torch.empty(1, device=f"cuda:{device}")
    for segment in torch.cuda.memory_snapshot(include_traces=False):
        begin = segment["address"]
        if segment["device"] == device and begin <= probe.data_ptr() < begin + segment["total_size"]:
            pool = tuple(segment["segment_pool_id"])
            return None if pool == (0, 0) else pool
    return None


def _switch(device: int, to: Optional[_PoolId]) -> None:
    """Torch asks the pools in the order in which they were begun, so one at a time is."""
    if to == _here.active:
        return
    if _here.active is not None:
        torch._C._cuda_endAllocateToPool(device, _here.active)
        _here.active = None
    if to is not None:
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, to)
        torch._C._cuda_releasePool(device, to)  # who keeps it does so already
        _here.active = to


@contextlib.contextmanager
def allocating(device: int, pool: Optional[_PoolId], capture: int) -> Iterator[None]:
    """Inside, this thread's tensors come from `pool`; where it is none, from where they came before
    any scope. `capture`: the number of the current stream's, or 0."""
    if _here.depth == 0 and pool is None:
        yield
        return
    if _here.depth == 0:
        if capture and _here.known[0] != capture:
            _here.known = (capture, _pool_of_capture(device))
        _here.outside = _here.active = _here.known[1] if capture else None
    before = _here.active
    _here.depth += 1
    try:
        _switch(device, pool if pool is not None else _here.outside)
        yield
    finally:
        _switch(device, before)
        _here.depth -= 1
        if _here.depth == 0:
            _here.active = None


def is_allocating() -> bool:
    """Whether this thread is inside of such a scope."""
    return _here.depth > 0


class Pools:
    """Of one group: one for each thread, and one for each capture, whose graph keeps the memory."""

    def __init__(self, group: str, device: torch.device):
        self._group = group
        self._device = -1 if device.index is None else device.index
        self._allocator: Optional[torch._C._cuda_CUDAAllocator] = None
        self._entered = False
        self._pools: dict[tuple[int, int], torch.cuda.MemPool] = {}
        self._left = False  # what torch has yet to empty
        self._lock = threading.Lock()
        weakref.finalize(self, _end, self._pools, self._device)

    def of(self, capture: int) -> Optional[torch.cuda.MemPool]:
        """That of this thread, or of the capture where it is not 0. None where the group has no
        windows, and on the host, of which torch has no pools."""
        with self._lock:
            if not self._entered:
                self._entered = True
                functions = ops.enter_pools(self._group)
                if functions:
                    self._allocator = torch._C._cuda_customAllocator(*functions)
            if self._allocator is None:
                return None
            key = (threading.get_ident(), 0) if capture == 0 else (0, capture)
            if key not in self._pools:
                with torch.cuda.device(self._device):
                    self._pools[key] = torch.cuda.MemPool(self._allocator)
            return self._pools[key]

    def id_of(self, capture: int) -> Optional[_PoolId]:
        """What torch knows it by. Whoever holds a pool would end it."""
        pool = self.of(capture)
        return None if pool is None else pool.id

    def end_captures(self) -> None:
        """What captures have not kept goes back when torch empties its cache, as it does before the
        next capture."""
        with self._lock:
            ended = {key: self._pools.pop(key) for key in list(self._pools) if key[1] != 0}
            self._left = self._left or bool(ended)
        _end(ended, self._device)

    def give_back(self) -> None:
        """All that torch holds of pools that have ended and does not use. Not in a capture."""
        with self._lock:
            left, self._left = self._left, False
        if left:
            torch.cuda.empty_cache()

    def close(self) -> None:
        """No pool is made any more. What lives of theirs stays readable."""
        with self._lock:
            self._entered, self._allocator = True, None
            self._left = self._left or bool(self._pools)
            _end(self._pools, self._device)
        self.give_back()


def _end(pools: dict[tuple[int, int], torch.cuda.MemPool], device: int) -> None:
    """A pool's own end waits for the device, and is fatal while anything is captured or another
    thread is inside of a pool. So each outlives its object by one use, and its end is torch's."""
    while pools:
        pool = pools.popitem()[1]
        identity = pool.id
        try:
            torch._C._cuda_beginAllocateCurrentThreadToPool(device, identity)
        except RuntimeError:  # another thread is inside of it, and goes on
            _kept.append(pool)
            continue
        torch._C._cuda_endAllocateToPool(device, identity)
        del pool
        torch._C._cuda_releasePool(device, identity)
