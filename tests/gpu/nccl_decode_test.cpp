// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "gpu/device_tensor.hpp"
#include "gpu/graph_kernels.hpp"
#include "gpu/nccl_session.hpp"
#include "support/partials_checks.hpp"
#include "support/ranks.hpp"

// The decode step over the transport. Runs with one card per rank, or with several ranks per card
// where each has an NCCL_HOSTID of its own (as_hosts.sh).

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("a query laid out heads first is gathered without a copy", "[nccl][graph]") {
  if (skip_all_if(ranks() < 2, "a group of one gathers nothing")) {
    return;
  }
  DecodeContextParallelGroup group(parts("queries"), {});
  const StreamRef stream = session().ref();
  constexpr std::int64_t kBatch = 16;  // beyond the own kernels' threshold
  constexpr std::int64_t kOwn = 32;
  constexpr std::int64_t kLatent = 512;
  constexpr std::int64_t kRope = 64;
  constexpr std::int64_t kWidth = kLatent + kRope;
  const std::int64_t heads = kOwn * ranks();
  group.reserve_for({.batch = kBatch, .heads = heads, .latent = kLatent, .rope = kRope});
  auto nope = tensor(DType::bf16, {kBatch, kOwn, kLatent});
  auto pe = tensor(DType::bf16, {kBatch, kOwn, kRope});
  auto heads_first = tensor(DType::bf16, {heads, kBatch, kWidth});
  auto batch_first = tensor(DType::bf16, {kBatch, heads, kWidth});
  const auto expected = [](std::int64_t b, std::int64_t h, std::int64_t d) {
    const int sender = static_cast<int>(h / kOwn);
    const std::int64_t row = b * kOwn + h % kOwn;
    return d < kLatent ? value(sender, row * kLatent + d)
                       : value(sender, row * kRope + d - kLatent, 1);
  };
  nope.fill([](std::int64_t i) { return value(rank(), i); });
  pe.fill([](std::int64_t i) { return value(rank(), i, 1); });
  const auto gathered = [&](const TensorView& q) {
    stream.driver().begin_capture(stream.native());
    std::unique_ptr<ExecutableGraph> graph;
    {
      CaptureDomain domain;
      domain.add(group.arena());
      const CaptureScope scope(domain, stream);
      group.gather_query_into(q, nope.view(), pe.view(), stream);
      graph = stream.driver().end_capture(stream.native());
    }
    graph->launch(stream);
    group.synchronize(stream, kLimit);
    return kernel_names(dynamic_cast<CudaExecutableGraph&>(*graph).graph());
  };

  const auto direct = gathered(heads_first.view().transpose(0, 1));
  const auto copied = gathered(batch_first.view());
  CHECK(count_with(direct, "pack_query") == 1);
  CHECK(count_with(direct, "copy_kernel") == 0);
  CHECK(count_with(copied, "pack_query") == 1);
  CHECK(count_with(copied, "copy_kernel") == 1);
  const auto by_heads = [&](std::int64_t i) {
    return expected(i / kWidth % kBatch, i / kWidth / kBatch, i % kWidth);
  };
  const auto by_batch = [&](std::int64_t i) {
    return expected(i / kWidth / heads, i / kWidth % heads, i % kWidth);
  };
  CHECK(heads_first.differs(by_heads) == "");
  CHECK(batch_first.differs(by_batch) == "");

  // The ranks need not agree on the layout.
  heads_first.fill([](std::int64_t) { return -1; });
  batch_first.fill([](std::int64_t) { return -1; });
  const bool odd = rank() % 2 == 1;
  group.gather_query_into(odd ? heads_first.view().transpose(0, 1) : batch_first.view(),
                          nope.view(), pe.view(), stream);
  group.synchronize(stream, kLimit);
  CHECK((odd ? heads_first.differs(by_heads) : batch_first.differs(by_batch)) == "");
}

TEST_CASE("a quantised query and its scales are gathered as rows of bytes", "[nccl][graph]") {
  constexpr std::int64_t kOwn = 4;
  constexpr std::int64_t kWidth = 576;
  constexpr std::int64_t kScales = 4;
  constexpr std::int64_t kRow = kWidth + 4 * kScales;
  const StreamRef stream = session().ref();
  for (const bool map_peers : {true, false}) {
    GroupParts of_group = parts("quantised");
    of_group.decision.peer_mapping.on =
        map_peers && ranks() > 1 && of_group.transport->peer_kernels() != nullptr;
    DecodeContextParallelGroup group(std::move(of_group), {});
    for (const std::int64_t batch : {1, 3, 64}) {
      CAPTURE(map_peers, batch);
      const std::int64_t heads = kOwn * ranks();
      group.reserve_for({.batch = batch,
                         .heads = heads,
                         .latent = kWidth,
                         .rope = kScales,
                         .query_dtype = DType::f8_e4m3,
                         .rope_dtype = DType::f32});
      const auto segments = group.arena()->statistics().segments;
      auto nope = tensor(DType::f8_e4m3, {batch, kOwn, kWidth});
      auto scales = tensor(DType::f32, {batch, kOwn, kScales});
      auto into = tensor(DType::u8, {batch, heads, kRow});
      nope.fill([](std::int64_t i) { return value(rank(), i); });
      scales.fill([](std::int64_t i) { return value(rank(), i, 1); });
      const auto expected = [&](std::int64_t i) {
        const std::int64_t h = i / kRow % heads;
        const std::int64_t row = i / kRow / heads * kOwn + h % kOwn;
        const int sender = static_cast<int>(h / kOwn);
        const std::int64_t byte = i % kRow - kWidth;
        if (byte < 0) {
          return value(sender, row * kWidth + i % kRow);
        }
        std::byte scale[sizeof(float)];
        encode(DType::f32, value(sender, row * kScales + byte / 4, 1), scale);
        return std::to_integer<int>(scale[byte % 4]) * 1.0;
      };
      group.gather_query_into(into.view(), nope.view(), scales.view(), stream);
      group.synchronize(stream, kLimit);
      CHECK(into.differs(expected) == "");

      into.fill([](std::int64_t) { return 255; });
      Tensor q;
      stream.driver().begin_capture(stream.native());
      std::unique_ptr<ExecutableGraph> graph;
      {
        CaptureDomain domain;
        domain.add(group.arena());
        const CaptureScope scope(domain, stream);
        q = group.gather_query(nope.view(), scales.view(), stream);
        CHECK(q.dtype() == DType::u8);
        session().backend->ops().copy(q, into.view(), stream);
        graph = stream.driver().end_capture(stream.native());
        q.reset();
      }
      graph->launch(stream);
      group.synchronize(stream, kLimit);
      CHECK(into.differs(expected) == "");
      CHECK(group.arena()->statistics().segments == segments);
    }
  }
}

TEST_CASE("a captured step finds its counts and slots from the lengths of each replay",
          "[nccl][graph]") {
  DecodeContextParallelGroup group(parts("placed"), {});
  const StreamRef stream = session().ref();
  constexpr std::int64_t kBatch = 33;
  constexpr std::int64_t kQueries = 3;
  const dcp::KvShard shard(ranks(), 2);
  auto lengths = tensor(DType::i32, {kBatch});
  auto counts = tensor(DType::i32, {kBatch, kQueries});
  auto slots = tensor(DType::i64, {kBatch, kQueries});
  const KvStep step{.lengths = lengths.view(), .counts = counts.view(), .slots = slots.view()};
  group.place_step(shard, step, stream);  // of no tokens
  session().wait();
  CHECK(counts.differs([](std::int64_t) { return 0; }) == "");
  CHECK(slots.differs([](std::int64_t) { return -1; }) == "");
  stream.driver().begin_capture(stream.native());
  group.place_step(shard, step, stream);
  const auto graph = stream.driver().end_capture(stream.native());
  for (int round = 0; round < 3; ++round) {
    const auto length = [&](std::int64_t b) { return (b * 5 + round) % 19; };
    const auto visible = [&](std::int64_t i) {
      return std::max<std::int64_t>(length(i / kQueries) - (kQueries - 1 - i % kQueries), 0);
    };
    lengths.fill([&](std::int64_t b) { return length(b); });
    graph->launch(stream);
    session().wait();
    CHECK(counts.differs([&](std::int64_t i) { return shard.local_count(visible(i), rank()); }) ==
          "");
    CHECK(slots.differs([&](std::int64_t i) {
      const std::int64_t token = visible(i) - 1;
      return token >= 0 && shard.owner(token) == rank() ? shard.local_index(token) : -1;
    }) == "");
  }
}

TEST_CASE("shapes beyond the kernels are refused before anything is enqueued", "[nccl][graph]") {
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  auto memory = tensor(DType::bf16, {1 << 16});
  const auto view = [&](DType dtype, Dims shape, std::size_t byte = 0) {  // never touched
    return TensorView(static_cast<std::byte*>(memory.view().data()) + byte, dtype, shape, device);
  };
  for (const MergePlan plan :
       {MergePlan::automatic, MergePlan::staged, MergePlan::packed, MergePlan::one_kernel}) {
    CAPTURE(to_string(plan));
    GroupParts shapes = parts("shapes");
    if (plan == MergePlan::one_kernel) {
      if (ranks() > 1 && shapes.transport->peer_kernels() == nullptr) {
        continue;  // such a group cannot be formed where ranks cannot map each other
      }
      shapes.decision.peer_mapping.on = true;
    }
    DecodeContextParallelGroup group(std::move(shapes), {.plan = plan});
    const auto refused = [&](const auto& call, const std::string& word) {
      stream.driver().begin_capture(stream.native());
      CHECK_THROWS_MATCHES(call(), UsageError, says(word));
      const auto graph = stream.driver().end_capture(stream.native());
      std::size_t nodes = 1;
      cuda_check(
          cudaGraphGetNodes(dynamic_cast<CudaExecutableGraph&>(*graph).graph(), nullptr, &nodes),
          "cudaGraphGetNodes");
      CHECK(nodes == 0);
    };
    const auto merge = [&](std::int64_t batch, std::int64_t dim) {
      const std::int64_t heads = 128 * ranks();
      group.merge_attention_into(view(DType::bf16, {batch, 128, dim}),
                                 view(DType::bf16, {batch, heads, dim}),
                                 view(DType::f32, {batch, heads}), LseBase::e, stream);
    };
    refused([&] { merge(16384, 512); }, "less than 2147483648 bytes");
    refused([&] { merge(2, 12); }, "multiple of 8");
    refused([&] { merge(2, 1032); }, "at most 1024");
    refused(
        [&] {
          group.gather_query_into(view(DType::f8_e4m3, {2, 4 * ranks(), 24}, 1024),
                                  view(DType::f8_e4m3, {2, 4, 16}),
                                  view(DType::f8_e4m3, {2, 4, 8}, 512), stream);
        },
        "16 bytes");
    merge(0, 512);  // the group works on
  }
}

namespace {

/// The session's card, for checks that know host tensors.
class CardMemory final : public DeviceAccess {
 public:
  CardMemory() { device_access = this; }
  ~CardMemory() override { device_access = nullptr; }
  CardMemory(const CardMemory&) = delete;
  CardMemory& operator=(const CardMemory&) = delete;

  void read(void* to, const void* from, std::size_t bytes) override {
    session().wait();
    const DeviceGuard guard(session().backend->device().index);
    cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  void write(void* to, const void* from, std::size_t bytes) override {
    const DeviceGuard guard(session().backend->device().index);
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, session().stream.get()),
               "cudaMemcpyAsync");
    session().wait();
  }
};

}  // namespace

TEST_CASE("splits, sinks and ranks without tokens are merged exactly into every result", "[nccl]") {
  CardMemory memory;
  const StreamRef stream = session().ref();
  const auto cases = partials_cases(ranks(), 5);
  std::vector<std::vector<std::byte>> packed(cases.size());
  const std::size_t step = full_run() ? 1 : 2;
  for (const auto& plan : partials_plans()) {
    if (plan.host.slot_bytes != HostOptions{}.slot_bytes) {
      continue;  // of the host's backend
    }
    GroupParts of_group = parts("partials");
    const bool near = ranks() > 1 && of_group.transport->peer_kernels() != nullptr;
    of_group.decision.peer_mapping.on = near && plan.host.map_peers;
    if (plan.merge.plan == MergePlan::one_kernel && !near && ranks() > 1) {
      continue;
    }
    DecodeContextParallelGroup group(std::move(of_group), plan.merge);
    for (std::size_t i = 0; i < cases.size(); i += step) {
      const std::string what = fmt::format("{}: {}", plan.name, to_string(cases[i]));
      auto bits = merge_partials_once(group, cases[i], what, plan.narrow, stream);
      if (packed[i].empty()) {
        packed[i] = std::move(bits);
      } else if (plan.like_packed) {
        check(bits == packed[i], what + ": as packed");
      }
    }
    check_exact_partials(group, stream);
    check_wrong_partials(group, stream);
  }
}
