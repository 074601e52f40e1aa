// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/nccl/nccl_transport.hpp"
#include "gpu/device_tensor.hpp"
#include "gpu/nccl_session.hpp"
#include "support/ranks.hpp"

// Every collective of the transport with inputs whose answers are known exactly. Runs with one card
// per rank, or with several ranks per card where each has an NCCL_HOSTID of its own (as_hosts.sh).

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("the environment that was set wins on every rank", "[nccl]") {
  static_cast<void>(session());
  const char* const nvls = std::getenv("NCCL_NVLS_ENABLE");
  REQUIRE(nvls != nullptr);  // set by the launcher or by the backend, which must not override it
  CHECK(std::string(nvls) == "0");
  // The backend wants 8; a launcher that set another number before keeps it.
  const char* const connections = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  const char* const launched_with = std::getenv("COHORT_TEST_CONNECTIONS");
  REQUIRE(connections != nullptr);
  CHECK(std::string(connections) == (launched_with == nullptr ? "8" : launched_with));
}

TEST_CASE("the caller's current device is restored", "[nccl]") {
  int devices = 0;
  cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  const int other = devices - 1;
  cuda_check(cudaSetDevice(other), "cudaSetDevice");
  check_all_gather(DType::f32, {2, 3}, 0, equal_sizes(2), Layout::contiguous, Layout::contiguous);
  int current = -1;
  cuda_check(cudaGetDevice(&current), "cudaGetDevice");
  CHECK(current == other);
}

TEST_CASE("all_gather: every type along every dimension", "[nccl]") {
  for (const DType dtype : kAllTypes) {
    for (const int dim : {0, 1, 2}) {
      CAPTURE(to_string(dtype), dim);
      check_all_gather(dtype, {3, 4, 5}, dim, equal_sizes(3), Layout::contiguous,
                       Layout::contiguous);
      check_all_gather(dtype, {3, 4, 5}, dim, unequal_sizes(), Layout::contiguous,
                       Layout::contiguous);
    }
  }
}

TEST_CASE("all_gather: any strides on either side", "[nccl]") {
  for (const Layout in : kLayouts) {
    for (const Layout out : kLayouts) {
      for (const int dim : {0, 1, 2}) {
        CAPTURE(static_cast<int>(in), static_cast<int>(out), dim);
        check_all_gather(DType::bf16, {2, 3, 8}, dim, equal_sizes(2), in, out);
        check_all_gather(DType::bf16, {2, 3, 8}, dim, unequal_sizes(), in, out);
      }
    }
  }
}

TEST_CASE("all_gather: nothing, one element, and megabytes", "[nccl]") {
  check_all_gather(DType::f32, {0, 4}, 1, equal_sizes(4), Layout::contiguous, Layout::contiguous);
  check_all_gather(DType::f32, {1}, 0, equal_sizes(1), Layout::contiguous, Layout::contiguous);
  for (const int dim : {0, 1}) {
    check_all_gather(DType::bf16, {257, 1031}, dim, equal_sizes(257), Layout::contiguous,
                     Layout::contiguous);
    check_all_gather(DType::f32, {128, 1024}, dim, equal_sizes(512), Layout::contiguous,
                     Layout::contiguous);
  }
}

TEST_CASE("reduce_scatter: every type and operation", "[nccl]") {
  for (const DType dtype : kAllTypes) {
    if (!is_reducible(dtype)) {
      continue;
    }
    for (const ReduceOp op : kAllOps) {
      for (const int dim : {0, 1}) {
        CAPTURE(to_string(dtype), to_string(op), dim);
        check_reduce_scatter(dtype, op, {3, 4, 5}, dim, equal_sizes(3), Layout::contiguous,
                             Layout::contiguous);
      }
    }
    check_reduce_scatter(dtype, ReduceOp::sum, {3, 4, 5}, 1, unequal_sizes(), Layout::contiguous,
                         Layout::contiguous);
  }
}

TEST_CASE("reduce_scatter: any strides on either side", "[nccl]") {
  for (const Layout in : kLayouts) {
    for (const Layout out : kLayouts) {
      for (const int dim : {0, 1, 2}) {
        CAPTURE(static_cast<int>(in), static_cast<int>(out), dim);
        check_reduce_scatter(DType::f32, ReduceOp::sum, {2, 3, 8}, dim, equal_sizes(2), in, out);
        check_reduce_scatter(DType::f16, ReduceOp::sum, {2, 3, 8}, dim, unequal_sizes(), in, out);
      }
    }
  }
}

TEST_CASE("reduce_scatter: nothing, one element, and megabytes", "[nccl]") {
  check_reduce_scatter(DType::f32, ReduceOp::sum, {0, 4}, 1, equal_sizes(4), Layout::contiguous,
                       Layout::contiguous);
  check_reduce_scatter(DType::f32, ReduceOp::sum, {1}, 0, equal_sizes(1), Layout::contiguous,
                       Layout::contiguous);
  for (const int dim : {0, 1}) {
    check_reduce_scatter(DType::bf16, ReduceOp::sum, {257, 1031}, dim, equal_sizes(257),
                         Layout::contiguous, Layout::contiguous);
  }
}

TEST_CASE("all_reduce: every type and operation, in place and not, any strides", "[nccl]") {
  for (const DType dtype : kAllTypes) {
    if (!is_reducible(dtype)) {
      continue;
    }
    for (const ReduceOp op : kAllOps) {
      CAPTURE(to_string(dtype), to_string(op));
      auto both = tensor(dtype, {3, 7});
      both.fill([op](std::int64_t i) { return input(op, rank(), i); });
      session().transport->all_reduce(both.view(), both.view(), op, session().ref());
      session().wait();
      CHECK(both.differs([op](std::int64_t i) { return reduced(op, i); }) == "");
    }
  }
  for (const Layout in : kLayouts) {
    for (const Layout out : kLayouts) {
      for (const std::int64_t rows : {3, 700}) {
        auto from = tensor(DType::bf16, {rows, 5, 64}, in);
        auto to = tensor(DType::bf16, {rows, 5, 64}, out);
        from.fill([](std::int64_t i) { return value(rank(), i); });
        session().transport->all_reduce(from.view(), to.view(), ReduceOp::sum, session().ref());
        session().wait();
        CHECK(to.differs([](std::int64_t i) { return reduced(ReduceOp::sum, i); }) == "");
      }
    }
  }
}

TEST_CASE("broadcast from every rank", "[nccl]") {
  for (int root = 0; root < ranks(); ++root) {
    for (const Layout layout : kLayouts) {
      auto both = tensor(DType::f16, {5, 9}, layout);
      both.fill([](std::int64_t i) { return value(rank(), i); });
      session().transport->broadcast(both.view(), root, session().ref());
      session().wait();
      CHECK(both.differs([root](std::int64_t i) { return value(root, i); }) == "");
    }
  }
}

TEST_CASE("all_to_all exchanges the parts", "[nccl]") {
  for (const Layout layout : kLayouts) {
    constexpr std::int64_t kPart = 2 * 6;
    auto from = tensor(DType::bf16, {2 * ranks(), 6}, layout);
    auto to = tensor(DType::bf16, {2 * ranks(), 6}, layout);
    from.fill([](std::int64_t i) { return value(rank(), i); });
    session().transport->all_to_all(from.view(), to.view(), session().ref());
    session().wait();
    CHECK(to.differs([](std::int64_t i) {
      return value(static_cast<int>(i / kPart), rank() * kPart + i % kPart);
    }) == "");
  }
}

TEST_CASE("messages go round a ring and keep their order", "[nccl]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const int next = (rank() + 1) % ranks();
  const int previous = (rank() + ranks() - 1) % ranks();
  for (const Layout layout : kLayouts) {
    auto first = tensor(DType::f32, {3, 4}, layout);
    auto second = tensor(DType::i64, {5});
    auto got_first = tensor(DType::f32, {3, 4}, layout);
    auto got_second = tensor(DType::i64, {5});
    first.fill([](std::int64_t i) { return value(rank(), i, 1); });
    second.fill([](std::int64_t i) { return value(rank(), i, 2); });
    const auto send = [&] {
      session().transport->send(first.view(), next, session().ref());
      session().transport->send(second.view(), next, session().ref());
    };
    const auto receive = [&] {
      session().transport->recv(got_first.view(), previous, session().ref());
      session().transport->recv(got_second.view(), previous, session().ref());
    };
    // A send may wait for its receive, so one rank must begin with receiving.
    if (rank() == 0) {
      receive();
      send();
    } else {
      send();
      receive();
    }
    session().wait();
    CHECK(got_first.differs([&](std::int64_t i) { return value(previous, i, 1); }) == "");
    CHECK(got_second.differs([&](std::int64_t i) { return value(previous, i, 2); }) == "");
  }
}

TEST_CASE("a call to oneself or nobody is refused, and the group works on", "[nccl]") {
  auto one = tensor(DType::f32, {4});
  CHECK_THROWS_AS(session().transport->send(one.view(), rank(), session().ref()), UsageError);
  CHECK_THROWS_AS(session().transport->recv(one.view(), ranks(), session().ref()), UsageError);
  session().transport->barrier(session().ref());
  session().wait();
}

TEST_CASE("captured collectives give fresh answers at every replay", "[nccl][graph]") {
  const bool large = GENERATE(false, true);
  const std::int64_t rows = large ? 300 : 4;
  const Split split({rows, 6, 128}, 1, equal_sizes(6));
  auto share = tensor(DType::bf16, split.share(rank()));
  auto gathered = tensor(DType::bf16, split.full);
  auto scattered = tensor(DType::bf16, split.share(rank()));
  auto summed = tensor(DType::bf16, split.share(rank()));
  const StreamRef stream = session().ref();
  const auto step = [&] {
    auto& transport = *session().transport;
    transport.all_gather(share.view(), gathered.view(), 1, split.sizes, stream);
    transport.reduce_scatter(gathered.view(), scattered.view(), 1, split.sizes, ReduceOp::sum,
                             stream);
    transport.all_reduce(share.view(), summed.view(), ReduceOp::sum, stream);
    transport.barrier(stream);
  };
  step();  // lets scratch memory grow
  session().wait();
  stream.driver().begin_capture(stream.native());
  step();
  const auto graph = stream.driver().end_capture(stream.native());
  for (int round = 0; round < 20; ++round) {
    share.fill([round](std::int64_t i) { return value(rank(), i, round); });
    graph->launch(stream);
    session().wait();
    const auto whole = [&](std::int64_t i) {
      const auto [r, j] = split.owner(i);
      return value(r, j, round);
    };
    CHECK(gathered.differs(whole) == "");
    CHECK(scattered.differs([&](std::int64_t i) { return ranks() * value(rank(), i, round); }) ==
          "");
    CHECK(summed.differs([round](std::int64_t i) { return reduced(ReduceOp::sum, i, round); }) ==
          "");
  }
}

TEST_CASE("scratch memory does not grow within a capture", "[nccl][graph]") {
  if (skip_all_if(ranks() < 2, "a group of one packs nothing")) {
    return;
  }
  const auto transport = session().backend->connect(world());  // one without scratch memory
  const StreamRef stream = session().ref();
  auto from = tensor(DType::f32, {512, 512});
  auto to = tensor(DType::f32, {512, 512 * ranks()});
  const auto sizes = equal_sizes(512);
  stream.driver().begin_capture(stream.native());
  CHECK_THROWS_MATCHES(transport->all_gather(from.view(), to.view(), 1, sizes, stream), UsageError,
                       says("scratch", std::to_string(to.view().bytes()), "capture"));
  static_cast<void>(stream.driver().end_capture(stream.native()));  // still a valid capture

  dynamic_cast<NcclTransport&>(*transport).reserve_scratch(2 * to.view().bytes());
  stream.driver().begin_capture(stream.native());
  transport->all_gather(from.view(), to.view(), 1, sizes, stream);
  const auto graph = stream.driver().end_capture(stream.native());
  from.fill([](std::int64_t i) { return value(rank(), i); });
  graph->launch(stream);
  transport->synchronize(stream, kLimit);
  const Split split({512, 512}, 1, sizes);
  CHECK(to.differs([&](std::int64_t i) {
    const auto [r, j] = split.owner(i);
    return value(r, j);
  }) == "");
}

TEST_CASE("a group's calls on two streams are ordered", "[nccl]") {
  GroupCoordinator group(parts("streams"));
  const UniqueStream second = make_stream(session().backend->device().index);
  const StreamRef other = session().backend->stream(second.get());
  auto a = tensor(DType::f32, {1 << 16});
  for (int round = 0; round < 20; ++round) {
    a.fill([](std::int64_t i) { return (i + rank()) % 2; });
    group.all_reduce(a.view(), session().ref(), ReduceOp::max);
    group.all_reduce(a.view(), other);
    group.synchronize(other, kLimit);
    CHECK(a.differs([](std::int64_t i) {
      const double highest = ranks() > 1 ? 1 : static_cast<double>(i % 2);
      return highest * ranks();
    }) == "");
  }
  group.synchronize(session().ref(), kLimit);
}

TEST_CASE("calls of one capture on two streams are ordered, and eager ones in between", "[nccl]") {
  GroupCoordinator group(parts("captured streams"));
  const StreamRef stream = session().ref();
  const UniqueStream second = make_stream(session().backend->device().index);
  const StreamRef other = session().backend->stream(second.get());
  constexpr std::int64_t kCount = 1 << 18;  // beyond the own kernels' threshold
  auto a = tensor(DType::f32, {kCount});
  auto b = tensor(DType::f32, {kCount});
  const auto bit = [](std::int64_t i) { return static_cast<double>((i + rank()) % 2); };
  const auto highest = [](std::int64_t i) {
    return ranks() > 1 ? 1.0 : static_cast<double>(i % 2);
  };
  b.fill(bit);
  stream.driver().begin_capture(stream.native());
  group.all_reduce(a.view(), stream, ReduceOp::max);
  other.wait_for(stream);  // joins the capture
  group.all_reduce(a.view(), other);
  stream.wait_for(other);
  const auto graph = stream.driver().end_capture(stream.native());
  for (int round = 0; round < 5; ++round) {
    a.fill(bit);
    b.fill(bit);
    group.order(stream);
    graph->launch(stream);
    group.all_reduce(b.view(), other, ReduceOp::max);  // waits for the graph
    group.all_reduce(b.view(), stream);
    group.synchronize(stream, kLimit);
    CHECK(a.differs([&](std::int64_t i) { return highest(i) * ranks(); }) == "");
    CHECK(b.differs([&](std::int64_t i) { return highest(i) * ranks(); }) == "");
  }
}

TEST_CASE("the path can be read back", "[nccl]") {
  auto& transport = *session().transport;
  auto small = tensor(DType::f32, {64});
  auto small_all = tensor(DType::f32, {64 * ranks()});
  auto large = tensor(DType::f32, {5 << 20});
  auto large_all = tensor(DType::f32, {ranks(), 5 << 20});
  const auto path = [&](const DeviceTensor& in, const DeviceTensor& out, int dim) {
    return transport.path(Collective::all_gather, in.view(), out.view(), dim);
  };
  if (ranks() == 1) {
    CHECK(path(small, small_all, 0) == "copy");
    return;
  }
  const bool own = transport.peer_kernels() != nullptr && runtime_settings().own_max_bytes != 0;
  CHECK(path(small, small_all, 0) == (own ? "own" : "nccl"));
  CHECK(path(large, large_all, 0) == "nccl");
  auto wide = tensor(DType::f32, {1024, 5 << 10});
  auto wide_all = tensor(DType::f32, {1024, (5 << 10) * ranks()});
  CHECK(path(wide, wide_all, 1) == "nccl, packed");
  auto nothing = tensor(DType::f32, {0});
  CHECK(path(nothing, nothing, 0) == "none");
}

TEST_CASE("calls that were reserved for go through the inboxes", "[nccl]") {
  GroupParts of_group = parts("reserved");
  Transport* const transport = of_group.transport.get();
  DecodeContextParallelGroup group(std::move(of_group), {});
  constexpr std::int64_t kCount = 400'000;  // more than an inbox has room for at first
  auto x = tensor(DType::bf16, {kCount});
  auto sum = tensor(DType::bf16, {kCount});
  const std::vector<CollectiveShape> calls{
      {.collective = Collective::all_reduce, .shape = {kCount}, .dtype = DType::bf16}};
  group.reserve_for_calls(calls);
  if (ranks() > 1) {
    const bool own =
        transport->slot_bytes(Collective::all_reduce, x.view().bytes(), x.view().bytes()) > 0;
    CHECK((transport->path(Collective::all_reduce, x.view(), sum.view(), 0) == "own") == own);
  }
  x.fill([](std::int64_t i) { return value(rank(), i); });
  group.all_reduce_into(sum.view(), x.view(), session().ref());
  group.synchronize(session().ref(), kLimit);
  CHECK(sum.differs([](std::int64_t i) { return reduced(ReduceOp::sum, i); }) == "");
}

TEST_CASE("an all-reduce with residual and norm is exact in one launch and in two",
          "[nccl][graph]") {
  DecodeContextParallelGroup group(parts("normed"), {});
  const StreamRef stream = session().ref();
  CaptureDomain domain;
  domain.add(group.arena());
  const bool reserved = GENERATE(false, true);
  for (const std::int64_t rows : {1, 3, 16, 70}) {
    for (const std::int64_t hidden : {7168, 250}) {
      for (const DType out_dtype : {DType::bf16, DType::f8_e4m3}) {
        CAPTURE(rows, hidden, to_string(out_dtype), reserved);
        const std::vector<CollectiveShape> calls{{.collective = Collective::all_reduce_rms_norm,
                                                  .shape = {rows, hidden},
                                                  .dtype = DType::bf16}};
        if (reserved) {
          group.reserve_for_calls(calls);
        }
        auto x = tensor(DType::bf16, {rows, hidden});
        auto residual = tensor(DType::bf16, {rows, hidden});
        auto weight = tensor(DType::bf16, {hidden});
        auto scale = tensor(DType::f32, {1});
        auto out = tensor(out_dtype, {rows, hidden});
        // The new residual is 2 or -2 everywhere, whose root mean square is 2.
        const auto target = [](std::int64_t i, int seed) {
          return (i + seed) % 3 == 0 ? -2.0 : 2.0;
        };
        const auto weight_at = [](std::int64_t i) { return static_cast<double>(1 + i % 7); };
        const bool fp8 = out_dtype == DType::f8_e4m3;
        const auto expected = [&](int seed) {
          return [&, seed](std::int64_t i) {
            const double normed = target(i, seed) / 2 * weight_at(i % hidden);
            return fp8 ? static_cast<double>(float_to_f8_e4m3(static_cast<float>(2 * normed)))
                       : normed;
          };
        };
        weight.fill(weight_at);
        scale.fill([](std::int64_t) { return 0.5; });
        const auto prepare = [&](int seed) {
          x.fill([seed](std::int64_t i) { return value(rank(), i, seed); });
          residual.fill(
              [&](std::int64_t i) { return target(i, seed) - reduced(ReduceOp::sum, i, seed); });
          out.fill([](std::int64_t) { return 99; });
        };
        ResidualNorm norm{.residual = residual.view(), .weight = weight.view(), .epsilon = 0.0F};
        if (fp8) {
          norm.scale = scale.view();
        }
        const auto check = [&](int seed) {
          CHECK(out.differs(expected(seed)) == "");
          CHECK(residual.differs([&](std::int64_t i) { return target(i, seed); }) == "");
        };
        prepare(0);
        group.all_reduce_rms_norm_into(out.view(), x.view(), norm, stream);
        group.synchronize(stream, kLimit);
        check(0);
        stream.driver().begin_capture(stream.native());
        std::unique_ptr<ExecutableGraph> graph;
        {
          const CaptureScope scope(domain, stream);  // the sum's, where the output has another type
          group.all_reduce_rms_norm_into(out.view(), x.view(), norm, stream);
          graph = stream.driver().end_capture(stream.native());
        }
        for (int seed = 1; seed < 3; ++seed) {
          prepare(seed);
          graph->launch(stream);
          group.synchronize(stream, kLimit);
          check(seed);
        }
      }
    }
  }
}

TEST_CASE("the policy refuses windows for the right reason", "[nccl][policy]") {
  const auto& found = session().transport->capabilities();
  CHECK(found.backend == BackendKind::cuda);
  CHECK(found.nccl_runtime_version > 22000);
  CHECK(found.machines == 1);
  const SymmetricOptions options{.enabled = true, .selection = Selection::all()};
  const ParallelLayout layout{.tp = ranks(), .pp = 1, .dcp = ranks()};
  const auto decision = decide(options, GroupKind::decode_context_parallel, layout, found);
  INFO(describe(decision));
  if (ranks() == 1) {
    CHECK(decision.nccl_windows.reason == Reason::single_rank);
    return;
  }
  if (found.nccl_hosts != 1) {
    CHECK(decision.nccl_windows.reason == Reason::out_of_nvlink_reach);
    CHECK_THAT(decision.nccl_windows.detail, contains(std::to_string(found.nccl_hosts), "hosts"));
  } else if (found.nvlink_reach && found.nccl_cumem_enabled && found.nccl_win_enable) {
    CHECK(decision.nccl_windows.on);
  } else {
    CHECK_FALSE(decision.nccl_windows.on);
  }
  // NCCL's hosts play no part in peer mapping: the ranks share this machine.
  CHECK(decision.peer_mapping.on == (session().transport->peer_kernels() != nullptr));
  if (hosts_of_their_own()) {
    CHECK(decision.peer_mapping.on);
  }
}

TEST_CASE("segments can be exported", "[nccl]") {
  const auto segment = session().backend->allocate_segment(std::size_t{4} << 20);
  auto& memory = dynamic_cast<NcclSegment&>(*segment);
  CHECK(memory.bytes() == std::size_t{4} << 20);
  CHECK(memory.exportable() == session().transport->capabilities().nccl_cumem_enabled);
}
