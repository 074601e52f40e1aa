// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/visibility_guard.hpp"

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "cohort/cuda.hpp"
#include "cohort/nccl/nccl_transport.hpp"
#include "gpu/late_producer.hpp"
#include "support/ranks.hpp"

// A producer that triggers its completion early and finishes late, then a collective on NCCL's
// symmetric path: with the guard no element is wrong. On the versions with the fault, elements are
// wrong without it, which shows that this test can fail. Needs one card for each rank.

using namespace cohort;
using namespace cohort::test;

namespace {

constexpr std::int64_t kMaxBytes = 16 << 20;  // of the gathered, or scattered, whole
constexpr std::chrono::seconds kLimit{60};

/// Transport, windows and counters, with or without the guard. Each buffer lies in the window or in
/// memory that is not registered. Before eager calls the kernel in which the ranks meet stands in
/// for the guard where there are own kernels, so without the guard there are none.
struct Setup {
  Setup(CudaBackend& b, InWindows windows, bool guard)
      : where(windows),
        backend(b),
        stream(make_stream(b.device().index)),
        transport(world(), b.streams(), b.device().index,
                  {.peer_mapping = guard, .own_max_bytes = 0, .visibility_guard = guard}),
        segment(b.allocate_segment(2 * kMaxBytes)),
        window(transport.register_segment(*segment)),
        plain(make_memory(b.device().index, 2 * kMaxBytes)),
        counters(make_memory(b.device().index, 256)) {}

  [[nodiscard]] StreamRef ref() { return backend.stream(stream.get()); }
  [[nodiscard]] std::uint32_t* counter() { return static_cast<std::uint32_t*>(counters.get()); }
  [[nodiscard]] std::uint64_t* wrong() {
    return reinterpret_cast<std::uint64_t*>(static_cast<std::byte*>(counters.get()) + 128);
  }
  [[nodiscard]] BFloat16* in() { return buffer(where.in); }
  [[nodiscard]] BFloat16* out() { return buffer(where.out) + kMaxBytes / 2; }
  [[nodiscard]] BFloat16* buffer(bool registered) {
    return static_cast<BFloat16*>(registered ? segment->data() : plain.get());
  }

  /// One round: produce, collect, check.
  void round(Collective collective, std::int64_t bytes) {
    const std::int64_t whole = bytes / 2;
    const std::int64_t share = whole / world_size();
    const Device device = backend.device();
    const std::vector<std::int64_t> sizes(static_cast<std::size_t>(world_size()), share);
    advance(counter(), stream.get());
    if (collective == Collective::all_gather) {
      produce_late(in(), share, counter(), world_rank(), stream.get());
      transport.all_gather(TensorView(in(), DType::bf16, {share}, device),
                           TensorView(out(), DType::bf16, {whole}, device), 0, sizes, ref());
      check_gathered(out(), share, world_size(), counter(), wrong(), stream.get());
    } else {
      produce_late(in(), whole, counter(), world_rank(), stream.get());
      transport.reduce_scatter(TensorView(in(), DType::bf16, {whole}, device),
                               TensorView(out(), DType::bf16, {share}, device), 0, sizes,
                               ReduceOp::sum, ref());
      check_scattered(out(), share, world_size(), world_rank(), counter(), wrong(), stream.get());
    }
  }

  /// Wrong elements in `rounds` rounds.
  [[nodiscard]] std::uint64_t count_wrong(Collective collective, std::int64_t bytes, bool captured,
                                          int rounds) {
    constexpr int kPerGraph = 10;
    cuda_check(cudaMemsetAsync(counters.get(), 0, 256, stream.get()), "cudaMemsetAsync");
    world().barrier();
    if (captured) {
      ref().driver().begin_capture(stream.get());
      for (int i = 0; i < kPerGraph; ++i) {
        round(collective, bytes);
      }
      const auto graph = ref().driver().end_capture(stream.get());
      for (int i = 0; i < rounds / kPerGraph; ++i) {
        graph->launch(ref());
      }
      transport.synchronize(ref(), kLimit);
    } else {
      for (int i = 0; i < rounds; ++i) {
        round(collective, bytes);
      }
      transport.synchronize(ref(), kLimit);
    }
    std::uint64_t count = 0;
    cuda_check(cudaMemcpy(&count, wrong(), sizeof(count), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return count;
  }

  InWindows where;
  CudaBackend& backend;
  UniqueStream stream;
  NcclTransport transport;
  std::unique_ptr<Segment> segment;
  std::unique_ptr<Window> window;
  UniqueMemory plain;
  UniqueMemory counters;
};

std::uint64_t sum_over_ranks(std::uint64_t here) {
  std::uint64_t sum = 0;
  for (const auto count : detail::gather_values(world(), here)) {
    sum += count;
  }
  return sum;
}

}  // namespace

TEST_CASE("a producer that finishes late is waited for", "[visibility_guard]") {
  const auto backend = cuda_backend();
  SymmetricCapabilities found;
  {
    NcclTransport probe(world(), backend->streams(), backend->device().index, {});
    found = probe.capabilities();
  }
  const auto decision =
      decide({.enabled = true, .selection = Selection::all()}, GroupKind::tensor_parallel,
             {.tp = world_size(), .pp = 1, .dcp = 1}, found);
  if (skip_all_if(!decision.nccl_windows.on, "no windows here: " + describe(decision))) {
    return;
  }
  const int version = found.nccl_runtime_version;
  const bool guard = GENERATE(true, false);
  const InWindows where = GENERATE(InWindows{true, true}, InWindows{false, true},
                                   InWindows{true, false}, InWindows{false, false});
  const int rounds = full_run() ? 5000 : 500;
  Setup setup(*backend, where, guard);
  std::uint64_t wrong = 0;
  for (const auto collective : {Collective::all_gather, Collective::reduce_scatter}) {
    for (std::int64_t bytes = 4 << 10; bytes <= kMaxBytes; bytes *= 8) {
      for (const bool captured : {false, true}) {
        const int shorter = bytes > (1 << 20) ? 5 : 1;
        wrong += setup.count_wrong(collective, bytes, captured, rounds / shorter);
      }
    }
  }
  wrong = sum_over_ranks(wrong);
  INFO("NCCL " << nccl_version_string(version) << ", input " << (where.in ? "" : "not ")
               << "in a window, output " << (where.out ? "" : "not ") << "in a window, guard "
               << (guard ? "on" : "off") << ": " << wrong << " wrong elements");
  if (!guard && needs_visibility_guard(version, symmetric_path(version, where))) {
    CHECK(wrong > 0);
  } else {
    CHECK(wrong == 0);
  }
}
