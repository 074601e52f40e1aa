// SPDX-License-Identifier: Apache-2.0

// What calls cost the CPU from C++: the calls of torch_calls.py, of a group of one rank, on the
// host. Prints a line "NAME MICROSECONDS" for each, the least mean of many rounds.

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cohort/cohort.hpp>
#include <limits>

namespace {

template <class Call>
void measure(const char* name, const Call& call) {
  constexpr int kRounds = 300;
  constexpr int kCalls = 100;
  double least = std::numeric_limits<double>::max();
  for (int round = 0; round < kRounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) {
      call();
    }
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    least = std::min(least, took.count() / kCalls);
  }
  fmt::print("{} {}\n", name, least);
}

}  // namespace

int main() {
  using namespace cohort;
  const auto planes = make_thread_control_planes(1);
  auto state = ParallelState::create(*planes[0], {.backend = host_backend()});
  auto& backend = state.world().backend();
  const auto tensor = [&](const Dims& shape) { return backend.allocate(shape, DType::f32, {}); };
  const auto x = tensor({2, 8});
  const auto y = tensor({2, 8});
  const auto out = tensor({1, 2, 8});
  const auto merged = tensor({1, 2, 8});
  const auto lse = tensor({1, 2});
  const auto q = tensor({1, 2, 16});
  measure("all_reduce_into", [&] { state.tp().all_reduce_into(y, x); });
  measure("all_gather_into", [&] { state.tp().all_gather_into(y, x, 0); });
  measure("reduce_scatter_into", [&] { state.tp().reduce_scatter_into(y, x, 0); });
  measure("gather_query_into", [&] { state.dcp().gather_query_into(q, out, merged); });
  measure("merge_attention_into", [&] { state.dcp().merge_attention_into(merged, out, lse); });
}
