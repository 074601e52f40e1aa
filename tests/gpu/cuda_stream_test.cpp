#include "cohort/cuda/cuda_stream.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "cohort/cuda.hpp"
#include "gpu/device_tensor.hpp"
#include "support/catch.hpp"

// Streams, captures and ordinary memory of the backend: one process, one card.

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

struct Fixture {
  std::shared_ptr<CudaBackend> backend = cuda_backend();
  UniqueStream first = make_stream(backend->device().index);
  UniqueStream second = make_stream(backend->device().index);
  StreamRef a = backend->stream(first.get());
  StreamRef b = backend->stream(second.get());
};

}  // namespace

TEST_CASE_METHOD(Fixture, "host work runs in stream order", "[cuda_stream]") {
  std::vector<int> order;
  a.submit([&] {
    std::this_thread::sleep_for(50ms);
    order.push_back(1);
  });
  b.wait_for(a);
  b.submit([&] { order.push_back(2); });
  b.synchronize(10s);
  CHECK(order == std::vector<int>{1, 2});
}

TEST_CASE_METHOD(Fixture, "captured host work runs at every launch", "[cuda_stream]") {
  int runs = 0;
  CHECK(a.capture_id() == 0);
  a.driver().begin_capture(a.native());
  const CaptureId first_id = a.capture_id();
  CHECK(first_id != 0);
  a.submit([&] { ++runs; });
  const auto graph = a.driver().end_capture(a.native());
  CHECK(a.capture_id() == 0);
  CHECK(runs == 0);
  for (int i = 0; i < 3; ++i) {
    graph->launch(b);
  }
  b.synchronize(10s);
  CHECK(runs == 3);

  a.driver().begin_capture(a.native());
  CHECK(a.capture_id() != first_id);
  static_cast<void>(a.driver().end_capture(a.native()));
}

TEST_CASE_METHOD(Fixture, "a graph keeps what it was given", "[cuda_stream]") {
  auto object = std::make_shared<int>(7);
  const std::weak_ptr<int> watch = object;
  CHECK_THROWS_AS(a.retain_in_capture(object), UsageError);
  a.driver().begin_capture(a.native());
  a.submit([] {});
  a.retain_in_capture(std::move(object));
  auto graph = a.driver().end_capture(a.native());
  CHECK_FALSE(watch.expired());
  graph->launch(a);
  a.synchronize(10s);
  CHECK_FALSE(watch.expired());
  graph.reset();
  const auto deadline = std::chrono::steady_clock::now() + 10s;
  while (!watch.expired() && std::chrono::steady_clock::now() < deadline) {
    a.synchronize(1s);  // CUDA lets go on a thread of its own
  }
  CHECK(watch.expired());
}

TEST_CASE_METHOD(Fixture, "captures that do not exist or broke are errors", "[cuda_stream]") {
  CHECK_THROWS_AS(a.driver().end_capture(a.native()), UsageError);
  a.driver().begin_capture(a.native());
  CHECK_THROWS_AS(a.synchronize(1s), UsageError);  // and does not invalidate the capture
  CHECK(a.capture_id() != 0);
  static_cast<void>(cudaStreamSynchronize(first.get()));  // forbidden: invalidates it
  CHECK_THROWS_AS(a.driver().end_capture(a.native()), TransportError);
  static_cast<void>(cudaGetLastError());
  a.submit([] {});
  a.synchronize(10s);
}

TEST_CASE_METHOD(Fixture, "a stream tells its capture whatever device is current",
                 "[cuda_stream]") {
  int devices = 0;
  cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  const auto on_another = [&](const auto& ask) {
    const DeviceGuard other(devices - 1);
    cuda_check(cudaFree(nullptr), "cudaFree");  // starts it
    return ask();
  };
  const StreamRef legacy = backend->stream(nullptr);
  CHECK(on_another([&] { return a.capture_id(); }) == 0);
  CHECK(on_another([&] { return legacy.capture_id(); }) == 0);
  a.driver().begin_capture(a.native());
  const CaptureId capture = a.capture_id();
  CHECK(capture != 0);
  {
    const DeviceGuard other(devices - 1);
    CHECK(a.capture_id() == capture);
  }
  static_cast<void>(a.driver().end_capture(a.native()));
  CHECK(on_another([&] { return a.capture_id(); }) == 0);
}

TEST_CASE_METHOD(Fixture, "ordinary memory is freed in stream order", "[cuda_stream]") {
  DeviceTensor marks(DType::f32, {1000}, Layout::contiguous, backend->device());
  marks.fill([](std::int64_t i) { return static_cast<double>(i); });
  for (int round = 0; round < 100; ++round) {
    Tensor tensor = backend->allocate({1000}, DType::f32, a);
    backend->ops().copy(marks.view(), tensor.view(), a);
    if (round % 2 == 1) {
      b.wait_for(a);
      backend->ops().copy(tensor.view(), marks.view(), b);
      tensor.record_stream(b);
    }
  }
  CHECK(backend->allocate({0, 4}, DType::f32, a).data() == nullptr);
  a.synchronize(10s);
  b.synchronize(10s);
  CHECK(marks.differs([](std::int64_t i) { return static_cast<double>(i); }) == "");
}

TEST_CASE_METHOD(Fixture, "memory allocated in a capture lives as long as the graph",
                 "[cuda_stream]") {
  DeviceTensor from(DType::f32, {4096}, Layout::contiguous, backend->device());
  DeviceTensor to(DType::f32, {4096}, Layout::contiguous, backend->device());
  Tensor before = backend->allocate({4096}, DType::f32, a);
  a.driver().begin_capture(a.native());
  {
    const Tensor within = backend->allocate({4096}, DType::f32, a);
    backend->ops().copy(from.view(), within.view(), a);
    backend->ops().copy(within.view(), before.view(), a);
    backend->ops().copy(before.view(), to.view(), a);
    before.reset();  // the graph goes on using it
  }
  const auto graph = a.driver().end_capture(a.native());
  for (int round = 0; round < 10; ++round) {
    // Other tensors must not get the graph's memory.
    const Tensor other = backend->allocate({4096}, DType::f32, a);
    backend->ops().copy(from.view(), other.view(), a);
    from.fill([round](std::int64_t i) { return static_cast<double>(i + round); });
    graph->launch(a);
    a.synchronize(10s);
    CHECK(to.differs([round](std::int64_t i) { return static_cast<double>(i + round); }) == "");
  }
}

TEST_CASE_METHOD(Fixture, "copies convert f32 to the half types", "[cuda_ops]") {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const Layout layout : {Layout::contiguous, Layout::transposed, Layout::gapped}) {
      DeviceTensor from(DType::f32, {5, 7, 9}, layout, backend->device());
      DeviceTensor to(dtype, {5, 7, 9}, Layout::contiguous, backend->device());
      // Halfway cases of both types are among the values: rounding must be to nearest even.
      const auto value = [](std::int64_t i) { return 1.0 + static_cast<double>(i) / 4096.0; };
      from.fill(value);
      backend->ops().copy(from.view(), to.view(), a);
      a.synchronize(10s);
      CHECK(to.differs([&](std::int64_t i) {
        std::byte bytes[8];
        encode(dtype, value(i), bytes);
        return decode(dtype, bytes);
      }) == "");
    }
  }
}

TEST_CASE_METHOD(Fixture, "copies between eight dimensions that cannot be joined", "[cuda_ops]") {
  const Dims shape{2, 3, 2, 2, 3, 2, 2, 3};
  DeviceTensor from(DType::i32, shape, Layout::transposed, backend->device());
  DeviceTensor to(DType::i32, shape, Layout::gapped, backend->device());
  from.fill([](std::int64_t i) { return static_cast<double>(i); });
  backend->ops().copy(from.view(), to.view(), a);
  a.synchronize(10s);
  CHECK(to.differs([](std::int64_t i) { return static_cast<double>(i); }) == "");
}

TEST_CASE_METHOD(Fixture, "merged LSEs follow the host's arithmetic", "[cuda_ops]") {
  constexpr int kRanks = 3;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const LseBase base : {LseBase::e, LseBase::two}) {
    DeviceTensor lses(DType::f32, {kRanks, 4, 8}, Layout::contiguous, backend->device());
    DeviceTensor merged(DType::f32, {4, 8}, Layout::contiguous, backend->device());
    const auto lse = [](std::int64_t i) -> float {
      return i % 32 == 5 ? -kInf : i % 7 == 3 ? kInf : static_cast<float>(i * 37 % 23) - 11.0F;
    };
    lses.fill([&](std::int64_t i) { return static_cast<double>(lse(i)); });
    backend->ops().merge_lse(lses.view(), base, merged.view(), a);
    a.synchronize(10s);
    std::vector<float> got(32);
    cuda_check(
        cudaMemcpy(got.data(), merged.view().data(), 32 * sizeof(float), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
    for (std::int64_t i = 0; i < 32; ++i) {
      const float each[kRanks] = {lse(i), lse(32 + i), lse(64 + i)};
      float scales[kRanks];
      float expected = 0;
      dcp::merge_weights(each, kRanks, base, scales, &expected);
      if (dcp::is_empty_lse(expected)) {
        CHECK(got[static_cast<std::size_t>(i)] == expected);
      } else {
        CHECK(std::abs(got[static_cast<std::size_t>(i)] - expected) <=
              1e-6F * std::max(1.0F, std::abs(expected)));
      }
    }
  }
}
