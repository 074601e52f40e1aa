// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// Everything that needs neither MPI nor CUDA. Add cohort/mpi.hpp where the ranks meet over MPI and
/// cohort/cuda.hpp for GPUs.

#include "cohort/agreement.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/dcp/kv_shard.hpp"
#include "cohort/dcp/lse_merge.hpp"
#include "cohort/decode_context_parallel.hpp"
#include "cohort/dlpack.hpp"
#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/graph_capture.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/host/host_backend.hpp"
#include "cohort/kv_step.hpp"
#include "cohort/log.hpp"
#include "cohort/merge_plan.hpp"
#include "cohort/message_control_plane.hpp"
#include "cohort/messenger.hpp"
#include "cohort/parallel_state.hpp"
#include "cohort/pipeline_parallel.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/stream.hpp"
#include "cohort/symmetric_arena.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/symmetric_scope.hpp"
#include "cohort/tensor.hpp"
#include "cohort/tensor_parallel.hpp"
#include "cohort/thread_control_planes.hpp"
#include "cohort/topology.hpp"
#include "cohort/trace_writer.hpp"
#include "cohort/transport.hpp"
