# SPDX-License-Identifier: Apache-2.0
"""How states begin. A part of test_package.py."""

import os

import torch
import torch.distributed as dist

import cohort
from harness import RANK, SIZE, check


def check_used_store():
    """What an attempt of processes that are dead has left in a store is nobody's."""
    store, ports = None, [None] * SIZE
    if RANK == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("cohort/0/1/0/0", "a message that was never read")
        store.set("cohort/0/0/1/0", "and its like")
        store.set("cohort/0/hello/1", "a word of the dead")
    dist.all_gather_object(ports, store and store.port)
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ.update(RANK=str(RANK), WORLD_SIZE=str(SIZE))
    with cohort.ParallelState(tp=SIZE, control=f"store://127.0.0.1:{ports[0]}", device="cpu", timeout=20) as state:
        check("a used store", state.tp.all_reduce(torch.ones(1)) == SIZE)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    dist.all_gather_object(ports, None)  # rank 0 keeps it until then
