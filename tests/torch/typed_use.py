# SPDX-License-Identifier: Apache-2.0
"""Not run: what a type checker makes of the package, as engines use it."""

from typing import assert_type

import torch

import cohort


def decode(state: cohort.ParallelState, q_nope: torch.Tensor, q_pe: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    with state.graph_capture(pooled=True), cohort.use_symmetric_memory(state.dcp):
        q = state.dcp.gather_query(q_nope, q_pe)
    assert_type(state.dcp.merge_attention(q, lse), torch.Tensor)
    assert_type(state.dcp.merge_attention(q, lse, with_lse=True), tuple[torch.Tensor, torch.Tensor])
    assert_type(state.tp.reduce_scatter_along_dim(q, -1), torch.Tensor)
    assert_type(state.pp.recv_tensor_dict(), dict[str, torch.Tensor])
    assert_type(state.tp.ranks, list[int])
    state.dcp.reserve_for(batch=4, heads=8, latent=16)
    return state.tp.all_reduce(q)
