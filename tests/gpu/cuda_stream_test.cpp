// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/cuda_stream.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/cuda/device_drain.hpp"
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

TEST_CASE("graphs may be destroyed in flight, and their streams' driver with them",
          "[cuda_stream]") {
  for (int round = 0; round < 200; ++round) {
    Fixture fixture;
    std::vector<std::unique_ptr<ExecutableGraph>> graphs;
    for (int g = 0; g < 4; ++g) {
      fixture.a.driver().begin_capture(fixture.a.native());
      for (int k = 0; k < 8; ++k) {
        fixture.a.retain_in_capture(std::make_shared<std::vector<int>>(1000));
      }
      fixture.a.submit([] { std::this_thread::sleep_for(100us); });
      graphs.push_back(fixture.a.driver().end_capture(fixture.a.native()));
      graphs.back()->launch(fixture.a);
    }
    if (round % 2 == 0) {
      fixture.a.synchronize(10s);
    }
    graphs.clear();
  }
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

TEST_CASE_METHOD(Fixture, "a stream may be waited for while another is captured, in every mode",
                 "[cuda_stream]") {
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
                          cudaStreamCaptureModeRelaxed}) {
    b.submit([] { std::this_thread::sleep_for(5ms); });
    cuda_check(cudaStreamBeginCapture(first.get(), mode), "cudaStreamBeginCapture");
    b.synchronize(10s);
    const Tensor tensor = backend->allocate({1000}, DType::f32, b);
    backend->ops().copy(tensor.view(), tensor.view(), b);
    CHECK(a.capture_id() != 0);
    a.submit([] {});
    CHECK(a.driver().end_capture(a.native()) != nullptr);
  }
}

TEST_CASE_METHOD(Fixture, "a card is waited for within a limit", "[device_drain]") {
  const int device = backend->device().index;
  CHECK(device_idle_within(device, 5s));
  const auto release = std::make_shared<std::atomic<bool>>(false);
  a.submit([release] {
    while (!*release) {
      std::this_thread::sleep_for(1ms);
    }
  });
  CHECK_FALSE(device_idle_within(device, 100ms));
  CHECK_FALSE(device_idle_within(device, 100ms));
  *release = true;
  CHECK(device_idle_within(device, 10s));
}

TEST_CASE_METHOD(Fixture, "memory can be mapped twice in one process", "[exportable_memory]") {
  const int device = backend->device().index;
  const auto memory = DeviceMapping::allocate(device, 1 << 20);
  const auto descriptor = DeviceMapping::export_descriptor(memory.data());
  auto again = std::make_unique<DeviceMapping>(
      DeviceMapping::import(device, memory.bytes(), descriptor.get()));
  const std::uint64_t word = 0x0123456789abcdef;
  std::uint64_t got = 0;
  CHECK(cudaMemcpy(memory.data(), &word, sizeof(word), cudaMemcpyHostToDevice) == cudaSuccess);
  CHECK(cudaMemcpy(&got, again->data(), sizeof(got), cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(got == word);
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
  CaptureId elsewhere = 0;
  std::thread([&] { elsewhere = a.capture_id(); }).join();  // where no device is current yet
  CHECK(elsewhere == capture);
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
    const TensorView lse_of_first(lses.view().data(), DType::f32, {1, 4, 8}, lses.view().device());
    MergeArguments arguments;
    arguments.partials.lse = lse_of_first;
    arguments.partials.base = base;
    arguments.rows = {.batch = 4, .heads = 8, .ranks = 1};
    arguments.lse = merged.view();
    backend->ops().merge_lse(lses.view(), arguments, 0, a);
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

namespace {

/// What every node of a captured graph depends on.
std::vector<std::vector<cudaGraphNode_t>> dependencies_of(const ExecutableGraph& graph,
                                                          std::vector<cudaGraphNode_t>& nodes) {
  cudaGraph_t const captured = dynamic_cast<const CudaExecutableGraph&>(graph).graph();
  std::size_t count = 0;
  cuda_check(cudaGraphGetNodes(captured, nullptr, &count), "cudaGraphGetNodes");
  nodes.resize(count);
  cuda_check(cudaGraphGetNodes(captured, nodes.data(), &count), "cudaGraphGetNodes");
  cuda_check(cudaGraphGetEdges(captured, nullptr, nullptr,
#if CUDART_VERSION >= 13000
                               nullptr,
#endif
                               &count),
             "cudaGraphGetEdges");
  std::vector<cudaGraphNode_t> from(count);
  std::vector<cudaGraphNode_t> to(count);
  cuda_check(cudaGraphGetEdges(captured, from.data(), to.data(),
#if CUDART_VERSION >= 13000
                               nullptr,
#endif
                               &count),
             "cudaGraphGetEdges");
  std::vector<std::vector<cudaGraphNode_t>> dependencies(nodes.size());
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    for (std::size_t edge = 0; edge < count; ++edge) {
      if (to[edge] == nodes[i]) {
        dependencies[i].push_back(from[edge]);
      }
    }
  }
  return dependencies;
}

}  // namespace

TEST_CASE_METHOD(Fixture, "a captured call waits for the call before it and nothing later",
                 "[cuda_stream]") {
  StreamOrder order("group test");
  const auto call = [&](StreamRef stream) {
    const auto begun = order.before(stream);
    stream.submit([] {});
    order.after(begun);
  };
  a.driver().begin_capture(a.native());
  b.wait_for(a);
  call(a);
  a.submit([] {});  // what the second call must not wait for
  call(b);
  a.wait_for(b);
  const auto graph = a.driver().end_capture(a.native());
  std::vector<cudaGraphNode_t> nodes;
  const auto dependencies = dependencies_of(*graph, nodes);
  REQUIRE(nodes.size() == 3);
  const auto root = std::find_if(dependencies.begin(), dependencies.end(),
                                 [](const auto& of) { return of.empty(); });
  REQUIRE(root != dependencies.end());
  const std::vector first_call{nodes[static_cast<std::size_t>(root - dependencies.begin())]};
  CHECK(std::count(dependencies.begin(), dependencies.end(), first_call) == 2);
}

TEST_CASE_METHOD(Fixture, "an eager call waits for the call before it and nothing later",
                 "[cuda_stream]") {
  StreamOrder order("group test");
  const auto call = [&](StreamRef stream, std::function<void()> work) {
    const auto begun = order.before(stream);
    stream.submit(std::move(work));
    order.after(begun);
  };
  call(a, [] {});
  call(b, [] {});
  std::atomic<bool> first_done = false;
  std::atomic<bool> let_go = false;
  call(a, [&] {
    std::this_thread::sleep_for(50ms);
    first_done = true;
  });
  bool in_order = false;
  call(b, [&] { in_order = first_done; });
  b.synchronize(10s);
  CHECK(in_order);
  // What the stream gets behind its call holds nobody up. Host work of CUDA shares a thread, so it
  // is a device wait: for an event of a third stream that has not come yet.
  call(a, [] {});
  const UniqueStream third = make_stream(backend->device().index);
  const StreamRef c = backend->stream(third.get());
  c.submit([&] {
    while (!let_go) {
      std::this_thread::yield();
    }
  });
  a.wait_for(c);
  const auto begun = order.before(b);
  order.after(begun);
  b.synchronize(10s);
  let_go = true;
  a.synchronize(10s);
}

TEST_CASE_METHOD(Fixture, "a capture may follow eager work on other streams", "[cuda_stream]") {
  const auto memory = host_backend();
  const StreamRef legacy = backend->stream(nullptr);
  for (const StreamRef warm : {b, legacy}) {
    const auto arena = SymmetricArena::create(*memory, "work", {});
    arena->reserve(std::size_t{1} << 20);
    GraphPool pool;
    const auto all = static_cast<std::int64_t>(arena->statistics().largest_free);
    std::atomic<bool> let_go = false;
    warm.submit([&] {
      while (!let_go) {
        std::this_thread::yield();
      }
    });
    arena->empty({all}, DType::u8, warm).reset();
    for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal}) {
      cuda_check(cudaStreamBeginCapture(first.get(), mode), "cudaStreamBeginCapture");
      {
        CaptureDomain domain;
        domain.add(arena);
        const CaptureScope scope(domain, a, &pool);
        const Tensor taken = arena->empty({all}, DType::u8, a);
        a.submit([] {});
      }
      const auto graph = a.driver().end_capture(a.native());
      if (mode == cudaStreamCaptureModeGlobal) {
        let_go = true;
      }
      arena->order_launch(a);
      graph->launch(a);
      a.synchronize(10s);
    }
    warm.synchronize(10s);
  }
}
