// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/mpi.hpp"
#include "cohort/nccl/nccl_transport.hpp"
#include "gpu/nccl_session.hpp"
#include "support/ranks.hpp"

// Ranks of the transport that differ, come too late or not at all; the session's end comes last.

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("ranks that were set up differently are told", "[nccl][errors]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const bool last = rank() == ranks() - 1;
  NcclTransportOptions options;
  options.own_max_bytes = last ? 1234 : 4321;
  CHECK_THROWS_AS(NcclTransport(world(), session().backend->streams(),
                                session().backend->device().index, options),
                  SymmetryError);
}

TEST_CASE("options that cannot be are refused on the rank that has them, and quoted to the others",
          "[nccl][errors]") {
  const bool last = rank() == ranks() - 1;
  NcclTransportOptions options;
  options.kernel_limit = last ? std::chrono::milliseconds(-1) : 60s;
  try {
    const NcclTransport transport(world(), session().backend->streams(),
                                  session().backend->device().index, options);
    FAIL("expected an error");
  } catch (const ConfigError& error) {
    CHECK(last);
    CHECK_THAT(std::string(error.what()), contains("kernel_limit"));
  } catch (const SymmetryError& error) {
    CHECK_FALSE(last);
    CHECK(error.ranks() == std::vector<int>{ranks() - 1});
    CHECK_THAT(std::string(error.what()), contains("kernel_limit"));
  }
}

TEST_CASE("a rank that never comes to an own kernel is named", "[nccl][errors]") {
  if (skip_all_if(ranks() < 2 || session().transport->peer_kernels() == nullptr,
                  "needs own kernels")) {
    return;
  }
  NcclTransportOptions options;
  options.kernel_limit = 1500ms;
  const auto first_group = world().subgroup(everyone(), 1, "first");
  {
    NcclTransport transport(*first_group, session().backend->streams(),
                            session().backend->device().index, options);
    const int absent = ranks() - 1;
    if (rank() != absent) {
      transport.barrier(session().ref());
      try {
        transport.synchronize(session().ref(), 30s);
        FAIL("expected a TimeoutError");
      } catch (const TimeoutError& error) {
        CHECK(error.missing() == std::vector<int>{absent});
        CHECK_THAT(std::string(error.what()), contains("rank " + std::to_string(absent)));
      }
    }
    world().barrier();
  }
  // The process goes on with a group of a new generation.
  const auto second_group = world().subgroup(everyone(), 2, "second");
  NcclTransport again(*second_group, session().backend->streams(),
                      session().backend->device().index, options);
  auto sum = tensor(DType::f32, {100});
  sum.fill([](std::int64_t i) { return value(rank(), i); });
  again.all_reduce(sum.view(), sum.view(), ReduceOp::sum, session().ref());
  again.synchronize(session().ref(), kLimit);
  CHECK(sum.differs([](std::int64_t i) { return reduced(ReduceOp::sum, i); }) == "");
}

TEST_CASE("ranks whose norms differ are told, in one launch and in two", "[nccl][errors]") {
  if (skip_all_if(ranks() < 2 || session().transport->peer_kernels() == nullptr ||
                      runtime_settings().own_max_bytes == 0,
                  "needs own kernels")) {
    return;
  }
  const bool last = rank() == ranks() - 1;
  const StreamRef stream = session().ref();
  struct Case {
    const char* what;
    Dims shape;
    DType out = DType::bf16;
    float epsilon = 1e-5F;
    bool normed = true;
  };
  // Rows of few elements have no room in an inbox where their sum has some.
  const Dims one_launch{4, 512};
  const Dims two{1100, 8};
  const std::pair<Dims, Case> cases[] = {
      {one_launch, {"types of output", one_launch, DType::f8_e4m3}},
      {one_launch, {"epsilons", one_launch, DType::bf16, 1e-6F}},
      {two, {"types of output, in two", two, DType::f8_e4m3}},
      {two, {"epsilons, in two", two, DType::bf16, 1e-6F}},
      {two, {"shapes of equal size, in two", {2200, 4}}},
      {two, {"sums without a norm", two, DType::bf16, 1e-5F, false}}};
  for (const auto& [common, differing] : cases) {
    CAPTURE(differing.what);
    DecodeContextParallelGroup group(parts(differing.what), {});
    group.reserve(1 << 20);  // so that no rank's arena grows without the others
    const Case mine = last ? differing : Case{"", common};
    auto x = tensor(DType::bf16, mine.shape);
    auto residual = tensor(DType::bf16, mine.shape);
    auto weight = tensor(DType::bf16, {mine.shape[1]});
    auto scale = tensor(DType::f32, {1});
    auto out = tensor(mine.out, mine.shape);
    for (auto* filled : {&x, &residual, &weight, &scale}) {
      filled->fill([](std::int64_t) { return 1; });
    }
    ResidualNorm norm{
        .residual = residual.view(), .weight = weight.view(), .epsilon = mine.epsilon};
    if (mine.out == DType::f8_e4m3) {
      norm.scale = scale.view();
    }
    const std::string path = group.path(Collective::all_reduce_rms_norm, x.view(), out.view());
    CHECK(path == (common == two ? "own, then a norm" : "own"));
    try {  // who comes late may be told in the call
      if (mine.normed) {
        group.all_reduce_rms_norm_into(out.view(), x.view(), norm, stream);
      } else {
        group.all_reduce_into(out.view(), x.view(), stream);
      }
      group.synchronize(stream, kLimit);
      FAIL("expected a SymmetryError");
    } catch (const SymmetryError& error) {
      // A pair that was found, of which the last is always one.
      const auto& told = error.ranks();
      REQUIRE(told.size() == 2);
      CHECK(told[0] < told[1]);
      CHECK(told[1] == ranks() - 1);
      CHECK_THAT(std::string(error.what()), contains("all_reduce"));
    }
    CHECK(group.failed());
    world().barrier();
  }
}

TEST_CASE("a registration whose peer comes when the limit is over touches nobody's memory",
          "[nccl][window][errors]") {
  if (skip_all_without_windows()) {
    return;
  }
  constexpr std::size_t kBytes = std::size_t{8} << 20;
  const int device = session().backend->device().index;
  const DeviceGuard guard(device);
  const auto group = world().subgroup(everyone(), 21, "late registration");
  const auto communicator = Communicator::create(*group, device);
  MpiControlPlane impatient(MPI_COMM_WORLD, 1s, "late registration, impatient");
  auto segment = std::make_unique<NcclSegment>(device, kBytes);
  if (rank() != ranks() - 1) {
    try {
      static_cast<void>(NcclWindow::create(communicator, *segment, impatient));
      FAIL("registered without a peer");
    } catch (const TimeoutError& error) {  // another rank may have been out of patience sooner
      CHECK_THAT(std::string(error.what()), contains("did not return within"));
      CHECK(error.missing().empty());
    }
    segment.reset();
    world().barrier();
    // What has been given back would be here, under the registration that goes on.
    const NcclSegment next(device, kBytes);
    cuda_check(cudaMemset(next.data(), 0x5a, kBytes), "cudaMemset");
    world().barrier();
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    std::vector<unsigned char> bytes(kBytes);
    cuda_check(cudaMemcpy(bytes.data(), next.data(), kBytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    CHECK(std::count(bytes.begin(), bytes.end(), 0x5a) == static_cast<std::ptrdiff_t>(kBytes));
  } else {
    world().barrier();  // the others' limit is over
    try {
      static_cast<void>(NcclWindow::create(communicator, *segment, impatient));
    } catch (const Error&) {
      // whether a registration that some ranks have given up succeeds is NCCL's to say
    }
    world().barrier();
  }
  communicator->mark_broken();
}

TEST_CASE("a stream that stays busy ends in a time-out", "[nccl][errors]") {
  const StreamRef stream = session().ref();
  const auto release = std::make_shared<std::atomic<bool>>(false);
  stream.submit([release] {
    while (!*release) {
      std::this_thread::sleep_for(1ms);
    }
  });
  CHECK_THROWS_AS(stream.synchronize(100ms), TimeoutError);
  *release = true;
  stream.synchronize(10s);
}

TEST_CASE("teardown leaves nothing behind", "[nccl]") {
  world().barrier();
  slot().reset();
  CHECK(cudaGetLastError() == cudaSuccess);
  world().barrier();
}
