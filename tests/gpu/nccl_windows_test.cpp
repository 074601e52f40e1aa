// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/nccl/nccl_transport.hpp"
#include "gpu/device_tensor.hpp"
#include "gpu/graph_kernels.hpp"
#include "gpu/nccl_session.hpp"
#include "support/ranks.hpp"

// Buffers in windows, and at their wrong places.

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("in windows NCCL takes its symmetric path, and the guard precedes it", "[nccl][window]") {
  if (skip_all_without_windows()) {
    return;
  }
  auto& transport = *session().transport;
  const auto& found = transport.capabilities();
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  constexpr std::size_t kBytes = std::size_t{16} << 20;
  const auto in_segment = session().backend->allocate_segment(kBytes);
  const auto out_segment = session().backend->allocate_segment(kBytes);
  const auto in_window = transport.register_segment(*in_segment);
  const auto out_window = transport.register_segment(*out_segment);
  constexpr std::int64_t kCount = 1 << 20;  // beyond the own kernels' threshold
  const TensorView in(in_segment->data(), DType::bf16, {kCount}, device);
  const TensorView out(out_segment->data(), DType::bf16, {kCount * ranks()}, device);
  const auto sizes = equal_sizes(kCount);
  CHECK(transport.path(Collective::all_gather, in, out, 0) == "nccl symmetric");

  stream.driver().begin_capture(stream.native());
  transport.all_gather(in, out, 0, sizes, stream);
  transport.reduce_scatter(out, in, 0, sizes, ReduceOp::sum, stream);
  transport.all_reduce(in, out.slice(0, 0, kCount), ReduceOp::sum, stream);
  const auto graph = stream.driver().end_capture(stream.native());
  const auto names = kernel_names(dynamic_cast<CudaExecutableGraph&>(*graph).graph());
  for (const auto& name : names) {
    UNSCOPED_INFO(name);
  }
  CHECK(count_with(names, "ncclSym") == 3);
  CHECK(count_with(names, "visibility_guard") ==
        (has_trait(NcclTrait::early_start, found.nccl_runtime_version) ? 3 : 0));

  auto host = tensor(DType::bf16, {kCount});
  for (int round = 0; round < 5; ++round) {
    host.fill([round](std::int64_t i) { return value(rank(), i, round); });
    session().backend->ops().copy(host.view(), in, stream);
    graph->launch(stream);
    session().backend->ops().copy(out.slice(0, 0, kCount), host.view(), stream);
    session().wait();
    // The reduce-scatter of what was gathered is n times the own values; the sum over the ranks of
    // that is n times the reduction. At most 8 * 8 * 11, so only values up to 256 are exact.
    if (ranks() <= 4) {
      CHECK(host.differs([round](std::int64_t i) {
        return ranks() * reduced(ReduceOp::sum, i, round);
      }) == "");
    }
  }
}

namespace {

/// A transport all of whose calls NCCL takes, of a group that may fail, and memory in a window of
/// its.
struct InWindow {
  static std::uint64_t next_generation() {
    static std::uint64_t last = 1000;
    return ++last;
  }

  std::unique_ptr<ControlPlane> group =
      world().subgroup(everyone(), next_generation(), "in a window");
  std::unique_ptr<Segment> segment = session().backend->allocate_segment(std::size_t{8} << 20);
  std::unique_ptr<NcclTransport> transport = std::make_unique<NcclTransport>(
      *group, session().backend->streams(), session().backend->device().index,
      NcclTransportOptions{.own_max_bytes = 0});
  std::unique_ptr<Window> window = transport->register_segment(*segment);
};

}  // namespace

TEST_CASE("buffers at different places of a window cannot be captured, nor used under debug checks",
          "[nccl][window]") {
  if (skip_all_without_windows()) {
    return;
  }
  const InWindow memory;
  NcclTransport& transport = *memory.transport;
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  constexpr std::int64_t kCount = 4096;
  auto* const base = static_cast<BFloat16*>(memory.segment->data());
  const auto at = [&](std::int64_t offset, std::int64_t count) {
    return TensorView(base + offset, DType::bf16, {count}, device);
  };
  const bool debug_checks = GENERATE(false, true);
  if (debug_checks) {
    transport.compare_places();
  }
  const auto refused = [&](const auto& call) {
    if (!debug_checks) {
      stream.driver().begin_capture(stream.native());
    }
    std::string error;
    try {
      call();
    } catch (const SymmetryError& found) {
      error = found.what();
    }
    if (!debug_checks) {
      (void)stream.driver().end_capture(stream.native());
    }
    transport.synchronize(stream, kLimit);
    return error;
  };
  const auto sizes = equal_sizes(kCount);
  const std::int64_t own = rank() * kCount;
  const std::int64_t far = kCount * ranks();
  const auto differs = contains("places of its buffers");
  CHECK_THAT(
      refused([&] { transport.all_gather(at(0, kCount), at(far + own, far), 0, sizes, stream); }),
      differs);
  CHECK_THAT(refused([&] {
               transport.reduce_scatter(at(own, far), at(4 * far, kCount), 0, sizes, ReduceOp::sum,
                                        stream);
             }),
             differs);
  CHECK_THAT(refused([&] {
               transport.all_reduce(at(0, kCount), at(far + own, kCount), ReduceOp::sum, stream);
             }),
             differs);
  // What only this rank touches may lie anywhere: its share in the gathered whole, first of all.
  CHECK(refused([&] {
          transport.all_gather(at(far + own, kCount), at(far, far), 0, sizes, stream);
          transport.reduce_scatter(at(0, far), at(2 * far + own, kCount), 0, sizes, ReduceOp::sum,
                                   stream);
        }) == "");
  // Both ways are packed, of the same bytes: only the dimension tells them apart.
  transport.reserve_scratch(2 * sizeof(BFloat16) * kCount * static_cast<std::size_t>(ranks() + 1));
  const auto along = [&](int dim) {
    Dims full{2, 2, kCount / 4};
    full[dim] *= ranks();
    const TensorView joined(base + far, DType::bf16, full, device);
    return refused([&] {
      transport.all_gather(TensorView(base, DType::bf16, {2, 2, kCount / 4}, device), joined, dim,
                           equal_sizes(dim == 1 ? 2 : kCount / 4), stream);
    });
  };
  CHECK(along(1) == "");
  CHECK_THAT(along(rank() == ranks() - 1 ? 2 : 1), differs);
}

TEST_CASE("eager calls of buffers at different places of a window fail the group",
          "[nccl][window][errors]") {
  if (skip_all_without_windows() ||
      skip_all_if(session().transport->peer_kernels() == nullptr, "needs own kernels")) {
    return;
  }
  const auto collective =
      GENERATE(Collective::all_gather, Collective::reduce_scatter, Collective::all_reduce);
  CAPTURE(static_cast<int>(collective));
  const InWindow memory;
  NcclTransport& transport = *memory.transport;
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  constexpr std::int64_t kCount = 4096;
  const std::int64_t whole = kCount * ranks();
  const auto at = [&](std::int64_t offset, std::int64_t count) {
    return TensorView(static_cast<BFloat16*>(memory.segment->data()) + offset, DType::bf16, {count},
                      device);
  };
  const auto sizes = equal_sizes(kCount);
  const bool gathers = collective == Collective::all_gather;
  const bool scatters = collective == Collective::reduce_scatter;
  const TensorView in = at(0, scatters ? whole : kCount);
  const auto call = [&](const TensorView& from, const TensorView& to) {
    if (gathers) {
      transport.all_gather(from, to, 0, sizes, stream);
    } else if (scatters) {
      transport.reduce_scatter(from, to, 0, sizes, ReduceOp::sum, stream);
    } else {
      transport.all_reduce(from, to, ReduceOp::sum, stream);
    }
  };
  const TensorView out = at(2 * whole, gathers ? whole : kCount);
  auto source = tensor(DType::bf16, {in.numel()});
  auto result = tensor(DType::bf16, {out.numel()});
  for (int round = 0; round < 20; ++round) {
    source.fill([round](std::int64_t i) { return value(rank(), i, round); });
    session().backend->ops().copy(source.view(), in, stream);
    call(in, out);
    session().backend->ops().copy(out, result.view(), stream);
    transport.synchronize(stream, kLimit);
    CHECK(result.differs([&](std::int64_t i) {
      return gathers ? value(static_cast<int>(i / kCount), i % kCount, round)
                     : reduced(ReduceOp::sum, scatters ? rank() * kCount + i : i, round);
    }) == "");
  }
  // What only this rank touches may lie anywhere.
  if (gathers) {
    call(at(rank() * kCount, kCount), out);
  } else if (scatters) {
    call(in, at(2 * whole + rank() * kCount, kCount));
  }
  transport.synchronize(stream, kLimit);
  CHECK_FALSE(transport.failed());

  const std::int64_t own = rank() * kCount;
  scatters ? call(at(own, whole), out) : call(in, at(2 * whole + own, out.numel()));
  CHECK_THROWS_MATCHES(transport.synchronize(stream, kLimit), SymmetryError,
                       says("over NCCL", "other offsets of their windows"));
  CHECK(transport.failed());
  CHECK_THROWS_AS(call(in, out), TransportError);
  world().barrier();
}

TEST_CASE("what another allocator hands out of a window may lie anywhere", "[nccl][window]") {
  if (skip_all_without_windows()) {
    return;
  }
  const InWindow memory;
  NcclTransport& transport = *memory.transport;
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  constexpr std::int64_t kCount = 4096;
  const std::int64_t whole = kCount * ranks();
  auto* const base = static_cast<float*>(memory.segment->data());
  memory.segment->loose_parts().add(base, std::size_t{4} << 20);
  const auto view = [&](std::int64_t at, std::int64_t count) {
    return TensorView(base + at, DType::f32, {count}, device);
  };
  // Loose ones at another offset on each rank.
  const TensorView loose = view(64 * rank(), whole);
  const TensorView even = view(1 << 20, whole);
  const TensorView loose_share = view((1 << 18) + 64 * rank(), kCount);
  const TensorView even_share = view((1 << 20) + (1 << 18), kCount);
  const auto fill = [&](const TensorView& tensor) {
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(i % 97) + 100.0F * static_cast<float>(rank());
    }
    cuda_check(cudaMemcpy(tensor.data(), values.data(), tensor.bytes(), cudaMemcpyHostToDevice),
               "cudaMemcpy");
    cuda_check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
  };
  const auto wrong = [&](const TensorView& tensor, const auto& expected) {
    transport.synchronize(stream, kLimit);
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    cuda_check(cudaMemcpy(values.data(), tensor.data(), tensor.bytes(), cudaMemcpyDeviceToHost),
               "cudaMemcpy");
    int count = 0;
    for (std::int64_t i = 0; i < tensor.numel(); ++i) {
      count += values[static_cast<std::size_t>(i)] != expected(i) ? 1 : 0;
    }
    return count;
  };
  const auto of_ranks = static_cast<float>(100 * ranks() * (ranks() - 1) / 2);
  const auto sum = [&](std::int64_t i) {
    return static_cast<float>(i % 97) * static_cast<float>(ranks()) + of_ranks;
  };
  const auto own_sum = [&](std::int64_t i) { return sum(i + rank() * kCount); };
  const auto joined = [&](std::int64_t i) {
    return static_cast<float>(i % kCount % 97) + 100.0F * static_cast<float>(i / kCount);
  };
  const auto path = [&](Collective collective, const TensorView& in, const TensorView& out) {
    return transport.path(collective, in, out, 0);
  };
  const auto sizes = equal_sizes(kCount);

  fill(loose);
  transport.all_reduce(loose, even, ReduceOp::sum, stream);
  CHECK(wrong(even, sum) == 0);
  CHECK(path(Collective::all_reduce, loose, even) == "nccl, packed");
  fill(even);
  transport.all_reduce(even, loose, ReduceOp::sum, stream);
  CHECK(wrong(loose, sum) == 0);
  fill(loose);
  transport.all_reduce(loose, loose, ReduceOp::sum, stream);
  CHECK(wrong(loose, sum) == 0);
  fill(loose);
  transport.reduce_scatter(loose, even_share, 0, sizes, ReduceOp::sum, stream);
  CHECK(wrong(even_share, own_sum) == 0);
  CHECK(path(Collective::reduce_scatter, loose, even_share) == "nccl, packed");
  fill(even_share);
  transport.all_gather(even_share, loose, 0, sizes, stream);
  CHECK(wrong(loose, joined) == 0);
  CHECK(path(Collective::all_gather, even_share, loose) == "nccl, packed");
  // What no peer touches is taken where it lies.
  fill(loose_share);
  transport.all_gather(loose_share, even, 0, sizes, stream);
  CHECK(wrong(even, joined) == 0);
  CHECK(path(Collective::all_gather, loose_share, even) == "nccl symmetric");
  fill(even);
  transport.reduce_scatter(even, loose_share, 0, sizes, ReduceOp::sum, stream);
  CHECK(wrong(loose_share, own_sum) == 0);
  CHECK(path(Collective::reduce_scatter, even, loose_share) == "nccl symmetric");
}

TEST_CASE("pairs on two hosts: windows within a pair, none across", "[nccl][window]") {
  const bool pairs = ranks() == 4 && session().transport->capabilities().nccl_hosts == 2;
  if (skip_all_if(!pairs, "needs four ranks as two hosts of two cards")) {
    return;
  }
  const SymmetricOptions options{.enabled = true, .selection = Selection::all()};
  const ParallelLayout layout{.tp = 4, .pp = 1, .dcp = 2};
  const auto across =
      decide(options, GroupKind::tensor_parallel, layout, session().transport->capabilities());
  CHECK(across.nccl_windows.reason == Reason::out_of_nvlink_reach);

  const auto group = world().split(rank() / 2, rank(), "dcp");
  const auto transport = session().backend->connect(*group);
  const auto within =
      decide(options, GroupKind::decode_context_parallel, layout, transport->capabilities());
  INFO(describe(within));
  REQUIRE(within.nccl_windows.on);

  const StreamRef stream = session().ref();
  const auto segment = session().backend->allocate_segment(std::size_t{16} << 20);
  const auto window = transport->register_segment(*segment);
  constexpr std::int64_t kCount = 1 << 20;
  const TensorView both(segment->data(), DType::f32, {kCount}, session().backend->device());
  stream.driver().begin_capture(stream.native());
  transport->all_reduce(both, both, ReduceOp::sum, stream);
  const auto graph = stream.driver().end_capture(stream.native());
  CHECK(count_with(kernel_names(dynamic_cast<CudaExecutableGraph&>(*graph).graph()), "ncclSym") ==
        1);
  auto host = tensor(DType::f32, {kCount});
  host.fill([](std::int64_t i) { return value(rank(), i); });
  session().backend->ops().copy(host.view(), both, stream);
  graph->launch(stream);
  session().backend->ops().copy(both, host.view(), stream);
  transport->synchronize(stream, kLimit);
  const int first = rank() / 2 * 2;
  CHECK(host.differs([first](std::int64_t i) { return value(first, i) + value(first + 1, i); }) ==
        "");
}
