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
    """Where this thread's allocations go. Torch takes the pool that was begun last, of those that the
    thread and the stream have: a capture's own, and what `torch.cuda.use_mem_pool` began, stay as
    they are."""

    def __init__(self) -> None:
        self.scopes: list[Optional[_PoolId]] = []  # the innermost last
        self.begun: list[_PoolId] = []  # of theirs, those that torch knows


_here = _Here()


def _begin(device: int, pool: _PoolId, begun: list[_PoolId]) -> None:
    torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)  # who keeps it does so already
    begun.append(pool)


def _finish(device: int, pool: _PoolId, begun: list[_PoolId]) -> None:
    torch._C._cuda_endAllocateToPool(device, pool)
    begun.remove(pool)


@contextlib.contextmanager
def allocating(device: int, pool: Optional[_PoolId]) -> Iterator[None]:
    """Inside, this thread's tensors come from `pool`; where it is none, from where they came before
    any scope."""
    scopes, begun = _here.scopes, _here.begun  # of the thread that enters
    outer = scopes[-1] if scopes else None
    scopes.append(pool)
    try:
        if pool is None:
            for other in reversed(begun.copy()):
                _finish(device, other, begun)
        elif pool != outer:
            if pool in begun:
                _finish(device, pool, begun)
            _begin(device, pool, begun)
        yield
    finally:
        scopes.pop()
        if pool != outer and pool in begun:
            _finish(device, pool, begun)
        if outer is not None and outer not in begun:
            _begin(device, outer, begun)


def is_allocating() -> bool:
    """Whether this thread is inside of such a scope."""
    return any(pool is not None for pool in _here.scopes)


class Pools:
    """Of one group: one for each thread, and one for each capture, whose graph keeps the memory; and
    for each thread one for its own use, so that it is never begun twice."""

    OWN = -1

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
        """That of this thread, or of the capture where it is not 0, or the thread's own. None where
        the group has no windows, and on the host, of which torch has no pools."""
        with self._lock:
            if not self._entered:
                self._entered = True
                functions = ops.enter_pools(self._group)
                if functions:
                    self._allocator = torch._C._cuda_customAllocator(*functions)
            if self._allocator is None:
                return None
            key = (0, capture) if capture > 0 else (threading.get_ident(), capture)
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
            ended = {key: self._pools.pop(key) for key in list(self._pools) if key[1] > 0}
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
