# SPDX-License-Identifier: Apache-2.0
"""python3 tests/torch/test_pools.py

Which pool torch's allocations come from within nested scopes and captures, with a stand-in for the
part of torch that needs a card: it refuses what torch refuses, and ends the process where torch would.
"""

import contextlib
import gc
import os
import threading

import torch

from cohort import _pools

CAPTURE, CARD = (7, 0), torch.device("cuda", 0)
begun, uses, checks = [], {}, 0


def check(name, ok):
    global checks
    checks += 1
    if not ok:
        raise AssertionError(f"{name}: begun {begun}, uses {uses}")


def begin(_, pool):
    if pool in begun:
        raise RuntimeError("already recording")
    begun.append(pool)
    uses[pool] = uses.get(pool, 0) + 1  # the last one that was begun counts


def end(_, pool):
    check("ended when begun", pool in begun)
    begun.remove(pool)


def release(_, pool):
    uses[pool] -= 1
    check("released when used", uses[pool] >= 0)


class MemPool:
    last = 0

    def __init__(self, _):
        MemPool.last += 1
        self.id = (0, MemPool.last)
        uses[self.id] = 1

    def __del__(self):
        uses[self.id] -= 1
        if uses[self.id] == 0 and begun:
            os.abort()  # its end may not be in a capture, nor while a pool is in use


class Operators:
    @staticmethod
    def enter_pools(group):
        return [] if group == "without windows" else [1, 2]


def main():
    torch._C._cuda_beginAllocateCurrentThreadToPool = begin
    torch._C._cuda_endAllocateToPool = end
    torch._C._cuda_releasePool = release
    torch._C._cuda_customAllocator = lambda *functions: functions
    torch.cuda.MemPool = MemPool
    torch.cuda.device = lambda _: contextlib.nullcontext()
    emptied = []
    torch.cuda.empty_cache = lambda: emptied.append(dict(uses))
    _pools.ops = Operators
    allocating = _pools.allocating

    @contextlib.contextmanager
    def use_mem_pool(pool):  # as torch's
        begin(0, pool)
        try:
            yield
        finally:
            end(0, pool)
            release(0, pool)

    first, second = _pools.Pools("first", CARD), _pools.Pools("second", CARD)
    check("a group without windows has none", _pools.Pools("without windows", CARD).id_of(0) is None)
    a, b = first.id_of(0), second.id_of(0)
    check("a pool for each thread", first.id_of(0) == a != b)
    with allocating(0, a):
        check("the group's", begun == [a] and _pools.is_allocating())
        with allocating(0, None):
            check("none under a null scope", begun == [])
            with allocating(0, b):
                check("the innermost", begun == [b])
            check("none again", begun == [])
        with allocating(0, a):
            check("the same again", begun == [a])
        check("and still", begun == [a])
        with allocating(0, b):
            check("the last one begun counts", begun[-1] == b)
            with allocating(0, a):
                check("also where it was begun before", begun[-1] == a)
            check("the outer one", begun[-1] == b)
        check("the outermost again", begun == [a])
    check("outside", begun == [] and uses == {a: 1, b: 1} and not _pools.is_allocating())
    with allocating(0, None):
        check("a null scope alone", begun == [] and not _pools.is_allocating())

    own = first.id_of(_pools.Pools.OWN)
    check("one for use_mem_pool", own not in (a, b) and first.id_of(_pools.Pools.OWN) == own)
    with use_mem_pool(own):
        with allocating(0, a):
            check("a scope within it", begun[-1] == a)
            with use_mem_pool(own + ("of the user",)):
                check("and another within that", begun[-1] == own + ("of the user",))
                with allocating(0, b):
                    check("and a scope within that", begun[-1] == b)
                check("out of it", begun[-1] == own + ("of the user",))
        check("and out of all", begun == [own])
    with allocating(0, a), use_mem_pool(own):
        check("it within a scope", begun[-1] == own)
    check("all are out", begun == [])

    begun.append(CAPTURE)
    uses[CAPTURE] = 1
    of_capture = first.id_of(5)
    check("a pool for each capture", of_capture not in (a, b) and first.id_of(5) == of_capture)
    for _ in range(2):
        with allocating(0, of_capture):
            check("the capture's", begun == [CAPTURE, of_capture])
            with allocating(0, None):
                check("the graph's own under a null scope", begun == [CAPTURE])
        check("the graph's own again, as torch began it", begun == [CAPTURE] and uses[CAPTURE] == 1)
    with contextlib.suppress(KeyError), allocating(0, of_capture):
        raise KeyError
    check("behind an exception", begun == [CAPTURE])
    scope = allocating(0, a)
    thread = threading.Thread(target=scope.__enter__)
    thread.start()
    thread.join()
    scope.__exit__(None, None, None)  # as the collector may
    check("and on another thread", begun == [CAPTURE] and not _pools.is_allocating())
    first.end_captures()
    check("torch ends what captures leave", uses[of_capture] == 0 and uses[a] == 1)
    begun.clear()
    first.give_back()
    check("its cache is emptied behind that", len(emptied) == 1 and emptied[0][of_capture] == 0)
    first.give_back()
    check("once", len(emptied) == 1)

    with allocating(0, a):
        first.close()  # as another thread would, while this one is inside
        check("a pool in use stays", uses[a] >= 1 and begun == [a])
    check("and is left", begun == [] and first.id_of(0) is None)
    third = _pools.Pools("third", CARD)
    c = third.id_of(0)
    third.close()
    check("and what is closed", uses[c] == 0 and third.id_of(0) is None and emptied[-1][c] == 0)
    del second
    gc.collect()
    check("and what is dropped", uses[b] == 0 and begun == [])
    print(f"cohort-test: passed={checks} failed=0 skipped=0")


if __name__ == "__main__":
    main()
