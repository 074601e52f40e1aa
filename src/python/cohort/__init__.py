# SPDX-License-Identifier: Apache-2.0
"""Distributed group coordinators for LLM inference engines on PyTorch."""

from ._groups import (DecodeContextGroup, Group, PipelineGroup, cp_lse_ag_out_ar, cp_lse_ag_out_rs,
                      empty, use_symmetric_memory)
from ._library import ops
from ._life import finalize_mpi
from ._state import ParallelState, record_stream


def parts() -> list[str]:
    """What the package was built with: "mpi", "cuda"."""
    return ops.parts()


def nccl_version() -> int:
    """The NCCL that answers, such as 22907; 0 where the package was built without CUDA."""
    return ops.nccl_version()


__all__ = ("DecodeContextGroup", "Group", "ParallelState", "PipelineGroup", "cp_lse_ag_out_ar",
           "cp_lse_ag_out_rs", "empty", "finalize_mpi", "nccl_version", "parts", "record_stream",
           "use_symmetric_memory")
