// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cohort/cohort.hpp>
#include <cohort/mpi.hpp>

#include <algorithm>
#include <cstdint>

int main(int argc, char** argv) {
  cohort::MpiSession mpi(argc, argv);  // or the engine's own ControlPlane
  const int ranks = mpi.world().size();
  cohort::HostStream stream;
  auto state = cohort::ParallelState::create(
      mpi.world(), {.layout = {.tp = ranks, .pp = 1, .dcp = ranks},
                    .backend = cohort::host_backend(),  // cohort::cuda_backend() on GPUs
                    .symmetric = {.enabled = true}});
  auto& dcp = state.dcp();
  const std::int64_t batch = 2, heads = 4 * ranks, dim = 8;
  dcp.reserve_for({.batch = batch, .heads = heads, .value = dim});

  // Each rank attended to its own tokens: a partial output and its log-sum-exp.
  const cohort::SymmetricScope scope(dcp, stream);
  const cohort::Tensor out = cohort::empty({batch, heads, dim}, cohort::DType::f32);
  const cohort::Tensor lse = cohort::empty({batch, heads}, cohort::DType::f32);
  std::fill_n(out.data_as<float>(), out.numel(), static_cast<float>(dcp.rank()));
  std::fill_n(lse.data_as<float>(), lse.numel(), 1.0F);

  // Equal weights: every merged element is the mean of the rank numbers.
  const cohort::Tensor merged = dcp.merge_attention(out, lse, cohort::LseBase::e, stream);
  if (dcp.rank() == 0) {
    fmt::print("merged {} = {} with plan {}\n", cohort::to_string(merged.shape()),
               merged.data_as<float>()[0], cohort::to_string(dcp.last_merge_choice().plan));
  }
  state.shutdown();
}
